"""Examples -> train | validation | test: stable, stratified by label, none in two.

An example's place is decided by the hash of its content, never by its position: within each label the examples stand in
the order of that hash and fill the splits up to their shares. Assignments made before are kept as they are, so that new
rows never move old ones; the new ones go where most is missing.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from mistral_dist.data.example import Example

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")


def split(
    examples: Sequence[Example], validation: float, test: float, seed: int, assigned: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The split of each example, by id.

    `validation` and `test` are shares in [0, 1); `assigned` holds earlier assignments, by id, which are kept.
    """
    shares = {TRAIN: 1.0 - validation - test, VALIDATION: validation, TEST: test}
    strata: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        strata[example.label].append(example.id)
    result: dict[str, str] = {}
    for ids in strata.values():
        result |= _fill(sorted(ids, key=lambda example: _hash(example, seed)), shares, assigned or {})
    return result


def _fill(ids: Sequence[str], shares: Mapping[str, float], assigned: Mapping[str, str]) -> dict[str, str]:
    """Give each id, in order, to the split that is furthest below its share."""
    result = {id: assigned[id] for id in ids if id in assigned}
    counts = Counter(result.values())
    for id in ids:
        if id not in result:
            done = sum(counts.values()) + 1
            result[id] = max(SPLITS, key=lambda name: shares[name] * done - counts[name])
            counts[result[id]] += 1
    return result


def _hash(id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{id}".encode()).digest()
