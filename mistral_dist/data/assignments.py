"""Which split each document and group was given, kept for as long as the rule stays: new rows never move old ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from mistral_dist.config import Data, Recipe
from mistral_dist.data.split import SPLITS
from mistral_dist.files import read_json

FILE = "assignments.arrow"


@dataclass(frozen=True)
class Known:
    """What was assigned before."""

    splits: Mapping[int, str] = field(default_factory=dict)
    """Content or group id -> split."""
    groups: Mapping[int, int] = field(default_factory=dict)
    """Content id -> the group that it had, where it had one."""


def rule(data: Data) -> dict[str, Any]:
    """What assigns documents to splits; with another rule all are assigned anew."""
    return {
        "seed": data.seed,
        "validation_fraction": data.validation_fraction,
        "test_fraction": data.test_fraction,
        "stratify": data.stratify,
        "groups": sorted({source.group for source in data.sources if source.group}),
        "near_duplicate_policy": data.near_duplicate_policy,
    }


def read(folder: Path, recipe: Recipe) -> Known:
    """The assignments of a data directory; none where there are none, or where they were made with another rule."""
    manifest = read_json(folder / "manifest.json")
    file = folder / FILE
    if manifest is None or manifest.get("split") != rule(recipe.data) or not file.is_file():
        return Known()
    with pa.ipc.open_file(str(file)) as reader:
        columns = reader.read_all().to_pydict()
    splits = dict(zip(columns["id"], (SPLITS[number] for number in columns["split"]), strict=True))
    return Known(splits, {id: group for id, group in zip(columns["id"], columns["group"], strict=True) if group})


def write(folder: Path, known: Known) -> None:
    """Write the assignments down: id, the group of the document (0 for none), split."""
    table = pa.table(
        {
            "id": pa.array(list(known.splits), pa.uint64()),
            "group": pa.array([known.groups.get(id, 0) for id in known.splits], pa.uint64()),
            "split": pa.array([SPLITS.index(name) for name in known.splits.values()], pa.int8()),
        }
    )
    with pa.ipc.new_file(str(folder / FILE), table.schema) as writer:
        writer.write_table(table)
