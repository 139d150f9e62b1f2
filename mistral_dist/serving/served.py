"""What lies at a place: a whole model, or an adapter and the base that it belongs to."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_dist.base_cache import dtype_name, fingerprint
from mistral_dist.config import Model
from mistral_dist.data.encode import load_encoder
from mistral_dist.errors import ModelError, RunError
from mistral_dist.export.forms import FACTS, SUMS, Form, sums_of
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
    weights_name: str
    """What a client calls the model at `weights`: of an adapter, the base's published name."""
    dtype: str
    """bfloat16 or float32: in which it was trained; of merged weights, in which they are."""
    adapter: Path | None = None
    """PEFT's folder; None where the weights are all there is."""
    rank: int = 0
    """Of the adapter's matrices."""
    mistral_common: bool = False
    """Whether mistral-common encoded its conversations, and its file lies beside the weights."""
    tools: bool = False
    """Whether that tokenizer has tokens for tool calls."""
    quantized: bool = False
    """Whether the adapter was trained on a 4-bit base, which is not the base that an engine loads."""
    trust_remote_code: bool = False


def open_served(place: Path, base: Path | None = None) -> Served:
    """What lies at a run directory or an exported folder; `base`: where an adapter's base is, if not where it was in training.

    Raises RunError where there is neither, or a run without an adapter; ModelError where the base is not on this machine, or the
    adapter is of a kind that no engine loads.
    """
    facts = read_json(place / FACTS)
    if facts is not None:
        return _exported(place, facts, base)
    run = RunDirectory(place)
    if not (place / "recipe.yaml").is_file():
        raise RunError(f"{place}: neither a run (recipe.yaml) nor an exported folder ({FACTS}); `mistral-dist export RUN OUT` makes one")
    recipe = run.recipe()
    if not (run.adapter / ADAPTER).is_file():
        raise RunError(f"{place}: has no adapter yet; `mistral-dist status {place}` says how it stands")
    from mistral_dist.evaluate import noted  # which takes seconds, and an exported folder needs nothing of it

    found = recipe.model.model_copy(update={"path": str(_base(recipe.model, base))})
    encoder = load_encoder(recipe.model_copy(update={"model": found}))
    mistral_common, tools = encoder.mistral_file is not None, encoder.calls_tools
    return _adapter(place, run.adapter, found, noted(run, "base"), base, mistral_common=mistral_common, tools=tools)


def _exported(place: Path, facts: dict[str, Any], base: Path | None) -> Served:
    try:
        form, model = Form(facts["form"]), Model.model_validate(facts["model"])
        mistral_common, tools, trained_on = bool(facts["mistral_file"]), bool(facts["tools"]), facts["base"]
    except (KeyError, ValueError):
        raise RunError(f"{place / FACTS}: not what this version of `mistral-dist export` writes; export the run again") from None
    _refuse_incomplete(place)
    if form is Form.ADAPTER:
        return _adapter(place, place, model, trained_on, base, mistral_common=mistral_common, tools=tools)
    if base is not None:
        raise RunError(f"--base: {place} is a whole model, which needs none; leave it out")
    name, code = _name(place), model.trust_remote_code
    return Served(name, place, name, dtype_name(model), mistral_common=mistral_common, tools=tools, trust_remote_code=code)


def _refuse_incomplete(place: Path) -> None:
    """Raise RunError unless all files are there that an export has written; `push` looks at what is in them, too."""
    sums = sums_of(place)
    missing = [SUMS] if sums is None else [name for name in sums if not (place / name).is_file()]
    if missing:
        raise RunError(f"{place}: lacks {', '.join(missing)}; export the run again")


def _adapter(
    place: Path, folder: Path, model: Model, trained_on: str | None, base: Path | None, *, mistral_common: bool, tools: bool
) -> Served:
    config = read_json(folder / ADAPTER) or {}
    if config.get("modules_to_save"):
        whole = ", ".join(config["modules_to_save"])
        raise ModelError(f"{folder}: trained {whole} whole, which no engine loads as an adapter; export it with --form merged-nf4")
    weights = _base(model, base)
    now = fingerprint(model.model_copy(update={"path": str(weights)}))
    if trained_on not in (None, now):
        remedy = "give it with --base FOLDER, or put its files back"
        raise ModelError(f"{weights}: is not the base that {place} was trained on (fingerprint {trained_on} then, {now} now); {remedy}")
    return Served(
        name=_name(place),
        weights=weights,
        weights_name=model.name,
        dtype=dtype_name(model),
        adapter=folder,
        rank=int(config["r"]),
        mistral_common=mistral_common,
        tools=tools,
        quantized=model.quantization != "none",
        trust_remote_code=model.trust_remote_code,
    )


def _base(model: Model, given: Path | None) -> Path:
    """The base's folder: the one that is given, the one of the training, or, on another machine, the hub's cache."""
    if given is not None:
        return local_path(model.model_copy(update={"path": str(given)}))
    for place in (model, model.model_copy(update={"path": None})):
        with suppress(ModelError):
            return local_path(place)
    raise ModelError(f"{model.name}: the adapter's base is not on this machine; say where it is with --base FOLDER")


def _name(place: Path) -> str:
    return place.resolve().name
