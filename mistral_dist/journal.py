"""Files of lines that grow, and are cut back where steps are made again: metrics, data order, quarantine.

A full disk or a kill does not spoil them.

A line that cannot be written waits in memory for the next one. What was written is kept, too, until an fsync has said
that it is on the disk: a failed one may have lost it, and is silent about it the second time. Every byte has its place in the
file, so writing it again changes nothing, and each line is there exactly once, in order.
"""

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mistral_dist.errors import MachineError

LIMIT = 16 * 1024 * 1024
"""Bytes that may wait: some 50,000 lines of metrics."""
BLOCK = 64 * 1024
"""Bytes read at once on the way back from the end."""


class Journal:
    """One file of JSON lines; in one that is cut back they have a field `step` that never falls. One thread appends; any may sync."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._handle: int | None = None
        self._changing = threading.Lock()
        self._syncing = threading.Lock()
        self._kept = bytearray()
        """What is not known to be on the disk."""
        self._begin = 0
        """Where that begins in the file."""
        self._written = 0
        """Bytes of it that the file has taken."""

    def append(self, entry: dict[str, Any], hold: bool = False) -> None:
        """Add a line; with `hold`, in memory alone until the next call without.

        Raises MachineError where the file has taken nothing for so long that more than `LIMIT` bytes wait.
        """
        with self._changing:
            self._kept += (json.dumps(entry) + "\n").encode()
            if not hold:
                with suppress(OSError):
                    self._write()
        if len(self._kept) > LIMIT:
            try:
                self.sync()
            except OSError as error:
                waiting = f"{len(self._kept):,} bytes of it wait in memory, which is the limit"
                raise MachineError(f"{self._file}: {error.strerror}; {waiting}; make room and run the same command again") from error

    def sync(self) -> None:
        """Have every line on the disk. Raises OSError where that cannot be; the lines are kept."""
        with self._syncing:
            with self._changing:
                if not self._kept:
                    return
                self._write()
                handle, length = os.dup(self._open()), len(self._kept)
            try:
                os.fsync(handle)  # not under the lock: the step loop goes on appending
            except OSError:
                with self._changing:
                    self._written = 0
                raise
            finally:
                os.close(handle)
            with self._changing:
                del self._kept[:length]
                self._begin, self._written = self._begin + length, self._written - length
                self._close_if_idle()

    def cut_back(self, step: float) -> None:
        """Drop the lines after a step (as `step_of` counts), and a last line half written. Costs what these cost, at any length of it."""
        with self._syncing, self._changing:
            if not self._kept and not self._file.is_file():
                return
            handle = self._open()
            kept = bytes(self._kept)
            del self._kept[_end_of(lambda start, size: kept[start : start + size], len(kept), step) :]
            if not self._kept:
                self._begin = _end_of(lambda start, size: os.pread(handle, size, start), self._begin, step)
            self._written = min(self._written, len(self._kept))
            os.ftruncate(handle, self._begin + self._written)
            os.fsync(handle)
            self._close_if_idle()

    def _open(self) -> int:
        if self._handle is None:
            self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            self._begin, self._written = os.fstat(self._handle).st_size, 0
        return self._handle

    def _write(self) -> None:
        handle = self._open()
        while self._written < len(self._kept):
            # a disk that fills up takes the first part of a line: the rest follows when there is room
            self._written += os.pwrite(handle, bytes(self._kept[self._written :]), self._begin + self._written)

    def _close_if_idle(self) -> None:
        if not self._kept and self._handle is not None:
            os.close(self._handle)
            self._handle = None


def step_of(line: str | bytes) -> float:
    """The step of a line, half a step more for what was measured after it ("eval"); infinity for one that is no such line."""
    try:
        entry = json.loads(line)
        return float(entry["step"]) + (0.5 if "eval" in entry else 0.0)
    except (ValueError, KeyError, TypeError):
        return float("inf")


def reached(file: Path) -> float:
    """The step of the last whole line of a file, as `step_of` counts; 0 where there is none."""
    try:
        with open(file, "rb") as stream:
            stream.seek(max(0, file.stat().st_size - BLOCK))
            lines = stream.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0.0
    return max((step for line in lines if (step := step_of(line)) < float("inf")), default=0.0)


def _end_of(read: Callable[[int, int], bytes], end: int, step: float) -> int:
    """Where the last whole line up to a step ends, looked for from `end` backwards; `read(start, size)` gives the bytes."""
    start, tail = end, b""
    while True:
        begin = tail.rfind(b"\n", 0, max(len(tail) - 1, 0)) + 1  # of the last line
        if begin == 0 and start > 0:
            size = min(BLOCK, start)
            start -= size
            tail = read(start, size) + tail
            continue
        if tail.endswith(b"\n") and step_of(tail[begin:]) <= step:
            return start + len(tail)
        if begin == 0:
            return 0
        tail = tail[:begin]
