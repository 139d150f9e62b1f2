"""Raw rows -> documents by columns, a chunk at a time, on all cores.

A chunk's result depends on the chunk alone, and results come in the order of the rows: what `prepare` makes does not
depend on the number of processes. The first chunks are done here, so that small data wait for no process to start.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from mistral_dist.config import Recipe
from mistral_dist.data.cleaner import Cleaner
from mistral_dist.data.columns import Chunk, Cleaned, clean_chunk
from mistral_dist.data.duplicates import Benchmark
from mistral_dist.data.encode import load_encoder
from mistral_dist.data.example import Row
from mistral_dist.errors import DataError
from mistral_dist.runtime.process import serve_parent

ROWS = 1000
"""Rows in a chunk: some 0.2 s of work, 1,000 times what it costs to send it."""
BYTES = 8 * 2**20
"""A chunk of long rows ends here."""
ALONE = 8
"""Chunks that are done before other processes are started, which takes them some 5 s."""


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
