"""What to do when a step's loss is not what it should be: leave the step out, or go back and pass over the trouble.

Two things go wrong in a run that went well so far. A loss or gradient is not finite: the step's update is left out. Or the
loss jumps and stays up. When either happens several times in a row, the adapter itself is suspect: the run goes back to a
checkpoint from before the trouble and passes over the steps that led to it, as PaLM's training did by hand (arXiv
2204.02311, section 5.1). Each step keeps its number, its data and its learning rate; a step that is passed over is not trained,
and no other takes its place. So the order of the data stays a pure function of the seed and the step.

All here is pure: what to do follows from the losses so far, which every rank knows and every checkpoint holds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

from mistral_dist.config import Train

HISTORY = 50
"""Trained steps whose scatter a loss is compared with."""
RECENT = 20
"""The last of them, whose median it is compared with: a loss falls as a run goes on."""
PATIENCE = 5
"""Steps in a row whose loss is far up before the run goes back: one hard batch is no trouble. As many steps before them are passed over
too, since a loss is measured before the update that spoils it shows."""
ROBUST = 1.4826
"""Median absolute deviations in a standard deviation, where it is normal."""
LEAST = 0.05
"""Of the median: the least deviation that is believed, so that losses that hardly vary raise no alarm."""


@dataclass(frozen=True)
class Trouble:
    """Why a run has to go back, and what it passes over then."""

    first: int
    """The first of the steps to pass over, from 1."""
    last: int
    because: str


@dataclass(frozen=True)
class Guard:
    """What the guards remember of a run. Immutable; a checkpoint holds it."""

    losses: tuple[float, ...] = ()
    """Of the last `HISTORY + PATIENCE` trained steps, oldest first, in nats per target."""
    refused: int = 0
    """Steps in a row, up to this one, whose gradient was not finite."""
    untrained: tuple[int, ...] = ()
    """The steps so far, from 1, that changed nothing: not finite, or passed over."""
    windows: tuple[tuple[int, int], ...] = ()
    """(first, last) of the steps that are passed over: one pair for each time that the run went back."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Guard":
        """The guard that `dataclasses.asdict` and JSON have made of one."""
        tuples = {name: tuple(content[name]) for name in ("losses", "untrained")}
        return cls(**tuples, refused=content["refused"], windows=tuple((first, last) for first, last in content["windows"]))

    def passes_over(self, step: int) -> bool:
        """Whether a step is not to be trained."""
        return any(first <= step <= last for first, last in self.windows)

    def after(self, step: int, loss: float | None) -> "Guard":
        """After a step that was trained, or that was not (`None`: its loss or gradient was not finite)."""
        if loss is None:
            return replace(self, refused=self.refused + 1, untrained=(*self.untrained, step))
        return replace(self, refused=0, losses=(*self.losses, loss)[-HISTORY - PATIENCE :])

    def after_passing(self, step: int) -> "Guard":
        """After a step that was passed over."""
        return replace(self, refused=0, untrained=(*self.untrained, step))

    def after_going_back(self, saved: "Guard", trouble: Trouble) -> "Guard":
        """The guard that a checkpoint holds, which now knows all that is passed over, however far back it lies."""
        return replace(saved, windows=(*self.windows, (trouble.first, trouble.last)))

    def trouble(self, step: int, train: Train) -> Trouble | None:
        """Whether the run has to go back after this step, and why."""
        if self.refused >= train.max_skipped_steps:
            because = f"the loss or the gradient was not finite in {self.refused} steps in a row"
            return Trouble(self.back(step, PATIENCE) + 1, step, because)
        if train.spike_threshold is None or self.refused or len(self.losses) < HISTORY + PATIENCE:
            return None
        before, now = self.losses[:HISTORY], self.losses[-PATIENCE:]
        usual, spread = center_and_spread(before)
        if min(now) <= usual + train.spike_threshold * spread:
            return None
        because = f"the loss was {min(now):.3g} or more in {PATIENCE} steps in a row, after {usual:.3g} (median of {RECENT} steps)"
        return Trouble(self.back(step, 2 * PATIENCE) + 1, step, because)

    def back(self, step: int, trained: int) -> int:
        """The step after which so many steps were trained up to this one; 0 where there are fewer.

        What changed nothing does not count: going back by that would bring back the adapter that is suspect.
        """
        while step > 0 and trained > 0:
            trained -= step not in self.untrained
            step -= 1
        return step


def reach(train: Train) -> int:
    """Trained steps between the one that shows the trouble and the newest checkpoint to go back to; 0 where the run never goes back."""
    if train.max_rewinds == 0:
        return 0
    return PATIENCE + max(train.max_skipped_steps, PATIENCE if train.spike_threshold is not None else 0)


def center_and_spread(losses: tuple[float, ...]) -> tuple[float, float]:
    """Median of the recent losses, and standard deviation of all; a few outliers move neither, a steady fall not the second.

    The deviation is that of the differences between neighbours, by its median (Huber, Robust Statistics, 1981, section 5.1).
    """
    center = median(losses[-RECENT:])
    spread = ROBUST * median(abs(after - before) for before, after in pairwise(losses)) / math.sqrt(2)
    return center, max(spread, LEAST * abs(center))
