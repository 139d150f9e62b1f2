"""What the verbs do, step by step: check everything that can be checked, prepare, launch, read how it ended.

Whatever the user can mend is found here, before workers start and a model is loaded.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mistral_dist import assets, base_cache
from mistral_dist.config import Recipe
from mistral_dist.display import evaluating, following, minutes, say, track
from mistral_dist.errors import FAILED, FINISHED, STOPPED, MachineError, RecipeError, TrainingError
from mistral_dist.files import describe, read_json, remedy
from mistral_dist.run import RunDirectory, check_free, check_same, move_aside
from mistral_dist.runtime import launcher
from mistral_dist.runtime.causes import cause, memory_kills

TAIL = 15
"""Lines of the log that are shown where workers died without a word of ours."""


def start_training(
    recipe: Recipe,
    words: Sequence[str],
    *,
    processes: int | None = None,
    zero: int | None = None,
    offload: bool = False,
    config: Path | None = None,
    fresh: bool = False,
    module: str = "mistral_dist.train",
) -> int:
    """Train a recipe, or go on with it, or say that it is done; return the exit code.

    `words` are the recipe's path and the overrides, as the workers will read them; `module` is what they run.
    """
    started = time.monotonic()
    run = RunDirectory(recipe.run_dir)
    if config is not None and not config.is_file():
        raise RecipeError(f"--config-file {config}: no such file; configs/accelerate/ has some to start from")
    check_free(run.path)
    status = None if fresh else run.status()
    if status is not None and (run.path / "recipe.yaml").is_file():
        check_same(recipe, run.recipe(), run.path)
        if status["state"] == "finished":
            say(f"{run.path}: {status['message']}; nothing to do. Another run: run.dir=..., or --fresh")
            return FINISHED
    prepared = prepare_if_needed(recipe)
    if prepared is not None:
        from mistral_dist.data.feed import refuse_unvalidated

        refuse_unvalidated(recipe, prepared)
    line = replace(training_line(recipe, words, processes=processes, zero=zero, offload=offload, config=config), module=module)
    if fresh:  # only now, when nothing speaks against the new run
        old = move_aside(run.path)
        if old is not None:
            say(f"the old run is now {old}")
    base_cache.ensure_ahead(recipe.model, "cuda" if line.gpus else "cpu", say)
    _announce(line, run)
    launched = time.monotonic()
    before = run.log.stat().st_size if run.log.is_file() else 0
    kills = memory_kills()
    with following(run) as tick:
        code = launcher.run(line, run.log, tick, say, started)
    why = cause(_since(run.log, before), memory_kills() - kills) if code != FINISHED else None
    return _ended(run, code, status, time.monotonic() - launched, why)


def start_evaluation(run: RunDirectory, words: Sequence[str] = (), *, processes: int | None = None) -> dict[str, Any]:
    """Evaluate a finished run; return what test.json holds. Raises TrainingError with the reason where it failed."""
    gpus = launcher.visible_gpus()
    count = _processes(processes, gpus)
    name = "single_gpu" if count == 1 else "data_parallel"
    line = launcher.Line(
        config=assets.find(f"configs/accelerate/{name}.yaml"),
        module="mistral_dist.evaluate",
        words=(str(run.path), *words),
        processes=count,
        gpus=gpus > 0,
        saves=False,
    )
    _announce(line, run)
    folder = run.path / "evaluation"
    for leftover in ("failure.json", "progress.json"):
        (folder / leftover).unlink(missing_ok=True)
    with evaluating(run) as tick:
        code = launcher.run(line, run.log, tick, say)
    (folder / "progress.json").unlink(missing_ok=True)
    result, failure = read_json(folder / "test.json"), read_json(folder / "failure.json")
    if failure is not None:
        raise TrainingError(failure["message"], failure["exit_code"])
    if code != 0 or result is None:
        _show_tail(run.log)
        raise TrainingError(f"{run.path}: the evaluation did not end; its last words are above, all of them in {run.log}")
    return result


def prepare_if_needed(recipe: Recipe, *, again: bool = False) -> Any:
    """The recipe's prepared data, made now where there are none; only with `again` is a data directory ever replaced.

    None where the recipe streams and holds nothing out: then there is nothing to prepare. Raises DataError where there are
    some of another recipe: a run may still depend on them.
    """
    # these import transformers and datasets, seconds that a mistyped recipe need not wait for
    from mistral_dist.data import prepared, sources
    from mistral_dist.data.encode import load_encoder
    from mistral_dist.data.feed import has_held_out
    from mistral_dist.data.prepare import prepare

    if recipe.data.streaming:
        sources.check(recipe.data.sources)
        if not has_held_out(recipe.data):
            return None
    if again or prepared.read_manifest(recipe.data_dir) is None:
        sources.check(prepared.prepared_sources(recipe))
        encoder = load_encoder(recipe)
        return prepared.current(recipe, encoder) or prepare(recipe, encoder, track)
    found = prepared.open_prepared(recipe, load_encoder(recipe))
    if prepared.sources_changed(recipe, found):
        say(f"note: source files changed since {found.path} was prepared; `mistral-dist prepare` takes in what is new")
    return found


def training_line(
    recipe: Recipe,
    words: Sequence[str],
    *,
    processes: int | None = None,
    zero: int | None = None,
    offload: bool = False,
    config: Path | None = None,
) -> launcher.Line:
    """The `accelerate launch` line: one process without ZeRO, several under ZeRO-2, unless asked otherwise; `offload` needs ZeRO."""
    if offload and zero is None and config is None:
        zero = 2
    if offload and zero not in (2, 3):
        asked = "" if zero is None else f" with --zero {zero}"
        raise RecipeError(f"--offload{asked}: the optimizer is offloaded under ZeRO-2 and 3 only; add --zero 2 or --zero 3")
    gpus = launcher.visible_gpus()
    if config is not None:
        # the user's own: it decides what is not asked for here, the port between machines included
        stage = _stage(zero, offload)
        join = launcher.join_seconds()
        return launcher.Line(
            config, "mistral_dist.train", tuple(words), processes, stage, free_port=False, join_seconds=join, gpus=gpus > 0
        )
    count = _processes(processes, gpus)
    packs = recipe.train.global_batch_size
    if count > packs:
        remedy = f"use --processes {packs}, or start a new run with a larger global batch"
        raise RecipeError(f"train.global_batch_size={packs}: cannot be shared by {count} processes; {remedy}")
    zero = zero if zero is not None else 2 if count > 1 else 0
    name = "multi_gpu" if zero else "single_gpu" if count == 1 else "data_parallel"
    accelerate = assets.find(f"configs/accelerate/{name}.yaml")
    return launcher.Line(accelerate, "mistral_dist.train", tuple(words), count, _stage(zero, offload), gpus=gpus > 0)


def _stage(zero: int | None, offload: bool) -> Path | None:
    """The DeepSpeed configuration; None without ZeRO."""
    return assets.find(f"configs/deepspeed/zero{zero}{'_offload' if offload else ''}.json") if zero else None


def _announce(line: launcher.Line, run: RunDirectory) -> None:
    say(f"$ {line}", "dim")
    say(f"log: {run.log}", "dim")


def _show_tail(log: Path) -> None:
    """The last lines of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    say("\n".join(f"  {line}" for line in lines[-TAIL:]))


def _since(log: Path, start: int) -> str:
    """What a log holds from a byte on; of much, the end."""
    if not log.is_file():
        return ""
    with open(log, "rb") as stream:
        stream.seek(max(start, log.stat().st_size - 200_000))
        return stream.read().decode("utf-8", "replace")


def _processes(asked: int | None, gpus: int) -> int:
    """All visible GPUs; without any, two processes, so that what runs is what would run on two GPUs."""
    if asked is not None and gpus and asked > gpus:
        raise RecipeError(f"--processes {asked}: only {gpus} GPUs are visible; see CUDA_VISIBLE_DEVICES")
    return asked or gpus or 2


def _ended(run: RunDirectory, code: int, before: dict[str, Any] | None, seconds: float, why: str | None) -> int:
    """Say how the workers ended. Their exit code comes from the status, since Accelerate turns every failure into 1.

    `why`: what launcher and kernel say about it, where the workers could not.
    """
    check_free(run.path)  # of two that start at once, one trains, and the other's workers have been refused
    status = run.status()
    if status is None or status["state"] == "running" or (status == before and code != 0):
        status = _fail(run, why or "the workers ended without a word (killed, or out of memory?)")
    elif status["state"] == "failed" and why is not None and re.match(r"\w+Error: ", status["message"]):
        # a rank that lost another can only say that
        status = _fail(run, why)
    if status["state"] == "failed":
        if status["exit_code"] != FAILED:
            raise TrainingError(status["message"], status["exit_code"])
        _show_tail(run.log)
        raise TrainingError(f"{run.path}: {status['message']}. The last lines of the workers are above, all of them in {run.log}")
    say(f"{run.path}: {status['message']}, after {minutes(seconds)}")
    return FINISHED if status["state"] == "finished" else STOPPED


def _fail(run: RunDirectory, message: str) -> dict[str, Any]:
    try:
        run.set_status("failed", FAILED, message)
    except OSError as error:  # what keeps this from being written has ended the workers, too
        told = describe(error, "how the workers ended", run.path)
        raise MachineError(f"{told}; {remedy(error)} and run the same command again") from error
    return run.status() or {}
