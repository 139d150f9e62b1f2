"""Raw rows -> cleaned, measured, sketched documents, a chunk at a time, on all cores.

A chunk's result depends on the chunk alone, and results come in the order of the rows: what `prepare` makes does not
depend on the number of processes. The first chunks are done here, so that small data wait for no process to start.
"""

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
from mistral_dist.data.clean import tidy
from mistral_dist.data.duplicates import PERMUTATIONS, Benchmark, sketch
from mistral_dist.data.encode import Encoder, load_encoder
from mistral_dist.data.example import BadRow, Example, Rejected, Row, to_record
from mistral_dist.data.fit import Piece, fit
from mistral_dist.data.rows import read_example
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


@dataclass(frozen=True)
class Cleaner:
    """Turns chunks of rows into documents."""

    recipe: Recipe
    encoder: Encoder
    benchmark: Benchmark

    def clean(self, chunk: Chunk) -> Cleaned:
        """Read, repair, filter, measure and sketch the examples of a chunk."""
        examples: list[Example] = []
        rejected: list[dict[str, Any]] = []
        changed: Counter[str] = Counter()
        for source, row in chunk:
            try:
                example, changes = tidy(read_example(row, self.recipe.task, self.recipe.data.sources[source], source), self.recipe.data)
                self._refuse_benchmark(example)
                examples.append(example)
                changed.update(changes)
            except Rejected as reason:
                rejected.append(_rejected(row, source, reason))
        fitted = fit(examples, self.encoder, self.recipe.data)
        documents = [(example, pieces) for example, pieces in zip(examples, fitted, strict=True) if not isinstance(pieces, Rejected)]
        for example, pieces in zip(examples, fitted, strict=True):
            if isinstance(pieces, Rejected):
                rejected.append(entry(example.place, example.source, pieces, example.content))
        changed["shortened"] += sum(piece.shortened for _, pieces in documents for piece in pieces)
        found = _documents(documents, with_sketches=self.recipe.data.near_duplicates is not None)
        found.rows, found.changed, found.rejected = Counter(source for source, _ in chunk), changed, rejected
        return found

    def _refuse_benchmark(self, example: Example) -> None:
        """What may be trained on must not say what a benchmark asks; validation and test examples may."""
        if self.recipe.data.sources[example.source].into in (None, "train"):
            run = self.benchmark.run_in(example.content)
            if run is not None:
                raise Rejected("in_benchmark", f"shares {run!r} with a benchmark")


def _documents(documents: Sequence[tuple[Example, list[Piece]]], *, with_sketches: bool) -> Cleaned:
    records = [record for example, pieces in documents for record in _records(example, pieces)]
    columns = {name: [record[name] for record in records] for name in SCHEMA.names}
    examples = [example for example, _ in documents]
    sketches = [sketch(example.content) for example in examples] if with_sketches else []
    return Cleaned(
        batch=pa.RecordBatch.from_pydict(columns, schema=SCHEMA),
        ids=np.array([int(example.id, 16) for example in examples], np.uint64),
        labels=[example.label for example in examples],
        sources=np.array([example.source for example in examples], np.int16),
        groups=np.array([group_id(example.group) for example in examples], np.uint64),
        sketches=np.array(sketches, np.uint32).reshape(len(examples), PERMUTATIONS if with_sketches else 0),
        records=np.array([len(pieces) for _, pieces in documents], np.int32),
    )


def _records(example: Example, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
    for number, piece in enumerate(pieces, 1):
        name = example.id if len(pieces) == 1 else f"{example.id}-{number}"
        lengths = {"tokens": piece.tokens, "targets": piece.targets}
        yield {"id": name, "document": example.id, **to_record(piece.example), **lengths}


def group_id(group: str) -> int:
    """A number for a group, the same on every machine; 0 for none."""
    return int(Example("", text=f"group\x1f{group}").id, 16) if group else 0


def entry(place: str, source: int, reason: Rejected, text: str) -> dict[str, Any]:
    """A line of the quarantine."""
    found = {"place": place, "source": source, "reason": reason.reason, "because": reason.because, "text": text[:SHOWN]}
    return {**found, "bad": True} if isinstance(reason, BadRow) else found


def _rejected(row: Row, source: int, reason: Rejected) -> dict[str, Any]:
    payload = row.payload
    text = payload[: 4 * SHOWN].decode("utf-8", "replace") if isinstance(payload, bytes) else str(payload)
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
        yield cleaner.clean(chunk)
    processes = cleaner.recipe.data.workers or len(os.sched_getaffinity(0))
    if processes == 1:
        yield from map(cleaner.clean, waiting)
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
    return _cleaner.clean(chunk)
