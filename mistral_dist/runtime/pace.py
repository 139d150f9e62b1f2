"""How long this rank's own forwards take, without waiting for anyone.

Forwards exchange nothing without ZeRO and under ZeRO-1 and 2, so their time is the rank's own; under ZeRO-3 each layer is
gathered from all ranks, all take as long as the slowest, and nobody stands out. On a GPU the time is taken by events in its
own queue, read when they have passed: nothing waits.
"""

import statistics
import time
from collections import deque

import torch

KEPT = 40
"""Newest forwards that count."""


class Pace:
    """Seconds of the newest forwards."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._seconds: deque[float] = deque(maxlen=KEPT)
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=KEPT)
        self._began: float | torch.cuda.Event | None = None

    def begin(self) -> None:
        """A forward begins."""
        self._began = self._mark()

    def end(self) -> None:
        """It has ended, or on a GPU: all of it is queued."""
        began, self._began = self._began, None
        if isinstance(began, float):
            self._seconds.append(time.monotonic() - began)
        elif began is not None:
            self._running.append((began, self._mark()))  # type: ignore[arg-type]
            while self._running and self._running[0][1].query():
                first, last = self._running.popleft()
                self._seconds.append(first.elapsed_time(last) / 1000)

    def median(self, enough: int) -> float | None:
        """Median seconds of a forward; None before there are enough of them."""
        seconds = list(self._seconds)
        return statistics.median(seconds) if len(seconds) >= enough else None

    def _mark(self) -> "float | torch.cuda.Event":
        if not self._is_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
