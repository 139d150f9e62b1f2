"""Data sets of the Hugging Face hub -> shards of rows, read by the `datasets` library.

Not streaming, what `mistral-dist fetch` has put on this machine is read, without a network. Streaming, rows come over the
network; the library retries on its own, and where it gives up or stands still, reading begins anew and goes on after the
last row that was given out. Rows are not shuffled, so that they come in the same order each time.
"""

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
MOST = 256
"""Rows that are held until they are taken."""
SIGN_SECONDS = 0.5
"""While rows are skipped, a sign of life is given each so many seconds."""

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
        if not number and self.parts == 1:
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
        while (batch := feed.take()) is not None:
            yield batch
    finally:
        feed.leave()


class _Feed:
    """Reads in a thread of its own, which may hang. What it has read can be taken, also if what follows hangs or fails."""

    def __init__(self, begin: Callable[[], Iterable[Values]], skip: int) -> None:
        self._begin, self._skip = begin, skip
        self._changed = threading.Condition()
        self._rows: list[Values] = []
        self._signs = 0
        self._is_left = False
        self._has_ended = False
        self._error: BaseException | None = None

    def take(self) -> list[Values] | None:
        """The rows that are there, as soon as there are some; none as a sign of life; None at the end."""
        with self._changed:
            signs = self._signs
            if not self._changed.wait_for(lambda: self._rows or self._has_ended or self._signs > signs, STALL_SECONDS):
                raise TimeoutError(f"no row in {STALL_SECONDS:.3g} s")
            rows, self._rows = self._rows, []
            self._changed.notify()
            if rows or not self._has_ended:
                return rows
            if self._error is not None:
                raise self._error
            return None

    def leave(self) -> None:
        """Nobody takes any more."""
        with self._changed:
            self._is_left = True
            self._changed.notify()

    def run(self) -> None:
        """Read until the end, or until it is left."""
        error = None
        try:
            self._read()
        except BaseException as failure:
            error = failure
        with self._changed:
            self._has_ended, self._error = True, error
            self._changed.notify()

    def _read(self) -> None:
        until = time.monotonic() + SIGN_SECONDS
        for number, values in enumerate(self._begin()):
            if number < self._skip and time.monotonic() < until:
                continue
            until = time.monotonic() + SIGN_SECONDS
            with self._changed:
                self._changed.wait_for(lambda: len(self._rows) < MOST or self._is_left)
                if self._is_left:
                    return
                if number < self._skip:
                    self._signs += 1
                else:
                    self._rows.append(values)
                self._changed.notify()
