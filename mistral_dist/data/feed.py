"""What training is fed with: the prepared data after a plan, or a stream by its lanes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mistral_dist.config import Data, Recipe, digest
from mistral_dist.data import sources
from mistral_dist.data.cleaner import Cleaner
from mistral_dist.data.encode import Encoded, Encoder, load_encoder
from mistral_dist.data.example import BadRow, from_record
from mistral_dist.data.held_out import HeldOut
from mistral_dist.data.lanes import Lanes, Rules, Streamed
from mistral_dist.data.prepared import Prepared, open_prepared
from mistral_dist.data.reader import BlockReader
from mistral_dist.data.split import TEST, TRAIN, VALIDATION
from mistral_dist.data.stream import Plan, Stream
from mistral_dist.data.weights import label_weights
from mistral_dist.errors import DataError


@dataclass(frozen=True)
class Feed:
    """What one rank trains on, step by step, and what it is."""

    stream: Stream | Lanes
    fingerprint: str
    """Changes when the data change: a run goes on with the data that it began with."""
    place: str
    """Where the data are, in words."""
    about: str
    """What they are, as the model card says it."""
    held_out: str = ""
    """The fingerprint of the prepared data that hold what is not trained on; empty where nothing is held out."""
    encoding: str = ""
    """The encoder's fingerprint: tokenizer, format and task."""
    validation: HeldOut | None = None
    """What is validated on; None without train.eval_steps."""


def open_feed(recipe: Recipe, encoder: Encoder, rank: int, world_size: int) -> Feed:
    """The recipe's data as this rank sees them. Raises DataError where they are missing."""
    if recipe.data.streaming:
        return _streamed(recipe, encoder, rank, world_size)
    return _prepared(recipe, open_prepared(recipe, encoder), encoder, rank, world_size)


def has_held_out(data: Data) -> bool:
    """Whether a source is one of the user's own validation or test."""
    return any(source.into not in (None, TRAIN) for source in data.sources)


def _prepared(recipe: Recipe, prepared: Prepared, encoder: Encoder, rank: int, world_size: int) -> Feed:
    tokens, targets = prepared.lengths(TRAIN)
    plan = Plan(
        tokens,
        capacity=recipe.data.max_length,
        seed=recipe.train.seed,
        epochs=recipe.train.epochs,
        global_batch_size=recipe.train.global_batch_size,
        steps=recipe.train.steps,
        weights=prepared.weights(TRAIN, recipe.data.sources),
    )
    if not plan.steps:
        raise DataError("data.sources: their weights show no example in so few epochs; raise a weight, or train.epochs")
    of_label = label_weights(recipe.task, prepared.label_counts(TRAIN))
    stream = Stream(
        plan,
        _Examples(prepared.split(TRAIN), encoder, of_label),
        (tokens, targets),
        rank=rank,
        world_size=world_size,
        micro_batch_size=recipe.train.packs_per_forward,
        weights=_each(prepared, of_label) if of_label else None,
    )
    counts = prepared.manifest["examples"]
    about = f"{counts[TRAIN]} examples; {counts[TEST]} more were held out for the test"
    validation = _validation(recipe, prepared, rank, world_size)
    return Feed(stream, prepared.fingerprint, str(prepared.path), about, prepared.fingerprint, encoder.fingerprint, validation)


def _streamed(recipe: Recipe, encoder: Encoder, rank: int, world_size: int) -> Feed:
    train, data = recipe.train, recipe.data
    assert train.steps is not None, "the recipe refuses a stream without train.steps"
    streamed = [
        Streamed(index, f"data.sources.{index}", sources.shards(source), source.weight)
        for index, source in enumerate(data.sources)
        if source.into in (None, TRAIN)
    ]
    if not streamed:
        raise DataError("data.sources: none to train on, each has an `into` of its own; add one without")
    lanes = Lanes(
        streamed,
        BlockReader(Cleaner.of(recipe, encoder), label_weights(recipe.task, {})),
        Rules(train.global_batch_size, data.block, data.max_length, train.seed, data.bad_rows),
        train.steps,
        rank,
        world_size,
        train.packs_per_forward,
    )
    held_out = open_prepared(recipe, encoder) if has_held_out(data) else None
    about = "a stream" if held_out is None else f"a stream; {held_out.manifest['examples'][TEST]} examples were held out for the test"
    validation = _validation(recipe, held_out, rank, world_size) if held_out is not None else None
    fingerprint = stream_fingerprint(recipe, encoder, streamed)
    of_held_out = held_out.fingerprint if held_out is not None else ""
    return Feed(lanes, fingerprint, "data.sources", about, of_held_out, encoder.fingerprint, validation)


def refuse_unvalidated(recipe: Recipe, prepared: Prepared) -> None:
    """Raise DataError where a run is to be validated, but the prepared data hold no validation examples."""
    if recipe.train.eval_steps is not None and not prepared.manifest["examples"][VALIDATION]:
        remedy = "raise data.validation_fraction or give more rows, and run `mistral-dist prepare` again, or set train.eval_steps=null"
        raise DataError(f"train.eval_steps={recipe.train.eval_steps}: {prepared.path} holds no validation examples; {remedy}")


def _validation(recipe: Recipe, prepared: Prepared, rank: int, world_size: int) -> HeldOut | None:
    if recipe.train.eval_steps is None:
        return None
    refuse_unvalidated(recipe, prepared)
    # an encoder of its own: while this one is used, a thread encodes the steps to come with the other
    examples = _Examples(prepared.split(VALIDATION), load_encoder(recipe), {})
    return HeldOut(examples, prepared.lengths(VALIDATION), recipe.data.max_length, rank, world_size)


def stream_fingerprint(recipe: Recipe, encoder: Encoder, streamed: Sequence[Streamed]) -> str:
    """Changes with the data section, the encoding, and the names or sizes of the shards.

    What a stream holds cannot be known before it is read: that is as much as can be checked. A shard that is no file of
    this machine has no size here.
    """
    files = [[shard.name, _bytes(Path(shard.name))] for source in streamed for shard in source.shards]
    data = recipe.data.model_dump(mode="json", exclude={"dir", "workers"})
    return digest({"data": data, "shards": files, "encoding": encoder.fingerprint})


def _bytes(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _each(prepared: Prepared, of_label: Mapping[str, float]) -> np.ndarray:
    """What a target of each train record counts in the loss, float64 [records]."""
    labels = list(prepared.label_counts(TRAIN))
    numbers = pc.index_in(prepared.split(TRAIN).data.column("label"), value_set=pa.array(labels))
    return np.array([of_label.get(label, 1.0) for label in labels])[numbers.to_numpy()]


class _Examples:
    """A split, encoded when it is asked for."""

    def __init__(self, split: datasets.Dataset, encoder: Encoder, label_weights: Mapping[str, float]) -> None:
        self._split, self._encoder, self._weights = split, encoder, label_weights

    def encode(self, indices: Sequence[int]) -> list[tuple[str, Encoded]]:
        columns = self._split[list(indices)]
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        encoded = self._encoder.encode_batch([from_record(record) for record in records])
        return [
            (record["id"], replace(_checked(record, found), weight=self._weights.get(record["label"], 1.0)))
            for record, found in zip(records, encoded, strict=True)
        ]


def _checked(record: dict[str, Any], encoded: Encoded | BadRow) -> Encoded:
    """The plan, the loss's denominator and the number of steps stand on the stored lengths."""
    if isinstance(encoded, BadRow) or (len(encoded.ids), len(encoded.targets)) != (record["tokens"], record["targets"]):
        raise DataError(f"{record['place']}: is encoded to another length than when it was prepared; run `mistral-dist prepare` again")
    return encoded
