"""What the verbs do, step by step: check everything that can be checked, prepare, launch, read how it ended.

Whatever the user can mend is found here, before workers start and a model is loaded.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral_dist import assets
from mistral_dist.config import Recipe
from mistral_dist.display import console, evaluating, following, minutes, track
from mistral_dist.errors import FAILED, FINISHED, STOPPED, RecipeError, TrainingError
from mistral_dist.run import RunDirectory, check_free, check_same, move_aside, read_json
from mistral_dist.runtime import launcher

TAIL = 15
"""Lines of the log that are shown where workers died without a word of ours."""


def start_training(
    recipe: Recipe,
    words: Sequence[str],
    *,
    processes: int | None = None,
    zero: int | None = None,
    config: Path | None = None,
    fresh: bool = False,
) -> int:
    """Train a recipe, or go on with it, or say that it is done; return the exit code.

    `words` are the recipe's path and the overrides, as the workers will read them.
    """
    run = RunDirectory(recipe.run_dir)
    if fresh:
        old = move_aside(run.path)
        if old is not None:
            console.print(f"the old run is now {old}")
    check_free(run.path)
    status = run.status()
    if status is not None and (run.path / "recipe.yaml").is_file():
        check_same(recipe, run.recipe(), run.path)
        if status["state"] == "finished":
            console.print(f"{run.path}: {status['message']}; nothing to do. Another run: run.dir=..., or --fresh")
            return FINISHED
    prepare_if_needed(recipe)
    line = training_line(recipe, words, processes=processes, zero=zero, config=config)
    console.print(f"$ {line}", soft_wrap=True, style="dim")
    console.print(f"log: {run.log}", style="dim")
    started = time.monotonic()
    with following(run) as tick:
        code = launcher.run(line, run.log, tick)
    return _ended(run, code, status, time.monotonic() - started)


def start_evaluation(run: RunDirectory, words: Sequence[str] = (), *, processes: int | None = None) -> dict[str, Any]:
    """Evaluate a finished run; return what test.json holds. Raises TrainingError, with the log's end, where it failed."""
    gpus = launcher.visible_gpus()
    count = _processes(processes, gpus)
    name = "single_gpu" if count == 1 else "data_parallel"
    line = launcher.Line(
        config=assets.find(f"configs/accelerate/{name}.yaml"),
        processes=count,
        module="mistral_dist.evaluate",
        words=(str(run.path), *words),
        gpus=gpus > 0,
    )
    console.print(f"$ {line}", soft_wrap=True, style="dim")
    (run.path / "evaluation" / "test.json").unlink(missing_ok=True)
    (run.path / "evaluation" / "progress.json").unlink(missing_ok=True)
    with evaluating(run) as tick:
        launcher.run(line, run.log, tick)
    result = read_json(run.path / "evaluation" / "test.json")
    if result is None:
        raise TrainingError(f"the evaluation failed; the end of {run.log}:\n{tail(run.log)}")
    (run.path / "evaluation" / "progress.json").unlink(missing_ok=True)
    return result


def prepare_if_needed(recipe: Recipe, *, again: bool = False) -> Any:
    """The recipe's prepared data, made now where there are none that fit."""
    # these two import torch and transformers, seconds that a mistyped recipe need not wait for
    from mistral_dist.data import prepare, sources
    from mistral_dist.data.encode import Encoder
    from mistral_dist.errors import DataError
    from mistral_dist.hub import load_tokenizer

    sources.check(recipe.data.sources)
    encoder = Encoder(load_tokenizer(recipe.model), recipe.task)
    try:
        prepared = prepare.open_prepared(recipe, encoder)
    except DataError:
        return prepare.prepare(recipe, encoder, track)
    if not prepare.sources_changed(recipe, prepared):
        return prepared
    if again or not recipe.run_dir.exists():
        return prepare.prepare(recipe, encoder, track)
    console.print(f"note: source files changed since {prepared.path} was prepared; this run goes on with the data that it began with")
    return prepared


def training_line(
    recipe: Recipe, words: Sequence[str], *, processes: int | None = None, zero: int | None = None, config: Path | None = None
) -> launcher.Line:
    """The `accelerate launch` line: one process without ZeRO, several under ZeRO-2, unless asked otherwise."""
    gpus = launcher.visible_gpus()
    count = _processes(processes, gpus)
    if count > recipe.train.global_batch_size:
        raise RecipeError(
            f"train.global_batch_size={recipe.train.global_batch_size}: cannot be shared by {count} processes; use --processes"
            f" {recipe.train.global_batch_size}, or start a new run with a larger global batch"
        )
    stage = zero if zero is not None else 2 if count > 1 else 0
    name = "multi_gpu" if stage else "single_gpu" if count == 1 else "data_parallel"
    return launcher.Line(
        config=config or assets.find(f"configs/accelerate/{name}.yaml"),
        processes=count,
        module="mistral_dist.train",
        words=tuple(words),
        deepspeed=assets.find(f"configs/deepspeed/zero{stage}.json") if stage and (config is None or zero is not None) else None,
        gpus=gpus > 0,
    )


def tail(log: Path) -> str:
    """The last lines of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(f"  {line}" for line in lines[-TAIL:])


def _processes(asked: int | None, gpus: int) -> int:
    """All visible GPUs; without any, two processes, so that what runs is what would run on two GPUs."""
    if asked is not None and gpus and asked > gpus:
        raise RecipeError(f"--processes {asked}: only {gpus} GPUs are visible; see CUDA_VISIBLE_DEVICES")
    return asked or gpus or 2


def _ended(run: RunDirectory, code: int, before: dict[str, Any] | None, seconds: float) -> int:
    """Say how the workers ended. Their exit code comes from the status, since Accelerate turns every failure into 1."""
    status = run.status()
    if status is None or status["state"] == "running" or (status == before and code != 0):
        message = "the workers ended without a word (killed, or out of memory?)"
        if run.path.is_dir() and (run.path / "recipe.yaml").is_file():
            run.set_status("failed", FAILED, message)
        console.print(tail(run.log), markup=False)
        raise TrainingError(f"{run.path}: {message}; its last words are above, all of them in {run.log}")
    if status["state"] == "failed":
        if status["exit_code"] == FAILED:
            console.print(tail(run.log), markup=False)
        raise _as_error(status)
    console.print(f"{run.path}: {status['message']}, after {minutes(seconds)}", markup=False)
    return FINISHED if status["state"] == "finished" else STOPPED


def _as_error(status: dict[str, Any]) -> TrainingError:
    error = TrainingError(status["message"])
    error.exit_code = status["exit_code"]
    return error
