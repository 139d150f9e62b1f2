"""A finished run -> a folder that can be served, and whether it is the model that was trained.

The live adapter (4-bit base with the adapter on it) is asked first, then each form, one model at a time in memory. The folder is written
aside and appears when it is whole.
"""

import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from mistral_dist.base import Checkpoint, compute_dtype, open_checkpoint
from mistral_dist.card import origin
from mistral_dist.config import Model, Recipe
from mistral_dist.data.encode import Encoder, load_encoder
from mistral_dist.data.feed import has_held_out
from mistral_dist.data.prepared import open_prepared
from mistral_dist.data.split import VALIDATION
from mistral_dist.errors import CheckpointError, DataError, MachineError, ModelError, RecipeError, RunError
from mistral_dist.export import folder
from mistral_dist.export.folder import Likenesses
from mistral_dist.export.forms import Form, forms_of
from mistral_dist.export.likeness import Likeness, Questions, Said
from mistral_dist.export.merge import Update, write_merged
from mistral_dist.files import aside_of, asides_of, describe, publish, read_json, remedy, remove
from mistral_dist.hub import free_bytes
from mistral_dist.model import load_tuned
from mistral_dist.run import RunDirectory

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What is asked for."""

    form: Form | None = None
    """None: the one that is most like the live adapter."""
    tolerance: float = 0.1
    """The mean KL, in nats, above which a form is refused."""
    compare: bool = True
    """Whether to load live adapter and form at all, which takes the memory of a whole model."""


def export(run: RunDirectory, recipe: Recipe, out: Path, wish: Wish, tell: Tell) -> tuple[Form, list[tuple[str, ...]]]:
    """Write a form of a finished run's model into the folder `out`, which must not be there.

    Returns which, and a table of what was measured, head first; empty where nothing was.

    `tell` hears what is being done. Raises UserError for what can be mended, CheckpointError for a form that is not the model that was
    trained, MachineError, with the bytes that are needed and free, where the folder cannot be written.
    """
    forms = _check(recipe, out, wish)
    work = _Work.of(run, recipe, wish, tell)
    for leftover in asides_of(out):
        remove(leftover)
    written = {form: aside_of(out) for form in forms}
    try:
        likenesses = work.make(written, compare=wish.compare)
        form = min(likenesses, key=lambda form: likenesses[form].kl) if wish.form is None else wish.form
        if wish.compare:
            _refuse_another(form, likenesses[form], wish.tolerance)
        with _room(out):
            folder.write_card(recipe, form, likenesses, work.facts(), written[form])
            folder.write_sums(written[form])
            publish(written[form], out)
    finally:
        for aside in written.values():
            shutil.rmtree(aside, ignore_errors=True)
    return form, folder.rows(likenesses)


def _check(recipe: Recipe, out: Path, wish: Wish) -> tuple[Form, ...]:
    """The forms to make. All that can be looked at before a model is loaded."""
    forms = forms_of(recipe.model.quantization)
    if wish.form is not None and wish.form not in forms:
        raise RecipeError(f"--form {wish.form}: this run's base was not quantized (model.quantization=none); use one of {', '.join(forms)}")
    if wish.form is None and not wish.compare:
        raise RecipeError("--no-compare: chooses nothing; name the form with --form as well")
    if out.exists():
        raise RunError(f"{out}: is there already; choose another folder, or move it away")
    return forms if wish.form is None else (wish.form,)


@dataclass
class _Work:
    """One export."""

    run: RunDirectory
    recipe: Recipe
    encoder: Encoder
    questions: Questions
    device: torch.device
    tell: Tell

    @classmethod
    def of(cls, run: RunDirectory, recipe: Recipe, wish: Wish, tell: Tell) -> "_Work":
        encoder = load_encoder(recipe)
        questions = Questions(recipe, encoder, _validation(recipe, encoder) if wish.compare else [])
        if wish.compare and not len(questions):
            raise DataError("data.validation_fraction: no validation examples to compare with; --no-compare writes a form all the same")
        return cls(run, recipe, encoder, questions, torch.device("cuda" if torch.cuda.is_available() else "cpu"), tell)

    def make(self, written: dict[Form, Path], *, compare: bool) -> Likenesses:
        """Write each form into its folder, and measure it."""
        live = self._ask("the live adapter", self._live) if compare else None
        likenesses = {}
        for form, aside in written.items():
            with _room(aside):
                self._write(form, aside)
            if live is not None:
                said = self._ask(form, partial(self._loaded, form, aside))
                likenesses[form] = self.questions.compare(live, said)
        return likenesses

    def facts(self) -> dict[str, Any]:
        """For the card."""
        card = self.run.adapter / "README.md"
        found = origin(card.read_text(encoding="utf-8")) if card.is_file() else None
        told = f" for {found[0]:,} steps on {found[1]}" if found is not None else ""
        return {"origin": told, "test": read_json(self.run.path / "evaluation" / "test.json"), "examples": len(self.questions)}

    def _live(self) -> Any:
        return load_tuned(self.recipe.model, self.run.adapter, self.device, "sdpa")

    def _loaded(self, form: Form, written: Path) -> Any:
        """A form as an engine loads it."""
        dtype = compute_dtype(self.recipe.model, self.device)
        if form is Form.ADAPTER:
            return load_tuned(_unquantized(self.recipe.model), self.run.adapter, self.device, "sdpa")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(written, dtype=dtype, attn_implementation="sdpa")
        model.to(self.device)
        model.generation_config = transformers.GenerationConfig()
        return model.eval()

    def _ask(self, name: str, load: Callable[[], Any]) -> Said:
        self.tell(f"asking {name}")
        model = load()
        said = self.questions.ask(model, self.device)
        del model
        gc.collect()
        return said

    def _write(self, form: Form, aside: Path) -> None:
        if form is Form.ADAPTER:
            shutil.copytree(self.run.adapter, aside)
        else:
            base = _files(self.recipe.model, self.device)
            _check_room(base, aside)
            aside.mkdir(parents=True)
            write_merged(
                form, base, Update(self.run.adapter), aside, lambda done, of: self.tell(f"{form}: {done / 1e9:.1f} of {of / 1e9:.1f} GB")
            )
        folder.write_settings(self.recipe, self.encoder, form, aside)


def _validation(recipe: Recipe, encoder: Encoder) -> list[dict[str, Any]]:
    """The validation examples; none of a stream that has no source of its own for them."""
    if recipe.data.streaming and not has_held_out(recipe.data):
        return []
    return list(open_prepared(recipe, encoder).split(VALIDATION))


def _files(model: Model, device: torch.device) -> Checkpoint:
    base = open_checkpoint(model, device)
    if base is None:
        raise ModelError(
            f"{model.name}: its weights are not in safetensors of the ordinary kind, so nothing can be merged; use --form adapter"
        )
    return base


def _unquantized(model: Model) -> Model:
    return model.model_copy(update={"quantization": "none"})


def _check_room(base: Checkpoint, aside: Path) -> None:
    need = sum(base.shape(name).numel() for name in base.where) * base.dtype.itemsize
    free = free_bytes(aside.parent)
    if free < need:
        raise MachineError(
            f"{aside.parent}: a merged model needs {need:,} bytes, {free:,} bytes are free; make room, or choose another folder"
        )


@contextmanager
def _room(place: Path) -> Iterator[None]:
    """Raise MachineError, in one line, where a folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{describe(error, 'the export', place.parent)}; {remedy(error)} and run the same command again") from error


def _refuse_another(form: Form, likeness: Likeness, tolerance: float) -> None:
    if likeness.kl > tolerance:
        raise CheckpointError(
            f"{form}: is not the model that was trained (mean KL {likeness.kl:.3g} nats, more than {tolerance:g});"
            f" use --form best, or take it as it is with --tolerance {likeness.kl * 1.1:.2g}"
        )
