"""Lengths -> packs: rows of whole examples up to a capacity.

Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), but nothing is cut. Pure
Python with bisect packs some two million lengths a second, so nothing here is worth optimising.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

MOST = 2**32
"""Packs are fewer than this."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs of indices into `lengths`; each index once, the sum of each pack at most `capacity`.

    Longest first, each into the fullest pack that still has room; ties go to the earlier index and the earlier pack, so
    the result is a pure function of its arguments. Raises ValueError for a length above the capacity.
    """
    packs: list[list[int]] = []
    room: list[int] = []  # free tokens and pack in one number, free * MOST + pack, ascending: half the time of tuples
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    for index in order:
        length = int(lengths[index])
        if length > capacity:
            raise ValueError(f"example {index} has {length} tokens, a pack holds {capacity}")
        found = bisect_left(room, length * MOST)
        if found < len(room):
            free, pack = divmod(room.pop(found), MOST)
        else:
            free, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        insort(room, (free - length) * MOST + pack)
    return packs
