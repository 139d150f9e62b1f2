"""What the verbs share: the application, and the arguments that several of them take."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="mistral-dist",
    help="Fine-tune Mistral-7B with QLoRA on any machines: one run, the same result.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


class Split(StrEnum):
    """The parts of prepared data."""

    train = "train"
    validation = "validation"
    test = "test"


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. configs/recipes/demo.yaml")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/demo")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.field=value ...]", help="Overrides of the recipe")]
Processes = Annotated[
    int | None, typer.Option("--processes", min=1, help="How many on each machine; default: all visible GPUs, or 2 CPU processes")
]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="How many on each machine, and refused where fewer are visible")]
