"""How long the order of a 1,000,000-example epoch takes to find, and to find again at 90 % of it after a kill.

    python benchmarks/plan.py

The first figure is the plan; the second is all that stands between a checkpoint at 90 % and the first micro-batch: the
plan again, and the examples of one step (from memory: reading and encoding them is benchmarks/encode.py's). Lengths are
log-normal: short chats packed into 2,048 tokens, long-tailed ones into 4,096.
"""

import time
from collections.abc import Sequence

import numpy as np

from mistral_dist.data.cursor import Cursor
from mistral_dist.data.encode import Encoded
from mistral_dist.data.stream import Plan, Stream

EXAMPLES = 1_000_000
BATCH = 32
KINDS = {"short": (4.6, 0.6, 2048), "long-tailed": (6.4, 1.0, 4096)}
"""Mean and deviation of the logarithm of the length, and the capacity of a pack."""
BARS = {"plan": 5.0, "seek": 2.0}
"""Seconds."""


class Blank:
    """Examples of the right lengths."""

    def __init__(self, lengths: np.ndarray) -> None:
        self._lengths = lengths

    def encode(self, indices: Sequence[int]) -> list[tuple[str, Encoded]]:
        """As many zeros as each example has tokens."""
        return [(str(n), Encoded(np.zeros(self._lengths[n], np.int32), [1])) for n in indices]


def main() -> None:
    """Print the table; fail where a bar is missed."""
    print(f"{'lengths':<14}{'mean':>6}{'fill':>8}{'plan s':>9}{'seek s':>9}")
    missed = False
    for name, (mean, deviation, capacity) in KINDS.items():
        lengths = np.clip(np.random.default_rng(0).lognormal(mean, deviation, EXAMPLES).astype(np.int32), 8, capacity)
        started = time.perf_counter()
        plan = _plan(lengths, capacity)
        seconds = {"plan": time.perf_counter() - started}
        cursor = Cursor(plan.steps * 9 // 10 * BATCH)
        started = time.perf_counter()
        stream = Stream(
            _plan(lengths, capacity), Blank(lengths), (lengths, np.ones_like(lengths)), rank=0, world_size=1, micro_batch_size=1
        )
        work = next(stream.from_cursor(cursor))
        assert work is not None
        seconds["seek"] = time.perf_counter() - started
        assert work.step == plan.steps * 9 // 10
        fill = lengths.sum() / (plan.packs * capacity)
        print(f"{name:<14}{lengths.mean():>6.0f}{fill:>8.2%}{seconds['plan']:>9.2f}{seconds['seek']:>9.2f}")
        missed |= any(seconds[what] > bar for what, bar in BARS.items())
    if missed:
        raise SystemExit("a bar was missed")


def _plan(lengths: np.ndarray, capacity: int) -> Plan:
    return Plan(lengths, capacity=capacity, seed=0, epochs=1, global_batch_size=BATCH)


if __name__ == "__main__":
    main()
