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
import pyarrow as pa

from mistral_dist.config import Recipe, Source, digest
from mistral_dist.data import sources
from mistral_dist.data.encode import Encoder
from mistral_dist.data.remote import is_remote
from mistral_dist.data.shards import read_shards
from mistral_dist.data.sift import Known
from mistral_dist.data.split import SPLITS
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
    """Whether a file of this machine was added, removed or written to since the data were prepared.

    Remote ones are not looked at: what is prepared can be trained on without a network.
    """
    here = [source for source in all_sources(recipe) if source.path is not None and not is_remote(source.path)]
    before = {path: seen for path, seen in prepared.manifest["sources"].items() if not is_remote(path)}
    return bool(before != sources.state(here))


def is_current(recipe: Recipe, encoder: Encoder) -> bool:
    """Whether the recipe's data directory is what `prepare` would make of it now. Asks the servers of remote sources."""
    manifest = read_manifest(recipe.data_dir)
    if manifest is None or manifest["key"] != key(recipe, encoder):
        return False
    return bool(manifest["sources"] == sources.state(all_sources(recipe)))


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a data directory, or None where there is none."""
    return read_json(path / "manifest.json")


def all_sources(recipe: Recipe) -> tuple[Source, ...]:
    """What `prepare` reads: the sources and the benchmarks."""
    return (*recipe.data.sources, *recipe.data.benchmarks)


def key(recipe: Recipe, encoder: Encoder) -> str:
    """What decides the content of a data directory, beside the sources themselves."""
    data = recipe.data.model_dump(mode="json", exclude={"dir", "workers", "bad_rows"})
    for source in data["sources"]:
        del source["weight"]  # how often a train example is shown is the plan's
    return digest({"format": FORMAT, "task": recipe.task.model_dump(mode="json"), "data": data, "encoding": encoder.fingerprint})


# assignments


def assigned(recipe: Recipe) -> Known:
    """Earlier assignments in this directory, where they were made with the same rule."""
    manifest = read_manifest(recipe.data_dir)
    file = recipe.data_dir / "assignments.arrow"
    if manifest is None or manifest.get("split") != split_rule(recipe) or not file.is_file():
        return Known()
    with pa.ipc.open_file(str(file)) as reader:
        columns = reader.read_all().to_pydict()
    splits = dict(zip(columns["id"], (SPLITS[number] for number in columns["split"]), strict=True))
    return Known(splits, {id: group for id, group in zip(columns["id"], columns["group"], strict=True) if group})


def write_assignments(folder: Path, known: Known) -> None:
    """Write down which split each document and group has: id, the group of the document (0 for none), split."""
    table = pa.table(
        {
            "id": pa.array(list(known.splits), pa.uint64()),
            "group": pa.array([known.groups.get(id, 0) for id in known.splits], pa.uint64()),
            "split": pa.array([SPLITS.index(name) for name in known.splits.values()], pa.int8()),
        }
    )
    with pa.ipc.new_file(str(folder / "assignments.arrow"), table.schema) as writer:
        writer.write_table(table)


def split_rule(recipe: Recipe) -> dict[str, Any]:
    """What assigns documents to splits; with another rule all are assigned anew."""
    data = recipe.data
    return {
        "seed": data.seed,
        "validation_fraction": data.validation_fraction,
        "test_fraction": data.test_fraction,
        "stratify": data.stratify,
    }
