"""A data directory, as `prepare` leaves it and everything after it reads it.

data/<name>/
  train/ validation/ test/   Arrow shards, memory-mapped: see shards.py
  assignments.arrow          content or group -> split, of all that was ever prepared here
  quarantine.jsonl           every row that was left out: place, source, reason, because, text
  manifest.json              counts that add up, what went in, fingerprints
  audit.md                   the same for a person to read before paying for GPUs
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from mistral_dist.config import Data, Recipe, Source, digest
from mistral_dist.data import sources
from mistral_dist.data.encode import Encoder
from mistral_dist.data.remote import is_remote
from mistral_dist.data.shards import read_shards
from mistral_dist.data.split import TEST, VALIDATION
from mistral_dist.errors import DataError
from mistral_dist.files import read_json

FORMAT = 2
"""Of the data directory; one of another format is prepared again."""


@dataclass(frozen=True)
class Prepared:
    """A data directory that fits the recipe."""

    path: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Changes when the examples, their order in the shards, or their encoding change."""
        return str(self.manifest["fingerprint"])

    def split(self, name: str) -> datasets.Dataset:
        """The records of one split, memory-mapped."""
        return read_shards(self.path / name)

    def lengths(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets) of each record of a split, int32 [records]."""
        return self.column(name, "tokens"), self.column(name, "targets")

    def weights(self, name: str, sources: Sequence[Source]) -> np.ndarray:
        """How often an epoch shows each record of a split, float64 [records]."""
        return np.array([source.weight for source in sources])[self.column(name, "source")]

    def label_counts(self, name: str) -> dict[str, int]:
        """How many records of a split have each label."""
        return {entry["values"]: entry["counts"] for entry in self.split(name).data.column("label").value_counts().to_pylist()}

    def column(self, name: str, column: str) -> np.ndarray:
        """One column of a split."""
        return self.split(name).data.column(column).to_numpy()


def open_prepared(recipe: Recipe, encoder: Encoder) -> Prepared:
    """The recipe's data directory. Raises DataError, naming the command, where it is missing or of another recipe."""
    manifest = read_manifest(recipe.data_dir)
    remedy = "run `mistral-dist prepare` with this recipe and these overrides"
    if manifest is None:
        raise DataError(f"data.dir: {recipe.data_dir}: no prepared data there; {remedy} first")
    if manifest["key"] != key(recipe, encoder):
        other = "prepared with another data or task section, tokenizer or version"
        raise DataError(f"data.dir: {recipe.data_dir}: {other}; {remedy} to replace it, or set data.dir=... to keep both")
    return Prepared(recipe.data_dir, manifest)


def sources_changed(recipe: Recipe, prepared: Prepared) -> bool:
    """Whether a file of this machine was added or written to since the data were prepared.

    Remote ones are not looked at, nor is one missed that is no longer there: what is prepared can be trained on without them.
    """
    here = [source for source in prepared_sources(recipe) if source.path is not None and not is_remote(source.path)]
    before = prepared.manifest["sources"]
    try:
        now = sources.state(here)
    except DataError:
        return False
    return any(before.get(path) != seen for path, seen in now.items())


def current(recipe: Recipe, encoder: Encoder) -> Prepared | None:
    """The recipe's data directory, if `prepare` would make the same of it now. Asks the servers of remote sources."""
    manifest = read_manifest(recipe.data_dir)
    if manifest is None or manifest["key"] != key(recipe, encoder):
        return None
    return Prepared(recipe.data_dir, manifest) if manifest["sources"] == sources.state(prepared_sources(recipe)) else None


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a data directory, or None where there is none."""
    return read_json(path / "manifest.json")


def prepared_sources(recipe: Recipe) -> tuple[Source, ...]:
    """What `prepare` reads: the sources, but those that training streams, and the benchmarks."""
    return (*(source for source in recipe.data.sources if is_prepared(source, recipe.data)), *recipe.data.benchmarks)


def is_prepared(source: Source, data: Data) -> bool:
    """Whether `prepare` reads a source; of a stream only what is held out."""
    return not data.streaming or source.into in (VALIDATION, TEST)


def key(recipe: Recipe, encoder: Encoder) -> str:
    """What decides the content of a data directory, beside the sources themselves."""
    data = recipe.data.model_dump(mode="json", exclude={"dir", "workers", "bad_rows", "block"})
    for source in data["sources"]:
        del source["weight"]  # how often a train example is shown is the plan's
    task = recipe.task.model_dump(mode="json", exclude={"class_weights"})
    return digest({"format": FORMAT, "task": task, "data": data, "encoding": encoder.fingerprint})
