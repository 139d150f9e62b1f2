"""A finished run -> task metrics on held-out data, base and tuned with the same code.

Classification is scored by likelihood: for each example, the log-probability of every label (and of stopping after it) as
the answer. All labels of an example share its prompt in one row, where each label sees the prompt and itself alone; so the
prompt is computed once. The other tasks report the loss per target token and its perplexity.

Started by `mistral-dist evaluate`, or directly:

    accelerate launch --config_file configs/accelerate/data_parallel.yaml -m mistral_dist.evaluate RUN
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mistral_dist.checkpoint import latest_good, load_progress
from mistral_dist.config import Recipe
from mistral_dist.data.encode import Candidates, Encoder, load_encoder
from mistral_dist.data.example import from_record
from mistral_dist.data.feed import has_held_out
from mistral_dist.data.pack import best_fit
from mistral_dist.data.prepared import Prepared, open_prepared
from mistral_dist.data.split import TEST
from mistral_dist.data.stream import Batch, collate
from mistral_dist.errors import FINISHED, DataError, MistralDistError, RunError
from mistral_dist.files import write_text
from mistral_dist.loss import summed_loss
from mistral_dist.metrics import confusion_matrix, report
from mistral_dist.model import load_tuned
from mistral_dist.run import RunDirectory
from mistral_dist.runtime.engine import Runtime

MODELS = ("base", "tuned")


def evaluate(recipe: Recipe, runtime: Runtime, run: RunDirectory) -> dict[str, Any]:
    """Score base and tuned on the test split, write evaluation/, and return what test.json holds.

    Raises DataError where nothing was held out, RunError where the data are not those that the run was trained on.
    """
    if recipe.data.streaming and not has_held_out(recipe.data):
        raise DataError("data.sources: a stream without a source of its own for the test (into: test); nothing was held out")
    encoder = load_encoder(recipe)
    prepared = open_prepared(recipe, encoder)
    held_out = HeldOut.of(run, prepared)
    # sdpa whatever training used: labels that share a prompt need a mask that flash-attn has no kernel for
    model = load_tuned(recipe.model, run.adapter, runtime.device, "sdpa")
    score = _classify if recipe.task.kind == "classification" else _measure_loss
    result, lines = score(recipe, runtime, run, model, held_out.records, encoder)
    result = {"split": TEST, "task": recipe.task.kind, "n": len(held_out.records), **result}
    if runtime.is_main:
        write_text(run.path / "evaluation" / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_text(run.path / "evaluation" / "test.json", json.dumps(result, indent=2) + "\n")
    return result


@dataclass(frozen=True)
class HeldOut:
    """The test split of the very data that a run was trained on."""

    records: list[dict[str, Any]]

    @classmethod
    def of(cls, run: RunDirectory, prepared: Prepared) -> "HeldOut":
        """Raises RunError where the data were prepared anew since: what is held out now may have been trained on."""
        found, _ = latest_good(run.checkpoints)
        if found is not None and load_progress(found)[1]["held_out"] != prepared.fingerprint:
            raise RunError(
                f"{run.path}: was trained on other data than {prepared.path} holds now; prepare them as they were, or train anew"
            )
        records = list(prepared.split(TEST))
        if not records:
            raise DataError(f"{prepared.path}: its test split is empty; nothing was held out (data.test_fraction), so nothing can be said")
        return cls(records)


@dataclass(frozen=True)
class LabelRow:
    """Classification prompts with all their labels, end to end in one row of T tokens."""

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T]: each label goes on where its prompt ends"""
    mask: torch.Tensor
    """bool [1, 1, T, T]: whether the row's token (third index) sees another (fourth)"""
    predict_from: torch.Tensor
    """int64 [N]: positions whose hidden states predict an answer's token"""
    targets: torch.Tensor
    """int64 [N]: those tokens"""
    owner: torch.Tensor
    """int64 [N]: example x labels + label that the token belongs to"""


def label_row(examples: Sequence[Candidates]) -> LabelRow:
    """Lay out prompts and answers; the last token of an answer is only predicted, so it is not in the row."""
    ids: list[int] = []
    positions: list[int] = []
    example_of_token: list[int] = []
    branch: list[int] = []  # 0 for the prompt, 1 + label for an answer
    predict_from: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for n, example in enumerate(examples):
        end = len(ids) + len(example.prompt)
        for label, answer in enumerate([[], *example.answers]):
            fed = example.prompt if label == 0 else answer[:-1]
            if label:
                predict_from += [end - 1, *range(len(ids), len(ids) + len(fed))]
                targets += answer
                owner += [n * len(example.answers) + label - 1] * len(answer)
            start = 0 if label == 0 else len(example.prompt)
            ids += fed
            positions += range(start, start + len(fed))
            example_of_token += [n] * len(fed)
            branch += [label] * len(fed)
    of, on = torch.tensor(example_of_token), torch.tensor(branch)
    sees = (of[:, None] == of) & ((on == 0) | (on[:, None] == on)) & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    row = (torch.tensor(values, dtype=torch.int64) for values in ([ids], [positions], predict_from, targets, owner))
    input_ids, position_ids, where, what, whose = row
    return LabelRow(input_ids, position_ids, sees[None, None], where, what, whose)


@torch.no_grad()
def label_scores(model: Any, row: LabelRow, examples: int, labels: int, device: torch.device) -> torch.Tensor:
    """Log-probability of each label as the whole answer, in nats; float32 [examples, labels]."""
    logits = model(
        input_ids=row.input_ids.to(device),
        position_ids=row.position_ids.to(device),
        attention_mask=row.mask.to(device),
        logits_to_keep=row.predict_from.to(device),
        use_cache=False,
    ).logits[0]
    found = logits.float().log_softmax(-1).gather(1, row.targets.to(device)[:, None])[:, 0]
    return torch.zeros(examples * labels, device=device).index_add_(0, row.owner.to(device), found).view(examples, labels).cpu()


def _classify(
    recipe: Recipe, runtime: Runtime, run: RunDirectory, model: Any, records: list[dict[str, Any]], encoder: Encoder
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    labels = list(recipe.task.labels)
    candidates = {index: encoder.candidates(records[index]["text"]) for index in _mine(records, runtime)}
    tokens = {index: len(one.prompt) + sum(len(answer) - 1 for answer in one.answers) for index, one in candidates.items()}
    found: dict[str, dict[int, int]] = {name: {} for name in MODELS}
    for name, row in _passes(model, _rows(tokens, recipe.evaluate.max_tokens), runtime, run):
        scores = label_scores(model, label_row([candidates[i] for i in row]), len(row), len(labels), runtime.device)
        found[name] |= dict(zip(row, scores.argmax(1).tolist(), strict=True))
    result: dict[str, Any] = {"labels": labels}
    truth = [labels.index(record["label"]) for record in records]
    lines = [{"id": record["id"], "place": record["place"], "label": record["label"]} for record in records]
    for name in MODELS:
        of_all = {index: label for part in runtime.gather(found[name]) for index, label in part.items()}
        predicted = [of_all[index] for index in range(len(records))]
        result[name] = report(confusion_matrix(truth, predicted, len(labels)), labels, recipe.evaluate.bootstrap_samples)
        lines = [{**line, name: labels[label]} for line, label in zip(lines, predicted, strict=True)]
    return result, lines


def _measure_loss(
    recipe: Recipe, runtime: Runtime, run: RunDirectory, model: Any, records: list[dict[str, Any]], encoder: Encoder
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    sums = {name: [0.0, 0.0] for name in MODELS}
    rows = _rows({index: records[index]["tokens"] for index in _mine(records, runtime)}, recipe.evaluate.max_tokens)
    for name, row in _passes(model, rows, runtime, run):
        batch = Batch(**collate([encoder.encode(from_record(records[i])) for i in row]), ids=())
        with torch.no_grad():
            sums[name][0] += float(summed_loss(model, batch.to(runtime.device)))
        sums[name][1] += len(batch.targets)
    result: dict[str, Any] = {}
    for name in MODELS:
        loss, targets = runtime.sum(sums[name])
        result[name] = {"loss": loss / targets, "perplexity": math.exp(loss / targets)}
        result["targets"] = int(targets)
    return result, []


def _mine(records: Sequence[Any], runtime: Runtime) -> range:
    """The indices of the records that this rank scores."""
    return range(runtime.rank, len(records), runtime.world_size)


def _passes(model: Any, rows: list[list[int]], runtime: Runtime, run: RunDirectory) -> Iterator[tuple[str, list[int]]]:
    """Each row with the model as base, then each as tuned; how far it is can be read in evaluation/progress.json."""
    total, told = len(MODELS) * len(rows), 0.0
    for done, (name, row) in enumerate((name, row) for name in MODELS for row in rows):
        if runtime.is_main and time.monotonic() - told > 1:
            told = time.monotonic()
            write_text(run.path / "evaluation" / "progress.json", json.dumps({"done": done, "total": total}))
        with as_model(model, name):
            yield name, row


def _rows(lengths: dict[int, int], capacity: int) -> list[list[int]]:
    """Example indices in rows of about `capacity` tokens; an example longer than that has a row of its own."""
    indices = list(lengths)
    packs = best_fit([min(lengths[i], capacity) for i in indices], capacity)
    return [[indices[n] for n in pack] for pack in packs]


def as_model(model: Any, name: str) -> Any:
    """The model as base (adapter off) or tuned."""
    return model.disable_adapter() if name == "base" else nullcontext()


def main(words: list[str]) -> int:
    """One worker: `RUN [section.field=value ...]`; return the exit code."""
    run = RunDirectory(Path(words[0] if words else "."))
    try:
        recipe = recipe_of(run, words[1:])
        runtime = Runtime()
        evaluate(recipe, runtime, run)
        runtime.close()
        return FINISHED
    except MistralDistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        write_text(run.path / "evaluation" / "failure.json", json.dumps({"message": str(error), "exit_code": error.exit_code}))
        return error.exit_code


CHOICES = ("evaluate.max_tokens=", "evaluate.bootstrap_samples=", "model.path=")
"""Overrides that an evaluation or a chat may be given: they do not say what was trained."""


def recipe_of(run: RunDirectory, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a finished run, with overrides. Raises RunError where there is no adapter yet, or for another override."""
    run.recipe()
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise RunError(f"{run.path}: no adapter yet; finish the training with `mistral-dist train` first")
    for word in overrides:
        if not word.startswith(CHOICES):
            raise RunError(f"{word}: is part of what was trained; here only {' '.join(CHOICES).replace('=', '')} can be chosen")
    return Recipe.load(run.path / "recipe.yaml", overrides)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
