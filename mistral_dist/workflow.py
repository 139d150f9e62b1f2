"""What the verbs do, step by step: check everything that can be checked, prepare, launch, read how it ended.

Whatever the user can mend is found here, before workers start and a model is loaded.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mistral_dist import base_cache
from mistral_dist.config import Recipe
from mistral_dist.display import answering, following, minutes, say, track
from mistral_dist.errors import FAILED, FINISHED, STOPPED, MachineError, RunError, TrainingError
from mistral_dist.files import describe, read_json, remedy
from mistral_dist.hub import earlier_adapter, local_path
from mistral_dist.run import STARTING, RunDirectory, check_free, check_same, check_writable, holder, move_aside, wait_until_free
from mistral_dist.runtime import launcher, slurm
from mistral_dist.runtime.causes import cause, memory_kills, refused, seen_from_here
from mistral_dist.runtime.trackers import check_trackers
from mistral_dist.topology import ANY, Topology, check_options, evaluation_line, training_line

NOT_ANEW = "not {}, which would begin anew each time it is started again; set run.dir=... for a new run, or move the old one away yourself"
TOO_SOON = "stopped before its workers had begun"
TAIL = 15
"""Lines of the log that are shown where workers died without a word of ours."""


def start_training(
    recipe: Recipe,
    words: Sequence[str],
    asked: Topology = ANY,
    *,
    fresh: bool = False,
    module: str = "mistral_dist.train",
) -> int:
    """Train a recipe, or go on with it, or say that it is done; return the exit code.

    `words` are the recipe's path and the overrides, as the workers will read them; `module` is what they run.
    """
    started = time.monotonic()
    run = RunDirectory(recipe.run_dir)
    if fresh:
        refuse_fresh(asked)
    line = training_line(recipe, words, asked, module)
    check_writable(run.path)
    wait_until_free(run.path, say)
    status = None if fresh else run.status()
    if _is_finished(recipe, run, status):
        return FINISHED
    _look_ahead(recipe, run)
    prepare_for_training(recipe, elsewhere=asked.nodes is not None)
    if fresh:  # only now, when nothing speaks against the new run
        old = move_aside(run.path)
        if old is not None:
            say(f"the old run is now {old}")
    base_cache.ensure_ahead(recipe.model, "cuda" if line.gpus else "cpu", say)
    log = run.log_of(asked.nodes)
    _announce(line, log)
    launched = time.monotonic()
    before = log.stat().st_size if log.is_file() else 0
    kills = memory_kills()
    code = _launch(run, line, log, started)
    if code == STOPPED:
        say(f"{run.path}: {TOO_SOON}; run the same command to go on")
        return STOPPED
    said = _since(log, before) if code != FINISHED else ""
    if refused(said):  # of two that start at once, one trains: how that run goes is not for this process to write down
        raise RunError(refused(said))
    why = cause(said, memory_kills() - kills) if code != FINISHED else None
    return _ended(run, log, code, status, time.monotonic() - launched, why, seen_from_here(said))


def _launch(run: RunDirectory, line: launcher.Line, log: Path, started: float) -> int:
    """Have the workers started, and stay with them to their end. On node 0, which writes, the status says that they are on their way."""
    if log != run.log:
        return launcher.run(line, log, lambda: None, say, started)
    with suppress(OSError):  # a full disk is the workers' to tell
        run.set_status("running", None, STARTING, job=slurm.job())
    with following(run) as tick:
        code = launcher.run(line, log, tick, say, started)
    if code == STOPPED:
        run.set_status("stopped", STOPPED, TOO_SOON)
    return code


def check_training(recipe: Recipe, asked: Topology = ANY, *, fresh: bool = False) -> None:
    """Look at all that can be looked at before a machine is asked for: options, run directory, data, base. Raises UserError."""
    if fresh:
        raise RunError(f"--fresh: {NOT_ANEW.format('in a job')}")
    check_options(asked)
    run = RunDirectory(recipe.run_dir)
    check_writable(run.path)
    wait_until_free(run.path, say)
    if _is_finished(recipe, run, run.status()):
        raise RunError(f"{run.path}: is finished, so there is nothing to start a job for")
    local_path(recipe.model)
    _look_ahead(recipe, run)
    prepare_for_training(recipe, elsewhere=True)


def _look_ahead(recipe: Recipe, run: RunDirectory) -> None:
    """What the workers would otherwise find missing, after a minute: a tracker, the adapter to begin with. Raises UserError."""
    check_trackers(recipe.log.trackers)
    if not any(run.checkpoints.glob("checkpoint-*")):  # a run that goes on has its own
        earlier_adapter(recipe)


def _is_finished(recipe: Recipe, run: RunDirectory, status: dict[str, Any] | None) -> bool:
    """Whether there is nothing left to do, which is said. Raises RunError where the run began with another recipe."""
    if status is None or not (run.path / "recipe.yaml").is_file():
        return False
    check_same(recipe, run.recipe(), run.path)
    if status["state"] == "finished":
        say(f"{run.path}: {status['message']}; nothing to do. Another run: run.dir=..., or --fresh")
    return bool(status["state"] == "finished")


def prepare_for_training(recipe: Recipe, elsewhere: bool) -> None:
    """As `prepare_if_needed`; also raises DataError where the recipe validates and nothing is held out for it."""
    prepared = prepare_if_needed(recipe, elsewhere=elsewhere)
    if prepared is not None:
        from mistral_dist.data.feed import refuse_unvalidated

        refuse_unvalidated(recipe, prepared)


def refuse_fresh(asked: Topology) -> None:
    """Raise RunError where --fresh would do harm: in a job that may be requeued, or on several nodes at once."""
    if slurm.job() or asked.nodes:
        raise RunError(f"--fresh: {NOT_ANEW.format('in a SLURM job' if slurm.job() else 'on several nodes')}")


def start_evaluation(run: RunDirectory, words: Sequence[str] = (), asked: Topology = ANY) -> dict[str, Any]:
    """Evaluate a finished run; return what test.json holds. Raises TrainingError with the reason where it failed."""
    folder = run.path / "evaluation"
    _have_answered(run, evaluation_line(run.path, words, asked), folder, "evaluating base and tuned")
    result = read_json(folder / "test.json")
    assert result is not None
    return result


def start_prediction(run: RunDirectory, file: str, out: Path, words: Sequence[str] = (), asked: Topology = ANY) -> tuple[int, list[str]]:
    """Have the tuned model answer each row of a file, into `out`; how many were answered, and why the others were not.

    Raises RunError where `out` is there already, MachineError where it cannot be written, TrainingError with the reason where it failed.
    """
    from mistral_dist.predict import unfinished_of

    if out.exists():
        raise RunError(f"--out: {out} is there already; name another file, or remove it")
    folder = unfinished_of(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"--out: {describe(error, out.name, out.parent)}; {remedy(error)} or name another file") from None
    _have_answered(run, evaluation_line(run.path, [file, str(out), *words], asked, "mistral_dist.predict"), folder, "answering")
    shutil.rmtree(folder, ignore_errors=True)
    with open(out, encoding="utf-8") as lines:
        errors = [json.loads(line).get("error") for line in lines]
    return errors.count(None), [error for error in errors if error is not None]


def _have_answered(run: RunDirectory, line: launcher.Line, folder: Path, doing: str) -> None:
    """Start workers that keep in a folder how far they are, and why they failed. Raises TrainingError where they do not finish."""
    with _alone(folder, doing):
        _announce(line, run.log)
        before = run.log.stat().st_size if run.log.is_file() else 0
        (folder / "failure.json").unlink(missing_ok=True)
        with answering(folder, doing) as tick:
            code = launcher.run(line, run.log, tick, say)
    failure = read_json(folder / "failure.json")
    if failure is not None:
        raise TrainingError(failure["message"], failure["exit_code"])
    if code == STOPPED:
        raise TrainingError(f"stopped while {doing}; what was found is kept: run the same command to go on", STOPPED)
    if code != 0:
        _show_tail(_since(run.log, before))
        raise TrainingError(f"{run.path}: ended while {doing}; its last words are above, all of them in {run.log}; run it again to go on")


@contextmanager
def _alone(folder: Path, doing: str) -> Iterator[None]:
    """Be the only one of this machine that works in a folder. Raises RunError where another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            try:
                yield
            finally:
                for leftover in ("progress.json", ".lock"):
                    (folder / leftover).unlink(missing_ok=True)
    except Timeout:
        raise RunError(f"{folder}: another process is {doing} there; wait for it, or stop it") from None


def prepare_if_needed(recipe: Recipe, *, again: bool = False, elsewhere: bool = False) -> Any:
    """The recipe's prepared data, made now where there are none; only with `again` is a data directory ever replaced.

    None where the recipe streams and holds nothing out: then there is nothing to prepare. Raises DataError where there are
    some of another recipe: a run may still depend on them; with `elsewhere`, also where there are none: several nodes would
    each make them.
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
    if again or (prepared.read_manifest(recipe.data_dir) is None and not elsewhere):
        sources.check(prepared.prepared_sources(recipe))
        encoder = load_encoder(recipe)
        return prepared.current(recipe, encoder) or prepare(recipe, encoder, track)
    found = prepared.open_prepared(recipe, load_encoder(recipe))
    if prepared.sources_changed(recipe, found):
        say(f"note: source files changed since {found.path} was prepared; `mistral-dist prepare` takes in what is new")
    return found


def _announce(line: launcher.Line, log: Path) -> None:
    if line.nodes is not None:
        say(str(line.nodes))
    say(f"$ {line}", "dim")
    say(f"log: {log}", "dim")


def _show_tail(log: str) -> None:
    """The last lines of a log."""
    say("\n".join(f"  {line}" for line in log.splitlines()[-TAIL:]))


def _since(log: Path, start: int) -> str:
    """What a log holds from a byte on; of much, the end."""
    if not log.is_file():
        return ""
    with open(log, "rb") as stream:
        stream.seek(max(start, log.stat().st_size - 200_000))
        return stream.read().decode("utf-8", "replace")


def _ended(
    run: RunDirectory, log: Path, code: int, before: dict[str, Any] | None, seconds: float, why: str | None, seen: str | None = None
) -> int:
    """Say how the workers ended. Their exit code comes from the status, since Accelerate turns every failure into 1.

    `why`: what launcher and kernel say about it, where the workers could not; `seen`: what the watch of this node's ranks has seen,
    which is told beside what another node may have noted before.
    """
    if log == run.log:
        check_free(run.path)  # of two that start at once, one trains, and the other's workers have been refused
    elif seen is None:  # what was seen here has been noted
        _wait_for_first(run, before)
    status = run.status()
    if status is None or status["state"] == "running" or (status == before and code != 0):
        status = _fail(run, why or "the workers ended without a word (killed, or out of memory?)")
    elif status["state"] == "failed" and why is not None and re.match(r"\w+Error: ", status["message"]):
        # a rank that lost another can only say that
        status = _fail(run, why)
    if status["state"] == "failed":
        if status["exit_code"] != FAILED:
            raise TrainingError(status["message"], status["exit_code"])
        _show_tail(_since(log, 0))
        told = status["message"] if seen is None or seen in status["message"] else f"{status['message']}. Seen from this node: {seen}"
        raise TrainingError(f"{run.path}: {told}. The last lines of the workers are above, all of them in {log}")
    say(f"{run.path}: {status['message']}, after {minutes(seconds)}")
    return FINISHED if status["state"] == "finished" else STOPPED


def _wait_for_first(run: RunDirectory, before: dict[str, Any] | None) -> None:
    """On another node than the first: give that, which writes, a moment to say how the run ended. `before`: what was said before it."""
    end = time.monotonic() + launcher.GRACE
    while (holder(run.path) is not None or _is_going_on(run.status(), before)) and time.monotonic() < end:
        time.sleep(0.5)


def _is_going_on(status: dict[str, Any] | None, before: dict[str, Any] | None) -> bool:
    """Whether nothing tells yet how this launch ended. `before`: what was said before it."""
    return status is None or status["state"] == "running" or status == before


def _fail(run: RunDirectory, message: str) -> dict[str, Any]:
    try:
        run.set_status("failed", FAILED, message)
    except OSError as error:  # what keeps this from being written has ended the workers, too
        told = describe(error, "how the workers ended", run.path)
        raise MachineError(f"{told}; {remedy(error)} and run the same command again") from error
    return run.status() or {}
