"""A rank's way into a run directory, and out of it: hold it, and note how it ended."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from mistral_dist.config import Recipe
from mistral_dist.errors import FAILED, STOPPED, MachineError, MistralDistError, RunError, StopAgreed
from mistral_dist.run import Lease, RunDirectory
from mistral_dist.runtime.engine import Runtime


@contextmanager
def open_run(recipe: Recipe, runtime: Runtime) -> Iterator[RunDirectory]:
    """The run directory, held by this group of ranks alone.

    Raises RunError where another process writes there, or where the run began with another recipe.
    """
    run = RunDirectory(recipe.run_dir)
    before = _status(run)  # before any rank of this launch may fail: there is a collective behind
    with ExitStack() as held:

        def take() -> str:
            try:
                lease = held.enter_context(Lease(run))
            except MachineError as error:  # where another holds the run, nothing is written
                note_failure(run, error)
                raise
            held.enter_context(run.closing)
            return lease.token

        run.token = runtime.on_main(take)
        try:
            runtime.on_main(lambda: run.begin(recipe))
            runtime.watch(
                recipe.train.stall_seconds,
                stacks=run.path / "stacks",
                report=lambda message: _note_watch(run, message, before),
                say=lambda line: print(line, flush=True),
            )
            yield run
        except Exception as error:
            # while the lease is still held
            run.closing.close()
            told = runtime.explain(error)
            note_failure(run, told)
            if told is error:
                raise
            raise told from error


def _note_watch(run: RunDirectory, message: str, before: dict[str, Any] | None) -> None:
    """Write what the watch has found into the status, unless a rank of this launch has noted how it ended: that says more.

    `before`: the status that this launch found, which stands there until the training begins.
    """
    now = _status(run)
    is_noted = now is not None and now != before and now["state"] != "running"
    if not is_noted and (now or {}).get("state") != "finished":
        run.set_status("failed", FAILED, message)


def _status(run: RunDirectory) -> dict[str, Any] | None:
    with suppress(OSError, RunError):  # a damaged one says nothing
        return run.status()
    return None


def end_before_start(runtime: Runtime, run: RunDirectory, asked: StopAgreed) -> int:
    """Note that the ranks agreed to stop while they were loading: the run is as it was. Return STOPPED."""
    more = ", with more seconds" if "max_seconds" in str(asked) else ""
    message = f"stopped {asked} while loading, before a step was made; run the same command to go on{more}"

    def note() -> None:
        found = (run.status() or {}).get("checkpoint")
        run.set_status("stopped", STOPPED, message, step=int(found.rpartition("-")[2]) if found else 0)

    runtime.on_main(note)
    return STOPPED


def note_failure(run: RunDirectory, error: Exception) -> None:
    """Write the reason into the status. Any rank may fail first; what says more about the cause is kept. A finished run stays so."""
    known = isinstance(error, MistralDistError)
    with suppress(OSError, RunError):  # a full disk or a damaged status must not hide what went wrong
        before = run.status() or {}
        is_told = not known and before.get("state") == "failed"
        if before.get("state") == "finished" or (is_told and not run.saved):
            return
        code = error.exit_code if isinstance(error, MistralDistError) else FAILED
        message = str(error) if known else f"{type(error).__name__}: {error}".splitlines()[0]
        if is_told:
            code, message = before["exit_code"], before["message"]
        step = max(before.get("step") or 0, run.saved)
        run.set_status("failed", code, message, **({"step": step, "checkpoint": f"checkpoint-{run.saved}"} if run.saved else {}))
