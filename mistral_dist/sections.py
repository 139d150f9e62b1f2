"""What the sections of a recipe are made of, and those that say what is learned (task), from what (data), in which weights (lora)."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
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
    class_weights: dict[str, Positive] | Literal["balanced"] | None = None
    """Classification: how much each target token of a label's examples counts in the loss, e.g. {spam: 3.0}; a label that is not
    named counts 1. balanced: n / (k * n_label), of the n examples of the train split and the k labels in it."""

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

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weights_or_balanced(cls, value: Any) -> Any:
        if value is None or value == "balanced" or isinstance(value, dict):
            return value
        raise ValueError(f"must be balanced or a weight for each label, e.g. {{spam: 3.0}}, but it is {value!r}")

    @model_validator(mode="after")
    def _class_weights_are_of_labels(self) -> Self:
        if self.class_weights is not None and self.kind != "classification":
            raise ValueError(f"class_weights: only task.kind=classification has labels to weigh, this one is {self.kind}; remove it")
        if isinstance(self.class_weights, dict):
            unknown = next((label for label in self.class_weights if label not in self.labels), None)
            if unknown is not None:
                raise ValueError(
                    f"class_weights: {unknown!r} is none of task.labels ({', '.join(self.labels)}); write it as it stands there"
                )
        return self


class Source(Section):
    """One place that rows come from: files, here or remote, or a data set of the hub."""

    path: str | None = None
    """A file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt, .md; also .gz, .zst, .xz, .bz2), a folder or a pattern of such
    files, or a URL (https://..., s3://..., hf://...)."""
    name: str | None = None
    """A data set on the Hugging Face hub."""
    subset: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    """The hub data set's split to read."""
    streaming: bool = False
    """Hub: read over the network while preparing, instead of downloading first with `mistral-dist fetch`."""
    into: Literal["train", "validation", "test"] | None = None
    """A split of your own: all its rows go there, and are checked against the others. null: divided by the fractions."""
    weight: Positive = 1.0
    """How often an epoch shows each of its train examples: 2 twice, 0.5 every other epoch. Streaming: how often it is asked
    for a row, compared with the other sources."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text_label", "text"] = "auto"
    """What a row looks like; auto tells it from the columns of each row."""
    columns: dict[str, str] = {}
    """Our column -> the source's column, where they differ, e.g. {text: review, label: stars}."""
    group: Annotated[str, Field(min_length=1)] | None = None
    """A column of the source: rows with the same value (a patient, an author, a document) stay in one split, those of other
    sources included; a row without a value stands alone."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either path (files, a folder, a URL) or name (a hub data set)")
        if self.path is not None and (self.subset is not None or self.streaming):
            raise ValueError("subset and streaming are a hub data set's (name); files of a path are always read as they come")
        return self


class Data(Section):
    """From raw files to examples."""

    sources: Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]
    """Where rows come from; all are read, in this order."""
    benchmarks: Annotated[tuple[Source, ...], Field(strict=False)] = ()
    """What the model will be measured on elsewhere: a train example that shares a run of 13 words with it is dropped."""
    dir: str | None = None
    """Where the prepared data go. Default: data/<name of the recipe>."""
    max_length: Count = 2048
    """Capacity of a pack, in tokens; also the longest example that is kept whole."""
    overlong: Literal["drop", "shorten", "error"] = "drop"
    """An example longer than max_length is dropped and counted; or loses its oldest exchanges whole, then the end of its
    question, never a part of an answer; or is refused. (pretrain: cut into pieces, always.)"""
    html: bool = False
    """Texts are HTML: keep what a reader would see."""
    min_characters: Annotated[int, Field(ge=0)] = 1
    """Shorter texts are dropped and counted."""
    max_characters: Count = 1_000_000
    """Longer texts are dropped and counted, before they cost time."""
    bad_rows: Fraction = 0.05
    """The share of rows that may be unreadable or no example: they are counted and kept in quarantine.jsonl; above it
    `prepare` stops and says what is wrong. Streaming: the training stops, once 1,000 rows were met."""
    near_duplicates: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.8
    """Texts whose Jaccard similarity of word 5-grams is at least this say the same; null: only equal texts do."""
    near_duplicate_policy: Literal["drop", "keep_together"] = "drop"
    """Of texts that say the same the first stays; or all stay, in one split."""
    validation_fraction: Fraction = 0.1
    """Share of the examples held out for validation."""
    test_fraction: Fraction = 0.1
    """Share of the examples held out for the final test."""
    stratify: Literal["auto", "label", "source", "none"] = "auto"
    """What has the same shares in each split; auto: the label, and where there is none, the source."""
    seed: Seed = 0
    """Seed of the split. The order in training has its own: train.seed."""
    streaming: bool = False
    """Train directly on sources too large to prepare: no de-duplication, no split (sources with `into: validation` or
    `into: test` are prepared); needs train.steps."""
    block: Count = 1024
    """Streaming: rows that are shuffled and packed together."""
    workers: Count | None = None
    """Processes that `prepare` uses; null: one for each core. The result is the same."""

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must be below 1: nothing would be left to train on")
        return self

    @model_validator(mode="after")
    def _benchmarks_are_only_read(self) -> Self:
        for number, source in enumerate(self.benchmarks):
            if source.into or source.group or source.columns or source.weight != 1:
                raise ValueError(f"benchmarks.{number}: is only compared with; into, group, columns and weight say nothing there")
        return self


class Lora(Section):
    """The adapter (arXiv 2106.09685); the names are PEFT's."""

    r: Count = 16
    """Rank."""
    lora_alpha: Count = 16
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """0 keeps the run exact on any machines. Above 0 the noise of a micro-batch is seeded by (seed, step, its first slot): the
    same ranks draw the same through kills; another train.micro_batch_size, or another kind of device, draws other noise."""
    target_modules: Literal["all-linear"] | Strings = "all-linear"
    """all-linear: every linear layer but the output head. Or a list of names, e.g. [q_proj, v_proj]; the longer end of a name
    chooses one layer: layers.0.self_attn.q_proj."""
    modules_to_save: Strings = ()
    """Layers that are trained whole, beside the adapter, and saved with it: [embed_tokens, lm_head] after new tokens were added.
    They take 16 bytes a parameter in training (float32, gradient, two moments), and must not be in 4 bits or share their matrix (a base
    that ties its embedding to its head)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    init_lora_weights: bool = True
    """true: B starts at zero, the model unchanged. false: B random, for tests of gradients."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_or_names(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            raise ValueError(
                f"must be all-linear or a list of names, e.g. [q_proj, v_proj], but it is {value!r} (patterns are not supported)"
            )
        return value

    @model_validator(mode="after")
    def _a_layer_is_trained_one_way(self) -> Self:
        targets = () if isinstance(self.target_modules, str) else self.target_modules
        twice = next((name for name in self.modules_to_save if name in targets), None)
        if twice is not None:
            raise ValueError(f"modules_to_save: {twice} is in target_modules, too; it can have an adapter or be trained whole, not both")
        return self
