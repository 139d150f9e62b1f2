"""Leaving together: what asks a rank to stop, and how all ranks come to know it at the same place.

A rank may be asked by a signal, or by the clock (train.max_seconds). Before each forward and before each backward stands one
all-reduce of a single integer on a process group of its own (gloo, on the CPU), whose result is read at the next: it costs 0.4 ms
(median, two ranks on two busy cores), waits for no GPU, and never for a rank that is less than half a micro-step behind. So a
request that comes in a forward is known to all ranks after the backward, and one that comes in a backward after the next forward.
"""

import datetime
import signal
import time
from collections.abc import Callable

import torch

from mistral_dist.errors import StopAgreed
from mistral_dist.runtime.process import StopRequest

TIME_IS_OVER = 1
"""Below what stands for a signal, which says more: its number and this."""
SAVE_FLOOR = 30.0
"""Seconds kept for a save before one was measured; a tenth of the whole where that is less."""


class Deadline:
    """When a launch has to stop by itself, so that one save still fits in."""

    def __init__(self, started: float, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`started` by the same clock; None never ends."""
        self._started, self._seconds, self._clock = started, seconds, clock
        self._last: float | None = None
        self._longest = 0.0

    def lap(self) -> None:
        """A forward or a backward begins."""
        now = self._clock()
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now

    def rest(self) -> None:
        """What comes now is neither."""
        self._last = None

    def is_over(self, save: float | None, saves: int = 1) -> bool:
        """Whether it is time to stop; `save`: seconds that the longest save took; `saves`: how many are still to be waited for.

        Twice the longest lap is reserved beside them: that in which the time ends and the one that follows.
        """
        if self._seconds is None:
            return False
        reserve = saves * (min(SAVE_FLOOR, self._seconds / 10) if save is None else save)
        return self._clock() - self._started + reserve + 2 * self._longest >= self._seconds


class Control:
    """One rank's part in agreeing to stop."""

    def __init__(self, world_size: int, stop: StopRequest, deadline: Deadline, timeout: datetime.timedelta) -> None:
        """A collective: makes the group. All ranks then call `check` and `agree` in the same order."""
        self._stop, self.deadline = stop, deadline
        self._group = torch.distributed.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        self._asked = False
        """Whether this rank was asked, or all have agreed: that does not change any more."""
        self._pending: tuple[torch.Tensor, torch.distributed.Work | None] | None = None

    def check(self, save: float | None = None, saves: int = 1) -> None:
        """Before a forward or a backward. Raises StopAgreed where any rank was asked before it last came here.

        `save`, `saves`: as for `Deadline.is_over`.
        """
        self.deadline.lap()
        self._refuse(self._read())
        self._post(save, saves)
        if self._group is None:
            self._refuse(self._read())

    def agree(self, save: float | None = None, saves: int = 1) -> None:
        """Where ranks may wait: between the stages of loading. Raises StopAgreed where any rank was asked before."""
        self.deadline.rest()
        before = self._read()
        self._post(save, saves)
        self._refuse(max(before, self._read()))

    def is_asked(self, save: float | None = None, saves: int = 1) -> bool:
        """Whether this rank was asked, by a signal or by the clock."""
        self._asked = self._asked or self._stop.signal is not None or self.deadline.is_over(save, saves)
        return self._asked

    def finish(self) -> None:
        """Read what is still on its way, before the group is destroyed. A request that came so late finds the run at its end."""
        self._read()

    def _post(self, save: float | None, saves: int) -> None:
        asked = TIME_IS_OVER if self.is_asked(save, saves) else 0
        if self._stop.signal is not None:
            asked = TIME_IS_OVER + int(self._stop.signal)
        flag = torch.tensor([asked], dtype=torch.int32)
        work = None
        if self._group is not None:
            work = torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (flag, work)

    def _read(self) -> int:
        if self._pending is None:
            return 0
        (flag, work), self._pending = self._pending, None
        if work is not None:
            work.wait()
        return int(flag)

    def _refuse(self, asked: int) -> None:
        if asked:
            self._asked = True
            raise StopAgreed(
                "by train.max_seconds" if asked == TIME_IS_OVER else f"on request ({signal.Signals(asked - TIME_IS_OVER).name})"
            )
