"""How a run in training ends: its result, and what its status says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mistral_dist import checkpoint
from mistral_dist.card import model_card
from mistral_dist.checkpoint import Tensors
from mistral_dist.errors import FINISHED, MachineError
from mistral_dist.files import describe, remedy, sweep
from mistral_dist.run import RunDirectory
from mistral_dist.session import Session, name_of


def publish(session: Session, tokenizer: Any) -> str:
    """Write the result: adapter, tokenizer, model card; return in words which adapter it is, where validations have chosen it.

    Raises MachineError where it cannot be written.
    """
    run, last = session.run, session.runtime.gather_adapter()

    def write() -> str:
        with _with_remedy(run, "the adapter", sum(tensor.nbytes for tensor in last.values())):
            run.check_publishing()
            sweep(run.path)
            step, adapter = _chosen(session, last)
            card = model_card(session.recipe, session.feed.about, step)
            checkpoint.publish_adapter(run.adapter, adapter, session.adapter_config(), tokenizer, card)
        return _which(session, step)

    return session.runtime.on_main(write)


@contextmanager
def _with_remedy(run: RunDirectory, what: str, needed: int | None = None) -> Iterator[None]:
    """Raise MachineError, which says what to do, for a run directory that cannot be written. All is trained, and in a checkpoint."""
    try:
        yield
    except OSError as error:
        told = describe(error, what, run.path, needed)
        raise MachineError(f"{told}; {remedy(error)} and run the same command again: nothing is trained anew") from error


def _chosen(session: Session, last: Tensors) -> tuple[int, Tensors]:
    """The step whose adapter is the result, and that adapter."""
    best, step = session.progress.validation.best_step, session.progress.step
    if not session.recipe.train.load_best_model_at_end or best in (0, step):
        return step, last
    found = checkpoint.best_good(session.run.checkpoints, best)
    if found is None:
        return step, last
    return checkpoint.load_progress(found)[0].step, checkpoint.adapter_of(found, last)


def _which(session: Session, step: int) -> str:
    validation = session.progress.validation
    if not session.recipe.train.load_best_model_at_end or validation.best is None:
        return ""
    best = f"the best validation (loss {validation.best:.4f})"
    if step == validation.best_step:
        return f"the adapter is that of step {step}, {best}"
    return f"the adapter is that of step {step}, since no whole checkpoint is left of step {validation.best_step}, {best}"


def end(session: Session, code: int, more: str = "") -> int:
    """Note how the run ended, FINISHED or STOPPED (there is a checkpoint in either case); return the code.

    Raises MachineError where that cannot be written.

    `more`, in words: of a run that is stopped, by what or on whose request; of one that is finished, which adapter it has published.
    """
    step, steps = session.progress.step, session.steps

    def note() -> None:
        with _with_remedy(session.run, "how the run ended"):
            write()

    def write() -> None:
        session.run.check_publishing()
        session.run.sync()
        told = [f"at step {step} of {steps}"]
        quarantine = session.run.path / "quarantine.jsonl"
        if quarantine.is_file():
            with open(quarantine, encoding="utf-8") as lines:
                told.append(f"{sum(1 for _ in lines):,} rows of the stream were left out, see {quarantine}")
        progress = {"step": step, "checkpoint": name_of(session.saver.step)}
        if code == FINISHED:
            if step < steps:
                told[0] = f"early {told[0]}, after {session.progress.validation.stale} validations in a row that did not improve"
            told += [more] if more else []
            session.run.set_status("finished", code, f"finished {'; '.join(told)}", **progress)
        else:
            session.run.set_status("stopped", code, f"stopped {more} {'; '.join(told)}; run the same command to go on", **progress)

    session.runtime.on_main(note)
    return code
