"""Checkpoints in the background: the step loop waits for gather and copy, a thread of rank 0 for the disk.

The thread calls no collective. Of the run it writes the checkpoint's folder; it also looks at the lease, which it may find lost,
and syncs what the steps have appended. Metrics and status are the main thread's to write. One write at a time. A save that fails
ends nothing: it is told once, in one line, and tried again at the next; only the last one of a launch must succeed.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from mistral_dist import checkpoint, config
from mistral_dist.checkpoint import Snapshot
from mistral_dist.errors import CheckpointError, MachineError, MistralDistError, TrainingError
from mistral_dist.files import describe, remedy
from mistral_dist.run import RunDirectory
from mistral_dist.runtime import process


@dataclass(frozen=True)
class Outcome:
    """How a save went."""

    step: int
    waited_seconds: float
    """In which the steps stood still since the save before it was not yet written."""
    gather_seconds: float
    """In which they stood still for gather and copy."""
    write_seconds: float
    """Of the thread, beside the steps."""
    problem: Exception | None = None
    """None where the checkpoint is there; an OSError may pass, anything else must end the run."""
    told: str = ""
    """The problem in one line: what, where, needed and free bytes."""

    def clocks(self) -> dict[str, float]:
        """For the metrics."""
        seconds = {name: round(getattr(self, name), 4) for name in ("waited_seconds", "gather_seconds", "write_seconds")}
        return {"step": self.step, **seconds}


class Saver:
    """The one writer of a run's checkpoints, on rank 0; on other ranks it has nothing to do."""

    def __init__(self, run: RunDirectory, rules: config.Checkpoint, say: Callable[[str], None], reach: int = 0) -> None:
        """`reach`: how many steps a checkpoint must be old to be gone back to (guards.py)."""
        self.step = 0
        """Of the newest checkpoint that is there; 0 for none."""
        self.trouble = ""
        """Why the last save failed; empty where it did not."""
        self._remedy = ""
        self.seconds = 0.0
        """That the last save took, from gather to publishing."""
        self._run = run
        self._rules = rules
        self._say = say
        self._reach = reach
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._waited = 0.0
        self._has_saved = False
        self._clocks: dict[str, float] = {}
        run.closing.callback(self._close)

    def start(self, snapshot: Snapshot, gathered: float, *, in_haste: bool = False) -> None:
        """Begin to write what it took `gathered` seconds to gather, after `newest` has waited for what was written before.

        `in_haste`: no steps go on meanwhile, so there is nothing to give way to.
        """
        assert self._thread is None, "one save at a time"
        # no daemon: a process that ends for another reason finishes what it writes
        self._thread = threading.Thread(target=self._write, args=(snapshot, self._waited, gathered, in_haste), name="saver")
        self._thread.start()

    def is_writing(self) -> bool:
        """Whether a save is on its way to the disk."""
        return self._thread is not None and self._thread.is_alive()

    def settle(self) -> bool:
        """Note how a save went, if one has ended since the last call, and return whether that is so.

        Raises what must end the run: an adapter that is not finite, a run that another process has taken over.
        """
        if self._thread is None or self._thread.is_alive():
            return False
        outcome, self._thread, self._outcome = self._outcome, None, None
        assert outcome is not None, "a writer ends with an outcome"
        if outcome.problem is not None and not isinstance(outcome.problem, OSError):
            raise outcome.problem
        self.trouble, self._clocks = outcome.told, outcome.clocks()
        self.seconds = outcome.gather_seconds + outcome.write_seconds
        if outcome.problem is None:
            self.step, self._has_saved = outcome.step, True
        else:
            self._remedy = remedy(outcome.problem)
            self._say(f"note: {outcome.told}; tried again at the next save")
        return True

    def newest(self) -> int:
        """Wait for what is being written; return the step of the newest checkpoint that is there. Raises as `settle` does."""
        started = time.monotonic()
        self._join()
        self._waited = time.monotonic() - started
        self.settle()
        return self.step

    def finish(self) -> None:
        """Wait for the last save of a launch. Raises MachineError, with the remedy, where it failed; and as `settle` does."""
        self.newest()
        if self.trouble:
            ahead = f"it goes on from checkpoint-{self.step}" if self.step else "it begins anew, since there is no checkpoint"
            raise MachineError(f"{self.trouble}; {self._remedy} and run the same command again: {ahead}")

    def take_clocks(self) -> dict[str, dict[str, float]]:
        """How long the last save took, for the metrics, once; empty until it is known."""
        clocks, self._clocks = self._clocks, {}
        return {"save": clocks} if clocks else {}

    def _close(self) -> None:
        """Wait for what is being written; what is told of the run's end then names it."""
        with suppress(Exception):  # the run ends anyway, and for another reason
            self.newest()
        if self._has_saved:
            self._run.saved = self.step

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _write(self, snapshot: Snapshot, waited: float, gathered: float, in_haste: bool) -> None:
        started, step, told = time.monotonic(), snapshot.progress.step, ""
        problem: Exception | None = TrainingError(f"{self._run.path}: the writer of checkpoint-{step} ended without a word")
        if not in_haste:
            with suppress(OSError):  # where that is forbidden, the writer competes with the steps
                process.give_way()
        try:
            self._run.check_publishing()
            # a checkpoint claims that its steps were made: their lines come first
            self._run.sync()
            checkpoint.save(self._run.checkpoints, snapshot, self._rules, self._run.check_publishing, self._reach)
            problem = None
        except OSError as error:
            problem = error
            told = describe(error, f"checkpoint-{step}", self._run.path, snapshot.bytes)
        except CheckpointError as error:
            problem = CheckpointError(f"{self._run.path}: checkpoint-{step} was not saved: {error}")
        except MistralDistError as error:
            problem = error
        except Exception as error:
            problem = TrainingError(f"{type(error).__name__}: {error}")
        finally:
            self._outcome = Outcome(step, waited, gathered, time.monotonic() - started, problem, told)
