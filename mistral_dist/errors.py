"""What can go wrong, as a tree; each branch knows the exit code that it ends a command with.

    MistralDistError            1   anything that is nobody's typing mistake
    ├── UserError               2   the user can mend it; the message says where and how
    │   ├── RecipeError             a recipe or an override: unknown key, wrong type, bad combination
    │   ├── DataError               a source, an example, a split, the prepared data
    │   ├── ModelError              a base model or tokenizer: not here, gated, not supported
    │   ├── MachineError            this machine cannot do what the recipe asks
    │   └── RunError                a run directory: changed recipe, another writer, nothing to continue
    ├── CheckpointError         1   a checkpoint or adapter failed its checks
    └── TrainingError           1   training itself went wrong (a dead worker, a loss that is no number)

A message is one line: the place, the value, the remedy.
"""

FINISHED = 0
FAILED = 1
WRONG_INPUT = 2
STOPPED = 85
"""Stopped on request, with a checkpoint: run the same command again to go on."""


class MistralDistError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = FAILED


class UserError(MistralDistError):
    """Something that the user typed, wrote or set up is wrong, and the message says what to do."""

    exit_code = WRONG_INPUT


class RecipeError(UserError):
    """The recipe or an override is wrong."""


class DataError(UserError):
    """The data are wrong, empty, missing, or not prepared."""


class ModelError(UserError):
    """The base model or its tokenizer cannot be had or cannot be used."""


class MachineError(UserError):
    """The machine cannot do what the recipe asks for."""


class RunError(UserError):
    """The run directory does not allow what was asked."""


class CheckpointError(MistralDistError):
    """A checkpoint or adapter is damaged or would be."""


class TrainingError(MistralDistError):
    """Training or evaluation failed; with `exit_code`, for the reason that a worker gave."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopAgreed(Exception):
    """No error: all ranks have agreed to save and leave, here. The message says by what or on whose request."""
