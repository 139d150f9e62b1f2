"""Arrow files: the records of a split as training reads them, memory-mapped, and the spool that they pass through."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "document": pa.string(),
        "place": pa.string(),
        "source": pa.int16(),
        "text": pa.string(),
        "label": pa.string(),
        "messages": pa.string(),
        "tools": pa.string(),
        "ends": pa.bool_(),
        "tokens": pa.int32(),
        "targets": pa.int32(),
    }
)
"""A record: an example that fits into a pack, the document that it is (a piece of), and its lengths."""
SHARD_BYTES = 512 * 2**20
"""A new shard begins after this much: small enough to copy, large enough that a terabyte is 2,000 files."""


class Writer:
    """Writes record batches into the shards of a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._shards = 0
        self._bytes = 0
        self._stream: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch."""
        if self._stream is None or self._bytes > SHARD_BYTES:
            self.close()
            self._stream = pa.ipc.new_stream(str(self._folder / f"{self._shards:05}.arrow"), SCHEMA)
            self._shards, self._bytes = self._shards + 1, 0
        self._stream.write_batch(batch)
        self._bytes += batch.nbytes

    def close(self) -> None:
        """Finish the last shard."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def read_shards(folder: Path) -> datasets.Dataset:
    """The records of a split, memory-mapped."""
    files = sorted(folder.glob("*.arrow"))
    if not files:
        return datasets.Dataset(pa.table({name: pa.array([], SCHEMA.field(name).type) for name in SCHEMA.names}))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


class Spool:
    """Cleaned records on their way to a split: written once in the order of the sources, then read in any order."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: Any = pa.ipc.new_file(str(file), SCHEMA)
        self._reader: Any = None
        self._starts = np.zeros(1, np.int64)
        self._lengths: list[int] = []
        self._columns: dict[tuple[int, str], Any] = {}

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch."""
        self._stream.write_batch(batch)
        self._lengths.append(batch.num_rows)

    def finish(self) -> None:
        """No more batches; from now on the records can be read."""
        self._stream.close()
        self._reader = pa.ipc.open_file(pa.memory_map(str(self._file)))
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All records, in order."""
        for number in range(self._reader.num_record_batches):
            yield self._reader.get_batch(number)

    def record(self, number: int, names: Sequence[str] = tuple(SCHEMA.names)) -> dict[str, Any]:
        """One record, or some columns of it."""
        batch = int(np.searchsorted(self._starts, number, side="right")) - 1
        row = number - int(self._starts[batch])
        return {name: self._column(batch, name)[row].as_py() for name in names}

    def _column(self, batch: int, name: str) -> Any:
        """A column of a batch. Kept: it lies in the mapped file, and to open it again for each record takes 15 us."""
        found = self._columns.get((batch, name))
        if found is None:
            found = self._columns[batch, name] = self._reader.get_batch(batch).column(name)
        return found
