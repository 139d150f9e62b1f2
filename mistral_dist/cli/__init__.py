"""`mistral-dist VERB ...`: before training a verb takes a RECIPE, afterwards a RUN.

words      what the verbs share
before     init fetch prepare preview doctor
during     train status demo
use        evaluate predict report chat export push serve
"""

import sys
import warnings
from typing import Any

import typer

from mistral_dist.cli import before, during, use
from mistral_dist.cli.words import app
from mistral_dist.errors import FAILED, STOPPED, WRONG_INPUT, MistralDistError
from mistral_dist.runtime.process import quiet_libraries

__all__ = ["app", "before", "during", "main", "use"]

MISTYPED: tuple[type[Exception], ...] = (typer.BadParameter.__base__ or typer.BadParameter,)
"""All that typer finds wrong with a command; it is click's UsageError, which typer keeps in a room of its own."""
INTERRUPTED = 130
"""The exit code after Ctrl-C, as a shell gives it."""
NO_PLACE = (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""A path that cannot be written to, or is something else: the user's to mend."""


def _told(error: Any) -> str:
    """A mistyped command in one line, like every other mistake."""
    context = getattr(error, "ctx", None)
    verb = f" {context.info_name}" if context is not None and context.parent is not None else ""
    line = " ".join(error.format_message().split()).rstrip(".")
    return f"error: {line}; see `mistral-dist{verb} --help`"


def main() -> None:
    """The command `mistral-dist`: exits with 0, 1, 2 or 85, never with a traceback for what the user can mend."""
    quiet_libraries()
    warnings.simplefilter("ignore", FutureWarning)  # between the libraries; nothing a user could do about
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except MISTYPED as error:
        print(_told(error), file=sys.stderr)
        sys.exit(WRONG_INPUT)
    except OSError as error:
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(WRONG_INPUT if isinstance(error, NO_PLACE) else FAILED)
    except MistralDistError as error:
        from rich.markup import escape

        from mistral_dist.display import errors

        errors.print(f"{'' if error.exit_code == STOPPED else '[red]error:[/red] '}{escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
