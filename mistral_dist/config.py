"""The recipe: everything that decides what a run learns, as one strict, frozen tree of sections.

A recipe is YAML. `Recipe.load(path, ["optim.learning_rate=1e-4"])` reads it, applies the overrides and refuses whatever
it does not know, naming file, line, key and remedy. Nothing here depends on the machine: the number of GPUs, the ZeRO
stage and the launcher live in `configs/accelerate` and `configs/deepspeed`, because they must not change what is learned.

Precedence: field defaults < recipe file < overrides. No environment variables, no includes.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from mistral_dist.errors import RecipeError
from mistral_dist.recipe_file import explain, parse_override, read_yaml, set_field
from mistral_dist.sections import Count, Data, Lora, NotNegative, Positive, Section, Seed, Source, Task


class Model(Section):
    """The frozen base model."""

    name: str
    """The base on the hub, e.g. mistralai/Mistral-7B-Instruct-v0.3. The adapter will name it."""
    revision: str = "main"
    """Branch, tag or commit of the base."""
    path: str | None = None
    """A folder that holds a copy of the base, used instead of the hub's cache (`~` is expanded)."""
    adapter: str | None = None
    """Begin with the adapter of an earlier run (its directory, or a folder in PEFT's format) instead of a new one: more training, on new
    data, with a fresh optimizer. It must be of the same base, rank, scale and layers."""
    chat_format: Literal["auto", "mistral", "template"] = "auto"
    """How a conversation becomes tokens. mistral: mistral-common's rules, of the tokenizer's version; template: the
    tokenizer's own chat template; auto: mistral where the base comes with a tokenizer of Mistral's own, else template."""
    quantization: Literal["nf4", "none"] = "nf4"
    """nf4: 4-bit NormalFloat with double quantisation (QLoRA, arXiv 2305.14314). none: LoRA on the base as it is."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute precision of the base; auto is bfloat16. The adapter and the optimizer are always float32."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """auto: flash-attn where it is installed and there is a GPU, PyTorch's SDPA elsewhere. Others are refused: that they keep
    packed examples apart was not shown (flex_attention has no backward pass on a CPU)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read it."""


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
    """Times that each example is trained on. Streaming: without a meaning, the steps decide."""
    steps: Count | None = None
    """Stop after this many optimizer steps, if the epochs give more."""
    global_batch_size: Count = 32
    """Packs of one optimizer step, over all GPUs together. Accumulation follows from it."""
    micro_batch_size: Count | Literal["auto"] = 1
    """Packs that one GPU feeds one forward. Changes speed and memory, not what is learned. auto: the largest that fits into every GPU,
    found at the start on full packs in which every token is a target. On a CPU auto is 1: memory cannot be refused there in
    time, and a larger one is no faster."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: half more compute (the base is frozen), a fraction of the memory."""
    label_smoothing_factor: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each target's probability that is spread evenly over the whole vocabulary (arXiv 1512.00567). The metrics show the
    loss that is trained on, so with smoothing it does not go to 0; the evaluation is never smoothed."""
    seed: Seed = 0
    """Seed of the adapter's start, of the order of the data and of dropout."""
    eval_steps: Count | None = None
    """The loss on the validation examples each so many steps, and after the last one; null: never. Changes nothing in what is
    learned, so it may differ from launch to launch, unless what it shows decides something (the next three)."""
    early_stopping_patience: Count | None = None
    """End the run where so many validations in a row have not improved on the best one; null: never. The learning rate keeps the course
    of all planned steps."""
    early_stopping_threshold: NotNegative = 0.0
    """By how much, in nats per token, a validation must be below the best one before it to count as improved."""
    load_best_model_at_end: bool = False
    """The result is the adapter of the best validation, whose checkpoint is kept; false: of the last step."""
    max_skipped_steps: Count = 3
    """Steps in a row whose loss or gradient is not finite. Each is left out; after so many the run goes back."""
    spike_threshold: Positive | None = 6.0
    """The run goes back where five losses in a row are so many (robust) standard deviations above the median of the
    20 steps before them; null: it never does."""
    max_rewinds: Annotated[int, Field(ge=0)] = 2
    """Times that a run goes back, to a checkpoint from before the trouble, and passes over the steps that led to it. Then it fails."""
    deterministic: bool = False
    """On GPUs: only deterministic kernels, so that a resumed run is bit-equal there too. Slower."""
    max_seconds: Positive | None = None
    """Stop as on a signal (exit code 85), in time to have saved after so many seconds of this launch, loading included; to leave
    takes some more. Counted from the start of `mistral-dist train`, or of the workers under a bare `accelerate launch`."""
    stall_seconds: Annotated[float, Field(ge=5.0, allow_inf_nan=False)] | None = 300.0
    """A GPU that has not moved for so long while others wait for it is named, and all end; four times as long while the model is
    loaded or a checkpoint is saved. Must be longer than any forward or backward. null: they wait until the collectives give up."""

    @property
    def validation_decides(self) -> bool:
        """Whether what the validations show decides when the run ends, or what its result is."""
        return self.early_stopping_patience is not None or self.load_best_model_at_end

    @model_validator(mode="after")
    def _what_decides_is_there(self) -> Self:
        if self.eval_steps is None and self.validation_decides:
            field = "load_best_model_at_end" if self.early_stopping_patience is None else "early_stopping_patience"
            raise ValueError(f"{field}: needs the validations that decide; say how often, e.g. train.eval_steps=50")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold: says nothing without train.early_stopping_patience; add it, e.g. 3")
        return self

    @field_validator("micro_batch_size", mode="before")
    @classmethod
    def _auto_or_a_count(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(f"must be auto or a whole number from 1 on, but it is {value!r}")

    @property
    def packs_per_forward(self) -> int:
        """`micro_batch_size`, or 1 as long as `auto` has found none."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size


class Checkpoint(Section):
    """What a killed run goes on from; the names are Trainer's."""

    save_steps: Count = 100
    """A checkpoint each so many steps, written in the background, and one at the end."""
    save_total_limit: Count = 2
    """The last ones are kept, so many; 2 leaves one to fall back on."""
    save_best_limit: Annotated[int, Field(ge=0)] = 0
    """Beside the last ones, so many with the lowest loss on the validation examples (train.eval_steps). With 1 or more a checkpoint is
    also saved at each validation that is the best so far; train.load_best_model_at_end keeps the best whatever stands here."""
    keep_every_steps: Count | None = None
    """Beside these, each checkpoint whose step is a multiple is kept for good; null: none."""


class Evaluate(Section):
    """How the held-out examples are scored."""

    method: Literal["likelihood", "generation"] = "likelihood"
    """Classification: the label that the model finds most likely; or the one that it writes, where anything else is no label."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute precision of the base where it is asked; auto: as in training. With float32 a likelihood moves by less than 1e-4 nats with
    what stands beside an example (bfloat16: up to 0.4), for 1.4 times the time on a CPU; on a GPU this was not measured."""
    max_tokens: Count = 2048
    """Tokens in one forward, over all examples and labels in it."""
    answers: Annotated[int, Field(ge=0)] = 500
    """Chat and instruct: how many test examples base and tuned model answer in writing, those with the smallest ids; 0: none."""
    batch_size: Count = 16
    """Answers that are written together."""
    max_new_tokens: Count = 512
    """Where a written answer is cut off."""
    metric: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """A function of your own, module:function, of a written answer and the reference answer; the mean is reported."""
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    """Resamples behind each 95 % interval."""


class Log(Section):
    """What is written down beside the metrics."""

    data_order: bool = False
    """Write the ids of the examples of each step to data_order.jsonl."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Field(strict=False)] = ()
    """Also show the metrics there, e.g. [tensorboard, wandb]; a run that goes on continues what it began. Each brings a library of its
    own, and reads its own environment: WANDB_MODE=offline, MLFLOW_TRACKING_URI. Tested is tensorboard alone."""
    project: str = "mistral-dist"
    """What the trackers gather runs under."""


class Run(Section):
    """Where the run lives."""

    dir: str | None = None
    """Default: runs/<name of the recipe>."""


FIXED_IN_A_RUN = ("task", "data", "model", "lora", "optim", "train")
FREE_IN_A_RUN = (
    "data.dir",
    "data.workers",
    "model.path",
    "model.attention",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.deterministic",
    "train.max_skipped_steps",
    "train.spike_threshold",
    "train.max_rewinds",
    "train.max_seconds",
    "train.stall_seconds",
)
"""A run goes on only under the recipe it began with; these may still change, because they change no promise."""


CONVERSATIONS = ("messages", "sharegpt", "alpaca", "prompt_completion")
ROWS_OF = {"classification": ("text_label",), "pretrain": ("text",), "chat": CONVERSATIONS, "instruct": CONVERSATIONS}
"""The shapes of rows that each kind of task can be read from."""


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

    @model_validator(mode="after")
    def _rows_fit_the_task(self) -> Self:
        fitting = ROWS_OF[self.task.kind]
        for number, source in enumerate(self.data.sources):
            if source.format not in ("auto", *fitting):
                asked = f"data.sources.{number}.format: {source.format} does not fit task.kind={self.task.kind}"
                raise ValueError(f"{asked}, which takes {', '.join(fitting)}")
        return self

    @model_validator(mode="after")
    def _streams_have_no_end(self) -> Self:
        if self.data.streaming and self.train.steps is None:
            raise ValueError("train.steps: a stream has no epochs, so data.streaming=true needs the number of steps")
        return self

    @model_validator(mode="after")
    def _validations_have_examples(self) -> Self:
        data = self.data
        if self.train.eval_steps is None or any(source.into == "validation" for source in data.sources):
            return self
        if data.streaming or not data.validation_fraction:
            why = "a stream holds nothing out by itself" if data.streaming else "data.validation_fraction=0 holds none out"
            more = "" if data.streaming else "set data.validation_fraction=0.1, "
            remedy = f"{more}give them a source of their own (into: validation), or remove train.eval_steps"
            raise ValueError(f"train.eval_steps: there are no validation examples: {why}; {remedy}")
        return self

    @model_validator(mode="after")
    def _streams_have_no_counts(self) -> Self:
        if self.data.streaming and self.task.class_weights == "balanced":
            remedy = "write the weights, e.g. task.class_weights={spam: 3.0}, or prepare the data (data.streaming=false)"
            raise ValueError(f"task.class_weights: balanced needs the number of examples of each label, a stream has none; {remedy}")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe file and apply `section.field=value` overrides.

        Raises RecipeError with file, line, key, value and remedy.
        """
        path = Path(path)
        tree, lines = read_yaml(path)
        words = dict(parse_override(word) for word in overrides)
        for key, value in words.items():
            set_field(tree, key, value)
        try:
            recipe = cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(explain(error, path, lines, words, known_fields())) from None
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

    @property
    def asked_model(self) -> Model:
        """The model as evaluation, predictions and chat load it: in the precision of `evaluate.dtype`."""
        dtype = self.evaluate.dtype
        return self.model if dtype == "auto" else self.model.model_copy(update={"dtype": dtype})

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
    # a validation changes nothing that is learned, but may decide which of it is the result
    free = FREE_IN_A_RUN if old.train.validation_decides else (*FREE_IN_A_RUN, "train.eval_steps")
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if key.split(".")[0] in FIXED_IN_A_RUN and key not in free and before.get(key) != after.get(key)
    ]


def digest(section: BaseModel | dict[str, Any]) -> str:
    """A short fingerprint of a section's values (first 16 hex digits of SHA-256 over canonical JSON)."""
    values = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def known_fields() -> list[str]:
    """Every dotted key that a recipe may have; those of the sources as if there were one."""
    fields = []
    for name, field in Recipe.model_fields.items():
        fields.append(name)
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            fields += [f"{name}.{inner}" for inner in section.model_fields]
    return fields + [f"data.{where}.0.{inner}" for where in ("sources", "benchmarks") for inner in Source.model_fields]
