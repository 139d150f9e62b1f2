"""What the loss on the validation examples has shown so far: which was the best, and when it is enough.

All here is pure: what to do follows from the losses of the validations, which every rank knows and every checkpoint holds. So a run
that was killed decides as one that was not.
"""

import math
from dataclasses import dataclass
from typing import Any

from mistral_dist.config import Train


@dataclass(frozen=True)
class Measured:
    """What one validation showed, the same on every rank."""

    loss: float
    """Mean over all target tokens of the validation examples, nats per token: not weighted, not smoothed."""
    targets: int
    examples: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is no number that a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def metrics(self) -> dict[str, Any]:
        """For the metrics; what is not finite, which JSON does not know, is null."""
        values = {"loss": self.loss, "perplexity": self.perplexity}
        counts = {"targets": self.targets, "examples": self.examples, "seconds": round(self.seconds, 4)}
        return {**{name: value if math.isfinite(value) else None for name, value in values.items()}, **counts}


@dataclass(frozen=True)
class Validation:
    """What a run remembers of its validations. Immutable; a checkpoint holds it."""

    step: int = 0
    """At which the last one was; 0 before the first."""
    updates: int = 0
    """Updates of the adapter that had been made then."""
    loss: float | None = None
    """What it showed; None where that was not finite."""
    best: float | None = None
    """The lowest loss so far; None before there is one that is finite."""
    best_step: int = 0
    """Where that was; of equal ones the first. 0 where there is none."""
    stale: int = 0
    """Validations in a row, up to the last, that did not improve on the best before them by more than the threshold."""

    def is_due(self, step: int, updates: int, steps: int, train: Train) -> bool:
        """Whether there must be one after a step, of so many steps of the run.

        Where the adapter is still the one of the last validation, since steps were passed over, there is nothing new to see.
        """
        if train.eval_steps is None or updates <= self.updates:
            return False
        return step % train.eval_steps == 0 or step >= steps

    def after(self, step: int, updates: int, loss: float, train: Train) -> "Validation":
        """After another validation. As in Trainer any lower loss is the best, and one lower by more than the threshold an improvement."""
        found = loss if math.isfinite(loss) else None
        below = 0.0 if found is None else math.inf if self.best is None else self.best - found
        stale = 0 if below > train.early_stopping_threshold else self.stale + 1
        best, best_step = (found, step) if below > 0 else (self.best, self.best_step)
        return Validation(step, updates, found, best, best_step, stale)

    def is_enough(self, train: Train) -> bool:
        """Whether the run ends here, however many steps were planned."""
        return train.early_stopping_patience is not None and self.stale >= train.early_stopping_patience

    def loss_at(self, step: int) -> float | None:
        """What the validation at a step showed; None where the last one was elsewhere, or showed nothing finite."""
        return self.loss if step == self.step else None

    def told(self) -> str:
        """The last one, in words, and the best where that is another."""
        last = "validation loss is not finite" if self.loss is None else f"validation loss {self.loss:.4f}"
        if self.best is None or self.best_step == self.step:
            return last
        return f"{last}, best {self.best:.4f} at step {self.best_step}"
