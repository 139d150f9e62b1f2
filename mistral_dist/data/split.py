"""Documents -> train | validation | test: stable, stratified, families together.

A family's place is decided by the hash of its first document, never by its position: within each stratum the families
stand in the order of that hash and fill the splits up to their shares. Those that have a place keep it, so that new rows
never move old ones; the new ones go where most is missing.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Family:
    """Documents that must not be parted; one as a rule."""

    id: str
    stratum: str = ""
    size: int = 1
    place: str | None = None
    """The split that it has already."""


def split(families: Sequence[Family], shares: Mapping[str, float], seed: int) -> list[str]:
    """The split of each family. `shares` of the splits add up to 1."""
    strata: dict[str, list[int]] = defaultdict(list)
    for number, family in enumerate(families):
        strata[family.stratum].append(number)
    result = [""] * len(families)
    for members in strata.values():
        members.sort(key=lambda number: _hash(families[number].id, seed))
        _fill(members, families, shares, result)
    return result


def _fill(members: Sequence[int], families: Sequence[Family], shares: Mapping[str, float], result: list[str]) -> None:
    """Give each family, in order, to the split that is furthest below its share."""
    counts = dict.fromkeys(shares, 0)
    for number in members:
        place = families[number].place
        if place is not None:
            result[number] = place
            counts[place] += families[number].size
    done = sum(counts.values())
    for number in members:
        if not result[number]:
            done += families[number].size
            name = max(shares, key=lambda name: shares[name] * done - counts[name])
            result[number] = name
            counts[name] += families[number].size


def _hash(id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{id}".encode()).digest()
