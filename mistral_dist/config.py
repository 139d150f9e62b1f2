"""The recipe: everything that decides what a run learns, as one strict, frozen tree of sections.

A recipe is YAML. `Recipe.load(path, ["optim.learning_rate=1e-4"])` reads it, applies the overrides and refuses whatever
it does not know, naming file, line, key and remedy. Nothing here depends on the machine: the number of GPUs, the ZeRO
stage and the launcher live in `configs/accelerate` and `configs/deepspeed`, because they must not change what is learned.

Precedence: field defaults < recipe file < overrides. No environment variables, no includes.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mistral_dist.errors import RecipeError

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, types are exact, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Task(Section):
    """What one example asks of the model."""

    kind: Literal["classification", "chat", "instruct", "pretrain"]
    """classification: text -> one of `labels`; chat: conversations; instruct: prompt -> completion; pretrain: plain text."""
    labels: Strings = ()
    """Classification: the labels, as the model will write them."""
    prompt: str = "Classify the text as one of: {labels}.\n\n{text}"
    """Classification: the user's turn; `{text}` and `{labels}` are filled in."""
    system: str | None = None
    """A system turn put before each example that has none."""

    @model_validator(mode="after")
    def _labels_belong_to_classification(self) -> Self:
        if self.kind == "classification":
            if len(set(self.labels)) < 2 or len(set(self.labels)) != len(self.labels):
                raise ValueError("labels: classification needs two or more different labels, e.g. labels: [spam, ham]")
            if "{text}" not in self.prompt:
                raise ValueError("prompt: must contain {text}, the place where the example's text goes")
        elif self.labels:
            raise ValueError(f"labels: only task.kind=classification has labels, this one is {self.kind}; remove them")
        return self


class Source(Section):
    """One place that rows come from: a local file or folder, or a data set of the hub."""

    path: str | None = None
    """A file (.jsonl, .json, .csv, .parquet, .txt, .md; also .gz) or a folder of such files."""
    name: str | None = None
    """A data set on the Hugging Face hub."""
    subset: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    """The hub data set's split to read; the 80/10/10 split is made afterwards."""
    columns: dict[str, str] = {}
    """Our column -> the source's column, where they differ, e.g. {text: review, label: stars}."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either path (a file or folder) or name (a hub data set)")
        return self


class Data(Section):
    """From raw files to prepared examples."""

    sources: Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]
    """Where rows come from; all are read, in this order."""
    dir: str | None = None
    """Where the prepared data go. Default: data/<name of the recipe>."""
    max_length: Count = 2048
    """Capacity of a pack, in tokens; also the longest example that is kept whole."""
    overlong: Literal["drop", "error"] = "drop"
    """What happens to an example longer than max_length: dropped and counted, or refused. (pretrain: cut into pieces.)"""
    min_characters: Annotated[int, Field(ge=0)] = 1
    """Shorter texts are dropped and counted."""
    near_duplicates: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.8
    """Texts whose estimated Jaccard similarity of word 5-grams is at least this are one text; null keeps them all."""
    validation_fraction: Fraction = 0.1
    """Share of the examples held out for validation."""
    test_fraction: Fraction = 0.1
    """Share of the examples held out for the final test."""
    seed: int = 0
    """Seed of the split. The order in training has its own: train.seed."""

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must be below 1: nothing would be left to train on")
        return self


class Model(Section):
    """The frozen base model."""

    name: str
    """The base on the hub, e.g. mistralai/Mistral-7B-Instruct-v0.3. The adapter will name it."""
    revision: str = "main"
    """Branch, tag or commit of the base."""
    path: str | None = None
    """A folder that holds a copy of the base, used instead of the hub's cache (`~` is expanded)."""
    quantization: Literal["nf4", "none"] = "nf4"
    """nf4: 4-bit NormalFloat with double quantisation (QLoRA, arXiv 2305.14314). none: LoRA on the base as it is."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute precision of the base; auto is bfloat16. The adapter and the optimizer are always float32."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """auto: flash-attn where it is installed and there is a GPU, PyTorch's SDPA elsewhere."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read it."""


class Lora(Section):
    """The adapter (arXiv 2106.09685); the names are PEFT's."""

    r: Count = 16
    """Rank."""
    lora_alpha: Count = 16
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """0 keeps the run exact on any machines; above 0 the noise is seeded by (seed, step, slot)."""
    target_modules: Literal["all-linear"] | Strings = "all-linear"
    """all-linear: every linear layer but the output head."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    init_lora_weights: bool = True
    """true: B starts at zero, the model unchanged. false: B random, for tests of gradients."""


class Optim(Section):
    """AdamW and the learning rate's course; the names are Trainer's."""

    learning_rate: Positive = 2e-4
    """Peak."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """The way from the peak down to 0 at the last step."""
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the steps that rise linearly to the peak."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay (arXiv 1711.05101)."""
    max_grad_norm: Positive = 1.0
    """The gradient is scaled down to this global L2 norm where it is larger."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of the second moment."""
    adam_epsilon: Positive = 1e-8
    """Added to the denominator."""


class Train(Section):
    """How long, and how much at once."""

    epochs: Count = 1
    """Times that each example is trained on."""
    steps: Count | None = None
    """Stop after this many optimizer steps, if the epochs give more."""
    global_batch_size: Count = 32
    """Packs of one optimizer step, over all GPUs together. Accumulation follows from it."""
    micro_batch_size: Count = 1
    """Packs that one GPU feeds one forward. Changes speed and memory, not what is learned."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: half more compute (the base is frozen), a fraction of the memory."""
    seed: int = 0
    """Seed of the adapter's start, of the order of the data and of dropout."""
    deterministic: bool = False
    """On GPUs: only deterministic kernels, so that a resumed run is bit-equal there too. Slower."""


class Checkpoint(Section):
    """What a killed run goes on from; the names are Trainer's."""

    save_steps: Count = 100
    """A checkpoint each so many steps, and one at the end."""
    save_total_limit: Count = 2
    """Checkpoints that are kept; 2 leaves one to fall back on."""


class Evaluate(Section):
    """How the held-out examples are scored."""

    max_tokens: Count = 2048
    """Tokens in one forward, over all examples and labels in it."""
    bootstrap_samples: Count = 2000
    """Resamples behind each 95 % interval."""


class Log(Section):
    """What is written down beside the metrics."""

    data_order: bool = False
    """Write the ids of the examples of each step to data_order.jsonl."""


class Run(Section):
    """Where the run lives."""

    dir: str | None = None
    """Default: runs/<name of the recipe>."""


FIXED_IN_A_RUN = ("task", "data", "model", "lora", "optim", "train")
FREE_IN_A_RUN = (
    "data.dir",
    "model.path",
    "model.attention",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.deterministic",
)
"""A run goes on only under the recipe it began with; these may still change, because they change no promise."""


class Recipe(Section):
    """One run, whole."""

    version: Literal[1]
    """Of the recipe's format."""
    task: Task
    data: Data
    model: Model
    lora: Lora = Lora()
    optim: Optim = Optim()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()
    run: Run = Run()

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe file and apply `section.field=value` overrides.

        Raises RecipeError with file, line, key, value and remedy.
        """
        path = Path(path)
        tree, lines = _read_yaml(path)
        words = dict(_parse_override(word) for word in overrides)
        for key, value in words.items():
            _set(tree, key, value)
        try:
            recipe = cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(_explain(error, path, lines, words)) from None
        return recipe._with_default_places(path.stem)

    def _with_default_places(self, name: str) -> "Recipe":
        data = self.data.model_copy(update={"dir": self.data.dir or f"data/{name}"})
        run = self.run.model_copy(update={"dir": self.run.dir or f"runs/{name}"})
        return self.model_copy(update={"data": data, "run": run})

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.run.dir or "runs/unnamed")

    @property
    def data_dir(self) -> Path:
        """The directory of the prepared data."""
        return Path(self.data.dir or "data/unnamed")

    def dump(self) -> str:
        """The resolved recipe as YAML that `load` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a nested mapping with its dotted key."""
    if isinstance(tree, dict) and (tree or not prefix):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def changed_fields(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """The fields that differ although a run must keep them, as (dotted key, old, new)."""
    before, after = (dict(leaves(recipe.model_dump(mode="json"))) for recipe in (old, new))
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if key.split(".")[0] in FIXED_IN_A_RUN and key not in FREE_IN_A_RUN and before.get(key) != after.get(key)
    ]


def digest(section: BaseModel | dict[str, Any]) -> str:
    """A short fingerprint of a section's values (first 16 hex digits of SHA-256 over canonical JSON)."""
    values = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """PyYAML speaks YAML 1.1, where `2e-4` is a string and a repeated key silently wins; neither is wanted."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's tree, and the line of each dotted key."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe; `mistral-dist init DIR` lays out commented ones")
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, _Loader)
        node = yaml.compose(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (version, task, data, model, ...), not {type(tree).__name__}")
    return tree, dict(_key_lines(node))


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _key_lines(value, f"{dotted}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark.line + 1
            yield from _key_lines(value, f"{prefix}{index}.")


def _parse_override(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)+", key):
        raise RecipeError(f"{word!r}: an override looks like section.field=value, e.g. optim.learning_rate=1e-4")
    try:
        return key, yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise RecipeError(f"{word!r}: the value is not valid YAML; quote it, e.g. '{key}=\"...\"'") from None


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, field = key.split(".")
    for depth, name in enumerate(sections):
        if isinstance(tree, list) and name.isdigit() and int(name) < len(tree):
            tree = tree[int(name)]
            continue
        if not isinstance(tree, dict):
            raise RecipeError(f"override {key}: {'.'.join(sections[:depth])} is not a section")
        tree = tree.setdefault(name, {})
    if not isinstance(tree, dict):
        raise RecipeError(f"override {key}: {'.'.join(sections)} is not a section")
    tree[field] = value


ELSEWHERE = {
    # Trainer / TRL
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size (accumulation follows from it)",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "max_seq_length": "data.max_length",
    "output_dir": "run.dir",
    "logging_dir": "run.dir",
    "lr": "optim.learning_rate",
    "warmup_steps": "optim.warmup_ratio (a share of all steps)",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: bfloat16 (float16 is not supported)",
    "tf32": "model.dtype",
    "load_in_4bit": "model.quantization: nf4",
    "attn_implementation": "model.attention",
    "model_name_or_path": "model.name",
    "model_id": "model.name",
    "dataset_name": "data.sources",
    "max_grad_norm": "optim.max_grad_norm",
    "optim": "optim (a section; the optimizer is AdamW)",
    # axolotl
    "base_model": "model.name",
    "revision_of_model": "model.revision",
    "datasets": "data.sources",
    "dataset_prepared_path": "data.dir",
    "val_set_size": "data.validation_fraction",
    "sequence_len": "data.max_length",
    "sample_packing": "nothing: packing is always on, and exact",
    "micro_batch_size": "train.micro_batch_size",
    "num_epochs": "train.epochs",
    "adapter": "model.quantization: nf4 (QLoRA) or none (LoRA)",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules: all-linear",
    "lr_scheduler": "optim.lr_scheduler_type",
    "flash_attention": "model.attention: flash_attention_2",
    "xformers_attention": "model.attention",
    # LLaMA-Factory
    "stage": "task.kind",
    "finetuning_type": "model.quantization: nf4 (QLoRA) or none (LoRA)",
    "template": "nothing: the tokenizer's own chat template is used",
    "dataset": "data.sources",
    "cutoff_len": "data.max_length",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "quantization_bit": "model.quantization: nf4",
    "val_size": "data.validation_fraction",
    "packing": "nothing: packing is always on, and exact",
    "flash_attn": "model.attention",
    # ours, often guessed
    "alpha": "lora.lora_alpha",
    "batch_size": "train.global_batch_size",
    "epochs": "train.epochs",
    "scheduler": "optim.lr_scheduler_type",
    "max_len": "data.max_length",
    "output": "run.dir",
}
"""Names that other trainers give to what has a place here."""


def _known_fields() -> list[str]:
    fields = []
    for name, field in Recipe.model_fields.items():
        fields.append(name)
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            fields += [f"{name}.{inner}" for inner in section.model_fields]
    return fields + [f"data.sources.0.{inner}" for inner in Source.model_fields]


def did_you_mean(key: str) -> str:
    """The remedy for an unknown dotted key: the field that was most likely meant."""
    name, known = key.split(".")[-1], _known_fields()
    if name in ELSEWHERE and ELSEWHERE[name].split(" ")[0].rstrip(":") != key:
        return f"here it is {ELSEWHERE[name]}"
    same_name = [field for field in known if field.split(".")[-1] == name and "sources" not in field]
    close = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    section = key.rsplit(".", 1)[0]
    siblings = [field.rsplit(".", 1)[1] for field in known if field.startswith(f"{section}.") and field.count(".") == 1]
    return f"known here: {', '.join(siblings or [field for field in known if '.' not in field])}"


def _explain(error: ValidationError, path: Path, lines: dict[str, int], overrides: dict[str, Any]) -> str:
    """One line for the first problem that pydantic found, and how many more there are."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    parts = [str(part) for part in first["loc"]]
    # pydantic names the branch of a union or a tag after the field; only what the user wrote is shown
    while (
        len(parts) > 2 and ".".join(parts) not in lines and parts[-1] not in Recipe.model_fields and ("[" in parts[-1] or "'" in parts[-1])
    ):
        parts.pop()
    key = ".".join(parts)
    line = next((lines[k] for k in (".".join(parts[:n]) for n in range(len(parts), 0, -1)) if k in lines), None)
    place = f"override {key}" if key in overrides else f"{path}:{line}" if line else str(path)
    more = f" ({len(problems) - 1} more problem{'s' if len(problems) > 2 else ''} after this)" if len(problems) > 1 else ""
    return f"{place}: {_problem(first, key)}{more}"


def _problem(problem: Any, key: str) -> str:
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"{key}: no such field; {did_you_mean(key)}"
    if kind == "missing":
        return f"{key}: this field is required; add it"
    if kind == "value_error":
        return f"{key}.{problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    expected = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{key}: {expected}, but it is {value!r}"
