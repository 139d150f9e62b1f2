"""The forms in which a tuned model can leave its run, and the files by which such a folder is known."""

from enum import StrEnum
from pathlib import Path

from mistral_dist.errors import RecipeError

FACTS = "export.json"
"""What was written, for programs: form, base, task, tokenizer, and how like the live adapter each form is."""
SUMS = "SHA256SUMS"
"""Of all other files; `sha256sum --check SHA256SUMS` reads it."""


def sums_of(folder: Path) -> dict[str, str] | None:
    """The SHA-256 of each file that an export has written, by name; None where no export lies there."""
    if not (folder / SUMS).is_file():
        return None
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


class Form(StrEnum):
    """What is written. `ADAPTER` is a small folder of PEFT's; the others are whole models."""

    ADAPTER = "adapter"
    BF16 = "merged-bf16"
    NF4 = "merged-nf4"


MEANS = {
    Form.ADAPTER: "the adapter alone, on the base as it was published",
    Form.BF16: "the adapter merged into the base as it was published",
    Form.NF4: "the adapter merged into the weights that the 4-bit base means, with which it was trained",
}


def forms_of(quantization: str) -> tuple[Form, ...]:
    """Those that a run has: without quantisation there is one base."""
    return tuple(Form) if quantization == "nf4" else (Form.ADAPTER, Form.BF16)


def form_named(name: str) -> Form | None:
    """A form by its name; None for `best`. Raises RecipeError for another name."""
    if name == "best":
        return None
    try:
        return Form(name)
    except ValueError:
        raise RecipeError(f"--form {name}: there are {', '.join(Form)} and best") from None
