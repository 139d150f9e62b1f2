"""What lies at a place: a whole model, or an adapter and the base that it belongs to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_dist.config import Model
from mistral_dist.data.encode import load_encoder
from mistral_dist.errors import ModelError, RunError
from mistral_dist.export.forms import FACTS, Form
from mistral_dist.files import read_json
from mistral_dist.hub import local_path
from mistral_dist.run import RunDirectory

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Served:
    """One model for an engine to serve."""

    name: str
    """What a client calls it: the name of its folder."""
    weights: Path
    """The folder of a whole model."""
    base: str
    """What a client calls the model at `weights`."""
    adapter: Path | None = None
    """PEFT's folder; None where the weights are all there is."""
    rank: int = 0
    """Of the adapter's matrices."""
    dtype: str = "auto"
    """In which it was trained; of merged weights that in which they are."""
    mistral_file: bool = False
    """Whether mistral-common encoded its conversations."""
    quantized: bool = False
    """Whether the adapter was trained on a 4-bit base, which is not the base that an engine loads."""


def open_served(place: Path) -> Served:
    """What lies at a run directory or an exported folder.

    Raises RunError where there is neither, or a run without an adapter; ModelError where the base is not on this machine, or the
    adapter is of a kind that no engine loads.
    """
    facts = read_json(place / FACTS)
    if facts is not None:
        return _exported(place, facts)
    run = RunDirectory(place)
    if not (place / "recipe.yaml").is_file():
        raise RunError(f"{place}: neither a run (recipe.yaml) nor an exported folder ({FACTS}); `mistral-dist export RUN OUT` makes one")
    recipe = run.recipe()
    if not (run.adapter / ADAPTER).is_file():
        raise RunError(f"{place}: has no adapter yet; `mistral-dist status {place}` says how it stands")
    return _adapter(_name(place), run.adapter, recipe.model, mistral_file=load_encoder(recipe).mistral_file is not None)


def _exported(place: Path, facts: dict[str, Any]) -> Served:
    try:
        form, model, mistral_file = Form(facts["form"]), Model.model_validate(facts["model"]), bool(facts["mistral_file"])
    except (KeyError, ValueError):
        raise RunError(f"{place / FACTS}: not what this version of `mistral-dist export` writes; export the run again") from None
    if form is Form.ADAPTER:
        return _adapter(_name(place), place, model, mistral_file=mistral_file)
    return Served(_name(place), place, _name(place), mistral_file=mistral_file)


def _adapter(name: str, folder: Path, model: Model, *, mistral_file: bool) -> Served:
    config = read_json(folder / ADAPTER) or {}
    if config.get("modules_to_save"):
        whole = ", ".join(config["modules_to_save"])
        raise ModelError(f"{folder}: trained {whole} whole, which no engine loads as an adapter; export it with --form merged-nf4")
    quantized = model.quantization != "none"
    return Served(name, local_path(model), model.name, folder, int(config["r"]), model.dtype, mistral_file, quantized)


def _name(place: Path) -> str:
    return place.resolve().name
