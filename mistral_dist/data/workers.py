"""Raw rows -> cleaned, measured, sketched documents, a chunk at a time, on all cores.

A chunk's result depends on the chunk alone, and results come in the order of the rows: what `prepare` makes does not
depend on the number of processes. The first chunks are done here, so that small data wait for no process to start.
"""

import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from mistral_dist.config import Recipe
from mistral_dist.data.cleaner import Cleaner, Document
from mistral_dist.data.duplicates import PERMUTATIONS, Benchmark, sketch
from mistral_dist.data.encode import load_encoder
from mistral_dist.data.example import BadRow, Example, Rejected, Row, to_record
from mistral_dist.data.fit import Piece
from mistral_dist.data.shards import SCHEMA
from mistral_dist.errors import DataError
from mistral_dist.runtime.process import serve_parent

ROWS = 1000
"""Rows in a chunk: some 0.2 s of work, 1,000 times what it costs to send it."""
BYTES = 8 * 2**20
"""A chunk of long rows ends here."""
ALONE = 8
"""Chunks that are done before other processes are started, which takes them some 5 s."""
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


# on all cores


def chunks(rows: Iterable[tuple[int, Row]]) -> Iterator[Chunk]:
    """Rows in chunks of about the same work."""
    chunk: Chunk = []
    size = 0
    for source, row in rows:
        chunk.append((source, row))
        size += _size(row)
        if len(chunk) == ROWS or size > BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(row: Row) -> int:
    if isinstance(row.payload, bytes):
        return len(row.payload)
    return sum(len(value) for value in row.payload.values() if isinstance(value, str))


def clean_all(rows: Iterable[tuple[int, Row]], cleaner: Cleaner, benchmark_texts: Sequence[str]) -> Iterator[Cleaned]:
    """Clean all rows, in order. Raises DataError where a process dies, which is how a full memory shows."""
    waiting = chunks(rows)
    for chunk in islice(waiting, ALONE):
        yield clean_chunk(chunk, cleaner)
    processes = cleaner.recipe.data.workers or len(os.sched_getaffinity(0))
    if processes == 1:
        yield from (clean_chunk(chunk, cleaner) for chunk in waiting)
        return
    following = next(waiting, None)
    if following is not None:
        yield from _in_processes(following, waiting, cleaner.recipe, benchmark_texts, processes)


def _in_processes(first: Chunk, rest: Iterator[Chunk], recipe: Recipe, benchmark_texts: Sequence[str], processes: int) -> Iterator[Cleaned]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of Arrow and of the tokenizer
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(recipe.model_dump_json(), list(benchmark_texts)))
    running: deque[Future[Cleaned]] = deque()
    try:
        running.append(pool.submit(_work, first))
        for chunk in rest:
            running.append(pool.submit(_work, chunk))
            if len(running) > 2 * processes:  # no more than these are in memory
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        remedy = f"memory may be full: data.workers={max(1, processes // 2)} needs less"
        raise DataError(f"data.workers={processes}: a process that cleans rows was killed; {remedy}") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_cleaner: Cleaner


def _start(recipe: str, benchmark_texts: list[str]) -> None:
    global _cleaner
    serve_parent()
    loaded = Recipe.model_validate_json(recipe)
    _cleaner = Cleaner(loaded, load_encoder(loaded), Benchmark(benchmark_texts))


def _work(chunk: Chunk) -> Cleaned:
    return clean_chunk(chunk, _cleaner)
