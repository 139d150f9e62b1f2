"""Data sets of the Hugging Face hub -> shards of rows, read by the `datasets` library.

Not streaming, what `mistral-dist fetch` has put on this machine is read, without a network. Streaming, rows come over the
network; the library retries on its own, and where it gives up or stands still, reading begins anew and goes on after the
last row that was given out. Rows are not shuffled, so that they come in the same order each time.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mistral_dist import hub, retry
from mistral_dist.config import Source
from mistral_dist.data.example import Row
from mistral_dist.errors import DataError

STALL_SECONDS = 90.0
"""Without any row, after which a stream is begun anew; longer than a file's, since the library retries within it."""
BATCH = 256
BATCH_SECONDS = 0.5
"""Rows that are handed over at once, and how long they may be collected."""

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class HubShard:
    """A data set, or one of the parts that its files divide it into."""

    source: Source
    part: int = 0
    parts: int = 1

    @property
    def name(self) -> str:
        """Name, subset, split and part."""
        part = f" part {self.part + 1} of {self.parts}" if self.parts > 1 else ""
        return f"{'/'.join(filter(None, (self.source.name, self.source.subset)))}[{self.source.split}]{part}"

    def rows(self, start: int = 0) -> Iterator[tuple[int, Row]]:
        """Rows from a position (a row's number) on, each with the position after it."""
        rows = resumed(self._stream, self.name, start) if self.source.streaming else self._downloaded(start)
        number = start
        for number, values in rows:
            yield number, Row(f"{self.name} row {number}", values)
        if not number:
            raise DataError(f"{self.name}: empty; remove it from data.sources")

    def _stream(self) -> Iterable[Values]:
        data = hub.load_data(self.source)
        return data.shard(num_shards=self.parts, index=self.part) if self.parts > 1 else data

    def _downloaded(self, start: int) -> Iterator[tuple[int, Values]]:
        data = hub.load_data(self.source)
        number = start
        try:
            for number, values in enumerate(data.skip(start) if start else data, start + 1):
                yield number, values
        except Exception as error:  # whatever the reader of a foreign format raises
            raise DataError(f"{self.name}: cannot be read after row {number}: {retry.reason(error)}; fetch it again") from error


def shards(source: Source) -> list[HubShard]:
    """One for each of the data set's files where it is streamed; else the whole is one."""
    parts = hub.load_data(source).num_shards if source.streaming else 1
    return [HubShard(source, part, parts) for part in range(parts)]


def resumed(begin: Callable[[], Iterable[Values]], name: str, start: int) -> Iterator[tuple[int, Values]]:
    """Numbered rows after row `start` of what `begin` begins, begun again where it breaks or stands still."""
    patience, number = retry.Patience(), start
    while True:
        since = time.monotonic()
        try:
            for batch in _fed(begin, number):
                for values in batch:
                    number += 1
                    yield number, values
                if batch:
                    patience.rest()
                since = time.monotonic()
            return
        except Exception as error:
            try:
                patience.after(error, time.monotonic() - since)
            except Exception:
                remedy = "try again, or set data.sources.streaming=false and fetch it"
                raise DataError(f"{name}: cannot be read after row {number}: {retry.reason(error)} ({patience}); {remedy}") from error


def _fed(begin: Callable[[], Iterable[Values]], skip: int) -> Iterator[list[Values]]:
    """Batches of rows, empty ones while rows are skipped. Raises TimeoutError where nothing comes for STALL_SECONDS."""
    feed = _Feed(begin, skip)
    threading.Thread(target=feed.run, daemon=True).start()
    try:
        while (what := feed.next()) is not None:
            if isinstance(what, BaseException):
                raise what
            yield what
    finally:
        feed.is_left.set()


class _Feed:
    """Reads in a thread of its own, which may hang; at the end it gives None or what went wrong."""

    def __init__(self, begin: Callable[[], Iterable[Values]], skip: int) -> None:
        self.is_left = threading.Event()
        self._begin, self._skip = begin, skip
        self._ready: queue.Queue[list[Values] | BaseException | None] = queue.Queue(maxsize=2)
        self._batch: list[Values] = []

    def next(self) -> list[Values] | BaseException | None:
        """What it gives next."""
        try:
            return self._ready.get(timeout=STALL_SECONDS)
        except queue.Empty:
            raise TimeoutError(f"no row in {STALL_SECONDS:.3g} s") from None

    def run(self) -> None:
        """Read until the end, or until nobody listens."""
        try:
            self._read()
            end = None
        except BaseException as error:
            end = error
        self._give_batch()  # what came before a failure is not read twice
        self._give(end)

    def _read(self) -> None:
        until = time.monotonic() + BATCH_SECONDS
        for number, values in enumerate(self._begin()):
            if number >= self._skip:
                self._batch.append(values)
            if len(self._batch) == BATCH or time.monotonic() > until:
                self._give_batch()
                until = time.monotonic() + BATCH_SECONDS
            if self.is_left.is_set():
                return

    def _give_batch(self) -> None:
        batch, self._batch = self._batch, []
        self._give(batch)

    def _give(self, what: list[Values] | BaseException | None) -> None:
        while not self.is_left.is_set():
            try:
                return self._ready.put(what, timeout=0.2)
            except queue.Full:
                continue
