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
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mistral_dist.config import Recipe
from mistral_dist.data.encode import Candidates, Encoder
from mistral_dist.data.pack import best_fit
from mistral_dist.data.prepare import Prepared, example_of, open_prepared
from mistral_dist.data.split import TEST
from mistral_dist.data.stream import Batch, collate
from mistral_dist.errors import FINISHED, MistralDistError, RunError
from mistral_dist.hub import load_tokenizer
from mistral_dist.loss import summed_loss
from mistral_dist.metrics import confusion_matrix, report
from mistral_dist.model import load_tuned
from mistral_dist.run import RunDirectory, write_text
from mistral_dist.runtime.engine import Runtime

MODELS = ("base", "tuned")


def evaluate(recipe: Recipe, runtime: Runtime, run: RunDirectory) -> dict[str, Any]:
    """Score base and tuned on the test split, write evaluation/, and return what test.json holds."""
    encoder = Encoder(load_tokenizer(recipe.model), recipe.task)
    prepared = open_prepared(recipe, encoder)
    runtime.on_main(lambda: note_progress(run, 0, 1))
    model = load_tuned(recipe.model, run.adapter, runtime.device, "sdpa")
    score = _classify if recipe.task.kind == "classification" else _measure_loss
    result, lines = score(recipe, runtime, run, model, prepared, encoder)
    result = {"split": TEST, "task": recipe.task.kind, "n": len(prepared.split(TEST)), **result}
    if runtime.is_main:
        write_text(run.path / "evaluation" / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_text(run.path / "evaluation" / "test.json", json.dumps(result, indent=2) + "\n")
    return result


def note_progress(run: RunDirectory, done: int, total: int) -> None:
    """Let others see how far the evaluation is."""
    write_text(run.path / "evaluation" / "progress.json", json.dumps({"done": done, "total": total}))


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
    recipe: Recipe, runtime: Runtime, run: RunDirectory, model: Any, prepared: Prepared, encoder: Encoder
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    records, labels = list(prepared.split(TEST)), list(recipe.task.labels)
    mine = range(runtime.rank, len(records), runtime.world_size)
    candidates = {index: encoder.candidates(records[index]["text"]) for index in mine}
    rows = _rows({i: len(c.prompt) + sum(len(a) - 1 for a in c.answers) for i, c in candidates.items()}, recipe.evaluate.max_tokens)
    predictions: dict[str, dict[int, int]] = {}
    for name in MODELS:
        found: dict[int, int] = {}
        with as_model(model, name):
            for n, row in enumerate(rows):
                scores = label_scores(model, label_row([candidates[i] for i in row]), len(row), len(labels), runtime.device)
                found |= dict(zip(row, scores.argmax(1).tolist(), strict=True))
                if runtime.is_main:
                    note_progress(run, MODELS.index(name) * len(rows) + n + 1, len(MODELS) * len(rows))
        predictions[name] = {index: label for part in runtime.gather(found) for index, label in part.items()}
    truth = [labels.index(record["label"]) for record in records]
    order = range(len(records))
    result = {
        "labels": labels,
        **{
            name: report(
                confusion_matrix(truth, [predictions[name][i] for i in order], len(labels)), labels, recipe.evaluate.bootstrap_samples
            )
            for name in MODELS
        },
    }
    lines = [
        {"id": records[i]["id"], "place": records[i]["place"], "label": records[i]["label"]}
        | {name: labels[predictions[name][i]] for name in MODELS}
        for i in order
    ]
    return result, lines


def _measure_loss(
    recipe: Recipe, runtime: Runtime, run: RunDirectory, model: Any, prepared: Prepared, encoder: Encoder
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    records = list(prepared.split(TEST))
    mine = range(runtime.rank, len(records), runtime.world_size)
    rows = _rows({i: records[i]["tokens"] for i in mine}, recipe.evaluate.max_tokens)
    result: dict[str, Any] = {}
    for name in MODELS:
        loss = targets = 0.0
        with as_model(model, name), torch.no_grad():
            for n, row in enumerate(rows):
                batch = Batch(**collate([encoder.encode(example_of(records[i])) for i in row]), ids=())
                loss += float(summed_loss(model, batch.to(runtime.device)))
                targets += len(batch.targets)
                if runtime.is_main:
                    note_progress(run, MODELS.index(name) * len(rows) + n + 1, len(MODELS) * len(rows))
        loss, targets = runtime.sum([loss, targets])
        result[name] = {"loss": loss / targets, "perplexity": math.exp(loss / targets)}
        result["targets"] = int(targets)
    return result, []


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
    try:
        run = RunDirectory(Path(words[0] if words else "."))
        recipe = recipe_of(run, words[1:])
        runtime = Runtime()
        evaluate(recipe, runtime, run)
        runtime.close()
        return FINISHED
    except MistralDistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def recipe_of(run: RunDirectory, overrides: Sequence[str] = ()) -> Recipe:
    """The run's recipe, with overrides of what an evaluation may choose. Raises RunError where there is no adapter yet."""
    run.recipe()
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise RunError(f"{run.path}: no adapter yet; finish the training with `mistral-dist train` first")
    return Recipe.load(run.path / "recipe.yaml", overrides)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
