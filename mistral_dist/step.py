"""What one step showed."""

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 8
"""Examples that the log names where a step was not trained."""


@dataclass(frozen=True)
class StepResult:
    """What one step showed, the same on every rank."""

    loss: float | None
    """Mean over the global batch's targets, nats per token, before the update; None where the step was not trained."""
    grad_norm: float | None
    """Global L2 norm before clipping; None where the step was not trained."""
    learning_rate: float
    untrained: str = ""
    """Why the step was not trained."""
    suspects: tuple[str, ...] = ()
    """The ids of this rank's examples in it that are to blame, as far as can be told."""


def told_untrained(because: str, suspects: Sequence[str]) -> str:
    """Why a step was not trained, in words."""
    named = f"; among {', '.join(suspects[:SHOWN])}{' ...' if len(suspects) > SHOWN else ''}" if suspects else ""
    return f"not trained: {because}{named}"
