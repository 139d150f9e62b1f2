"""A chunk of rows -> its documents by columns, as they go to the spool and to memory, and what was left out."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from mistral_dist.data.cleaner import Cleaner, Document
from mistral_dist.data.duplicates import PERMUTATIONS, sketch
from mistral_dist.data.example import BadRow, Example, Rejected, Row, to_record
from mistral_dist.data.fit import Piece
from mistral_dist.data.shards import SCHEMA

SHOWN = 500
"""Characters of a dropped text that go to quarantine."""

Chunk = list[tuple[int, Row]]


@dataclass
class Cleaned:
    """What became of a chunk of rows. The arrays are per document."""

    batch: pa.RecordBatch
    """Records, in the order of the rows; some documents have several."""
    ids: np.ndarray
    labels: list[str]
    sources: np.ndarray
    groups: np.ndarray
    sketches: np.ndarray
    records: np.ndarray
    """int32: how many records each document has"""
    rows: Counter[int] = field(default_factory=Counter)
    """Rows read, by source."""
    changed: Counter[str] = field(default_factory=Counter)
    """Documents repaired, by what was done."""
    rejected: list[dict[str, Any]] = field(default_factory=list)
    """What was left out: place, source, reason, because, text; and `bad` where it was no example at all."""


def clean_chunk(chunk: Chunk, cleaner: Cleaner) -> Cleaned:
    """Clean a chunk, and lay out what was found by columns."""
    documents: list[Document] = []
    rejected: list[dict[str, Any]] = []
    for (source, row), found in zip(chunk, cleaner.documents(chunk), strict=True):
        if isinstance(found, Rejected):
            rejected.append(_rejected(row, source, found))
        else:
            documents.append(found)
    result = _columns(documents, with_sketches=cleaner.recipe.data.near_duplicates is not None)
    result.rows, result.rejected = Counter(source for source, _ in chunk), rejected
    result.changed = Counter(change for document in documents for change in document.changes)
    result.changed["shortened"] = sum(piece.shortened for document in documents for piece in document.pieces)
    return result


def _columns(documents: Sequence[Document], *, with_sketches: bool) -> Cleaned:
    records = [_record(document, piece) for document in documents for piece in document.pieces]
    columns = {name: [record[name] for record in records] for name in SCHEMA.names}
    examples = [document.example for document in documents]
    sketches = [sketch(example.gist) for example in examples] if with_sketches else []
    return Cleaned(
        batch=pa.RecordBatch.from_pydict(columns, schema=SCHEMA),
        ids=np.array([int(document.id, 16) for document in documents], np.uint64),
        labels=[example.label for example in examples],
        sources=np.array([example.source for example in examples], np.int16),
        groups=np.array([group_id(example.group) for example in examples], np.uint64),
        sketches=np.array(sketches, np.uint32).reshape(len(examples), PERMUTATIONS if with_sketches else 0),
        records=np.array([len(document.pieces) for document in documents], np.int32),
    )


def _record(document: Document, piece: Piece) -> dict[str, Any]:
    lengths = {"tokens": len(piece.encoded.ids), "targets": len(piece.encoded.targets)}
    return {"id": piece.id, "document": document.id, **to_record(piece.example), **lengths}


def group_id(group: str) -> int:
    """A number for a group, the same on every machine; 0 for none."""
    return int(Example("", text=f"group\x1f{group}").id, 16) if group else 0


def entry(place: str, source: int, reason: Rejected, text: str) -> dict[str, Any]:
    """A line of the quarantine."""
    found = {"place": place, "source": source, "reason": reason.reason, "because": reason.because, "text": text[:SHOWN]}
    return {**found, "bad": True} if isinstance(reason, BadRow) else found


def _rejected(row: Row, source: int, reason: Rejected) -> dict[str, Any]:
    payload = row.payload
    if reason.text:
        return entry(row.place, source, reason, reason.text)
    try:
        text = (
            payload[: 4 * SHOWN].decode("utf-8", "replace")
            if isinstance(payload, bytes)
            else json.dumps(payload, ensure_ascii=False, default=str)
        )
    except (RecursionError, TypeError):
        text = ""
    return entry(row.place, source, reason, text.encode("utf-8", "replace").decode("utf-8"))
