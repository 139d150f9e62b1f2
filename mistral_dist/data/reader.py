"""Rows of a stream -> encoded examples, a block at a time; what is dropped is said."""

# replaced at merge: `shards` by data/sources.py, the chain of `BlockReader` by rows.py, clean.py, fit.py and encode.py

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mistral_dist.config import Recipe, Source
from mistral_dist.data import clean, sources
from mistral_dist.data.encode import Encoded, Encoder
from mistral_dist.data.lanes import Read, Shard
from mistral_dist.data.stream import Drop
from mistral_dist.errors import DataError


def shards(source: Source) -> list[Shard]:
    """The shards of a source: for now, of JSON Lines files."""
    return [_JsonLines(str(file)) for file in sources.local_files(source)]


@dataclass(frozen=True)
class _JsonLines:
    name: str

    def rows(self, start: int = 0) -> Iterator[tuple[int, tuple[str, bytes]]]:
        with open(self.name, "rb") as file:
            file.seek(start)
            for line in iter(file.readline, b""):
                yield file.tell(), (f"{self.name}@byte {file.tell() - len(line)}", line)


class BlockReader:
    """Rows -> examples -> encoded: for now, texts one by one."""

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None:
        self._recipe, self._encoder = recipe, encoder

    def block(self, rows: Sequence[tuple[int, tuple[str, bytes]]]) -> Read:
        """The examples of a block, and what was dropped."""
        examples: list[tuple[str, Encoded]] = []
        drops: list[tuple[int, Drop]] = []
        for n, (_, (place, line)) in enumerate(rows):
            try:
                example = clean.read_example(sources.Row(place, json.loads(line)), self._recipe.task)
                example = replace(example, text=clean.repair(example.text))
                encoded = self._encoder.encode(example)
            except (DataError, ValueError) as error:
                drops.append((n, Drop(place, "unreadable", str(error), True)))
                continue
            if len(encoded.ids) > self._recipe.data.max_length:
                drops.append((n, Drop(place, "too_long", f"{len(encoded.ids)} tokens", False)))
            else:
                examples.append((example.id, encoded))
        return Read(examples, drops)
