"""A finished run -> a folder that can be served, and whether it is the model that was trained.

The live adapter (4-bit base with the adapter on it) is asked first, then each form, one model at a time in memory. The folder is written
aside and appears when it is whole.
"""

import gc
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from mistral_dist.base import Checkpoint, compute_dtype, open_checkpoint
from mistral_dist.base_cache import fingerprint
from mistral_dist.card import origin
from mistral_dist.config import Model, Recipe
from mistral_dist.data.encode import Encoder, load_encoder
from mistral_dist.data.feed import has_held_out
from mistral_dist.data.prepared import open_prepared
from mistral_dist.data.split import VALIDATION
from mistral_dist.errors import CheckpointError, DataError, MachineError, ModelError, RecipeError, RunError
from mistral_dist.evaluate import refuse_another_base
from mistral_dist.export import folder
from mistral_dist.export.folder import Likenesses
from mistral_dist.export.forms import Form, forms_of
from mistral_dist.export.likeness import Outputs, Questions
from mistral_dist.export.merge import Update, write_merged
from mistral_dist.files import aside_of, asides_of, describe, read_json, remedy, sync, sync_entry
from mistral_dist.hub import free_bytes
from mistral_dist.model import load_tuned
from mistral_dist.run import RunDirectory
from mistral_dist.runtime.memory import is_out_of_memory

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is asked for."""

    form: Form | None = None
    """None: the merged one that is most like the live adapter."""
    tolerance: float = 0.1
    """The mean KL, in nats, above which a form is refused."""
    compare: bool = True
    """Whether to load live adapter and form at all, which takes the memory of a whole model."""


def export(run: RunDirectory, recipe: Recipe, out: Path, options: Options, tell: Tell) -> tuple[Form, list[tuple[str, ...]]]:
    """Write a form of a finished run's model into the folder `out`, which must not be there.

    Returns which, and a table of what was measured, head first; empty where nothing was.

    `tell` hears what is being done. Raises UserError for what can be mended, CheckpointError for a form that is not the model that was
    trained, MachineError, with the bytes that are needed and free, where the folder cannot be written.
    """
    forms = _check(run, recipe, out, options)
    work = _Work.of(run, recipe, forms, options, tell)
    written = {form: aside_of(out) for form in forms}
    try:
        with _writing(out):
            _make_room(work, out, written)
        likenesses = work.make(written, compare=options.compare)
        form = _best(likenesses) if options.form is None else options.form
        if options.compare:
            _refuse_another(form, likenesses, options)
        with _writing(out):
            folder.write_card(run.recipe(), form, likenesses, work.facts, written[form])
            folder.write_sums(written[form])
            sync(written[form])
            _refuse_existing(out)  # it was long ago that this was asked
            written[form].rename(out)
            sync_entry(out.parent)
    finally:
        for aside in written.values():
            shutil.rmtree(aside, ignore_errors=True)
    return form, folder.rows(likenesses)


def _check(run: RunDirectory, recipe: Recipe, out: Path, options: Options) -> tuple[Form, ...]:
    """The forms to make."""
    forms = forms_of(recipe.model.quantization)
    if options.form is not None and options.form not in forms:
        raise RecipeError(
            f"--form {options.form}: this run's base was not quantized (model.quantization=none); use one of {', '.join(forms)}"
        )
    if options.form is None and not options.compare:
        raise RecipeError("--no-compare: chooses nothing; name the form with --form as well")
    _refuse_existing(out)
    if out.resolve().is_relative_to(run.path.resolve()):
        raise RunError(f"{out}: lies in the run, whose folders are written anew when it goes on; choose another folder")
    return forms if options.form is None else (options.form,)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise RunError(f"{out}: is there already; choose another folder, or move it away")


def _make_room(work: "_Work", out: Path, written: dict[Form, Path]) -> None:
    """Sweep what a killed export has left, see that all fits, and make the folders. Raises MachineError, OSError."""
    for leftover in asides_of(out):
        shutil.rmtree(leftover, ignore_errors=True)
    merged = [form for form in written if form is not Form.ADAPTER]
    need, free = work.bytes * len(merged), free_bytes(out.parent)
    if free < need:
        what = "a merged model needs" if len(merged) == 1 else f"{len(merged)} merged models, of which one stays, need"
        raise MachineError(f"{out.parent}: {what} {need:,} bytes, {free:,} bytes are free; make room, or choose another folder")
    for aside in written.values():
        aside.mkdir(parents=True)


@dataclass
class _Work:
    """One export; all that can be looked at before a model is loaded has been."""

    recipe: Recipe
    encoder: Encoder
    questions: Questions
    device: torch.device
    tell: Tell
    adapter: Path
    base: Checkpoint | None
    """None where nothing is merged."""
    update: Update
    facts: dict[str, Any]
    """For the card."""

    @classmethod
    def of(cls, run: RunDirectory, recipe: Recipe, forms: tuple[Form, ...], options: Options, tell: Tell) -> "_Work":
        encoder, update = load_encoder(recipe), Update(run.adapter)
        refuse_another_base(recipe.model.model_copy(update={"dtype": run.recipe().model.dtype}), run)
        questions = Questions(recipe, encoder, _validation(recipe, encoder) if options.compare else [])
        if options.compare and not len(questions):
            raise DataError("data.validation_fraction: no validation examples to compare with; --no-compare writes a form all the same")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base = _files(recipe.model, device) if forms != (Form.ADAPTER,) else None
        if base is not None:
            update.check(base)
        facts = {
            "name": run.path.resolve().name,
            "origin": _origin(run),
            "test": read_json(run.path / "evaluation" / "test.json"),
            "examples": len(questions),
            "mistral_file": encoder.mistral_file and encoder.mistral_file.name,
            "model": recipe.model.model_dump(mode="json", include=set(folder.MODEL)),
            "base": fingerprint(recipe.model),
            "licence": folder.licence(recipe.model),
            "tools": encoder.calls_tools,
            "asking": {
                "system_turn": encoder.keeps_system,
                "begins_with": encoder.begins_with,
                "answers": dict(zip(recipe.task.labels, encoder.candidates("").answers, strict=True)) if recipe.task.labels else {},
            },
        }
        return cls(recipe, encoder, questions, device, tell, run.adapter, base, update, facts)

    @property
    def bytes(self) -> int:
        """Of one merged model."""
        return sum(self.base.shape(name).numel() for name in self.base.where) * self.base.dtype.itemsize if self.base is not None else 0

    def make(self, written: dict[Form, Path], *, compare: bool) -> Likenesses:
        """Write each form into its folder, and measure it."""
        live = self._ask("the live adapter", self._live) if compare else None
        likenesses = {}
        for form, aside in written.items():
            with _writing(aside):
                self._write(form, aside)
            if live is not None:
                said = self._ask(form, partial(self._loaded, form, aside))
                likenesses[form] = self.questions.compare(live, said)
        return likenesses

    def _live(self) -> Any:
        return load_tuned(self.recipe.model, self.adapter, self.device, "sdpa")

    def _loaded(self, form: Form, written: Path) -> Any:
        """A form as an engine loads it."""
        if form is Form.ADAPTER:
            return load_tuned(_unquantized(self.recipe.model), written, self.device, "sdpa")
        dtype = compute_dtype(self.recipe.model, self.device)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(written, dtype=dtype, attn_implementation="sdpa")
        model.to(self.device)
        model.generation_config = transformers.GenerationConfig()
        return model.eval()

    def _ask(self, name: str, load: Callable[[], Any]) -> Outputs:
        self.tell(f"asking {name}")
        try:
            return self.questions.ask(load(), self.device)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}; it cannot be compared") from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            need = f"{self.bytes / 1e9:.1f} GB for a model and more beside" if self.bytes else "a whole model"
            remedy = "hide the GPU (CUDA_VISIBLE_DEVICES=), or name a form with --form and --no-compare"
            raise MachineError(f"{name}: there is not enough memory to ask it ({need}); {remedy}") from error
        finally:
            gc.collect()

    def _write(self, form: Form, aside: Path) -> None:
        if form is Form.ADAPTER:
            shutil.copytree(self.adapter, aside, dirs_exist_ok=True)
        else:
            assert self.base is not None
            write_merged(form, self.base, self.update, aside, lambda done, of: self.tell(f"{form}: {done / 1e9:.1f} of {of / 1e9:.1f} GB"))
        folder.write_settings(self.recipe, self.encoder, form, aside)


def _origin(run: RunDirectory) -> str:
    """Steps and data, in words, as the adapter's own card has them."""
    card = run.adapter / "README.md"
    found = origin(card.read_text(encoding="utf-8")) if card.is_file() else None
    return f" for {found[0]:,} steps on {found[1]}" if found is not None else ""


def _best(likenesses: Likenesses) -> Form:
    """Of the merged forms: the adapter alone is no model yet, and on a base that was not quantized the live one itself."""
    return min((form for form in likenesses if form is not Form.ADAPTER), key=lambda form: likenesses[form].kl)


def _validation(recipe: Recipe, encoder: Encoder) -> Iterable[dict[str, Any]]:
    """The validation examples; none of a stream that has no source of its own for them."""
    if recipe.data.streaming and not has_held_out(recipe.data):
        return []
    return open_prepared(recipe, encoder).split(VALIDATION)


def _files(model: Model, device: torch.device) -> Checkpoint:
    base = open_checkpoint(model, device)
    if base is None:
        raise ModelError(
            f"{model.name}: its weights are not in safetensors of the ordinary kind, so nothing can be merged; use --form adapter"
        )
    return base


def _unquantized(model: Model) -> Model:
    return model.model_copy(update={"quantization": "none"})


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Raise MachineError, in one line, where a folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{describe(error, 'the export', place.parent)}; {remedy(error)} and run the same command again") from error


def _refuse_another(form: Form, likenesses: Likenesses, options: Options) -> None:
    kl = likenesses[form].kl
    if not kl <= options.tolerance:
        found = ", ".join(f"{each} {likeness.kl:.3g}" for each, likeness in likenesses.items())
        best = "" if options.form is None else "use --form best, or "
        raise CheckpointError(
            f"{form}: is not the model that was trained (mean KL in nats: {found}; at most {options.tolerance:g});"
            f" {best}take it as it is with --tolerance {kl * 1.1:.2g}"
        )
