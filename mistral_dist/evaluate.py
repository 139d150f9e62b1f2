"""A finished run -> measures on its held-out test split, base and tuned with the same code.

Classification: accuracy, precision, recall, F1. The other tasks: the loss per target token and its perplexity; conversations also by
what the model writes: exact match, ROUGE-L, BLEU, chrF. Each with a 95 % interval, and whether tuned differs from base.

Rows of examples are dealt out to the ranks. What is found is kept row by row, so a killed evaluation goes on where it was, also
on another number of ranks. Started by `mistral-dist evaluate`, or directly:

    accelerate launch --config_file configs/accelerate/data_parallel.yaml -m mistral_dist.evaluate RUN
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral_dist import text_metrics
from mistral_dist.answers import MODELS
from mistral_dist.base_cache import fingerprint
from mistral_dist.checkpoint import content_of, load_progress, newest_good
from mistral_dist.config import Model, Recipe, digest
from mistral_dist.data.encode import Encoder, load_encoder
from mistral_dist.data.feed import has_held_out
from mistral_dist.data.prepared import Prepared, open_prepared
from mistral_dist.data.split import TEST
from mistral_dist.errors import FINISHED, DataError, MistralDistError, RunError
from mistral_dist.exams import exams_of
from mistral_dist.exams.sitting import take_all
from mistral_dist.files import write_text
from mistral_dist.hub import local_path
from mistral_dist.model import load_tuned
from mistral_dist.run import RunDirectory
from mistral_dist.runtime.engine import Runtime
from mistral_dist.unfinished import Unfinished


def evaluate(recipe: Recipe, runtime: Runtime, run: RunDirectory) -> None:
    """Score base and tuned on the test split, and write evaluation/.

    Raises DataError where nothing was held out, RunError where the data are not those that the run was trained on.
    """
    records, prepared, encoder = held_out(recipe, run)
    exams = exams_of(recipe, runtime, encoder, records)
    kept = Unfinished.of(run.path / "evaluation", work_of(recipe, run, prepared.fingerprint), runtime)
    # sdpa whatever training used: labels that share a prompt need a mask that flash-attn has no kernel for
    model = load_tuned(recipe.asked_model, run.adapter, runtime.device, "sdpa")
    answers = take_all(model, exams, MODELS, kept, runtime, run.path / "evaluation")
    if not runtime.is_main:
        return
    result: dict[str, Any] = {"split": TEST, "task": recipe.task.kind, "n": len(records)}
    lines: dict[str, list[Any]] = {"predictions": [], "scores": [], "worst": []}
    for marked in (exam.mark(answers[exam.name]) for exam in exams):
        result |= marked.about
        for part in (*MODELS, "difference"):
            result[part] = {**result.get(part, {}), **getattr(marked, part)}
        for name, found in lines.items():
            found += getattr(marked, name)
    for name, found in lines.items():
        lined = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in found)
        write_text(run.path / "evaluation" / f"{name}.jsonl", lined)
    result["evaluate"] = recipe.evaluate.model_dump(mode="json")
    write_text(run.path / "evaluation" / "test.json", json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    kept.discard()


def held_out(recipe: Recipe, run: RunDirectory) -> tuple[list[dict[str, Any]], Prepared, Encoder]:
    """The test split of the very data that a run was trained on. All that can be looked at before a model is loaded.

    Raises DataError where nothing was held out, RunError for another base, or where the data were prepared anew since: what is held
    out now may have been trained on.
    """
    if recipe.data.streaming and not has_held_out(recipe.data):
        raise DataError("data.sources: a stream without a source of its own for the test (into: test); nothing was held out")
    if recipe.evaluate.metric is not None:
        text_metrics.own_metric(recipe.evaluate.metric)
    encoder = load_encoder(recipe)
    refuse_another_base(recipe.model, run)
    prepared = open_prepared(recipe, encoder)
    if noted(run, "held_out") != prepared.fingerprint:
        raise RunError(f"{run.path}: was trained on other data than {prepared.path} holds now; prepare them as they were, or train anew")
    records = list(prepared.split(TEST))
    if not records:
        raise DataError(f"{prepared.path}: its test split is empty; nothing was held out (data.test_fraction), so nothing can be said")
    return records, prepared, encoder


def refuse_another_base(model: Model, run: RunDirectory) -> None:
    """Raise RunError where the base on this machine is another, by the content of its files, than the one that a run was trained on.

    `model`: as trained, but for its `path`.
    """
    then, now = noted(run, "base"), fingerprint(model)
    if then not in (None, now):
        remedy = "put them back (model.path, or the hub's cache)"
        raise RunError(
            f"{run.path}: was trained on other files of the base {model.name} than those in {local_path(model)}: fingerprint {then} then,"
            f" {now} now; {remedy}"
        )


def noted(run: RunDirectory, fact: str) -> Any:
    """A fact of what a run was trained on, or None; in its status alone where no checkpoint is left."""
    found = newest_good(run.checkpoints)
    return (load_progress(found)[1] if found is not None else run.status() or {}).get(fact)


def work_of(recipe: Recipe, run: RunDirectory, data: str) -> str:
    """A fingerprint that changes with anything that the answers depend on; `data`: that of what is asked."""
    return digest({"adapter": content_of(run.adapter), "data": data, "recipe": recipe.model_dump(mode="json")})


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


CHOICES = ("evaluate.", "model.path=")
"""Overrides that an evaluation or a chat may be given: they do not say what was trained."""


def recipe_of(run: RunDirectory, overrides: Sequence[str] = (), choices: tuple[str, ...] = CHOICES) -> Recipe:
    """The recipe of a finished run, with overrides. Raises RunError where there is no adapter yet, or for another override."""
    run.recipe()
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise RunError(f"{run.path}: no adapter yet; finish the training with `mistral-dist train` first")
    for word in overrides:
        if not word.startswith(choices):
            free = " and ".join(f"{choice}*" if choice.endswith(".") else choice.removesuffix("=") for choice in choices)
            raise RunError(f"{word}: is part of what was trained; here {free} can be overridden")
    return Recipe.load(run.path / "recipe.yaml", overrides)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
