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
    stratum: str | None = ""
    """What has the same shares in each split; None: takes no part in the shares, and has a place."""
    size: int = 1
    place: str | None = None
    """The split that it has already."""


def split(families: Sequence[Family], shares: Mapping[str, float], seed: int) -> list[str]:
    """The split of each family. `shares` of the splits add up to 1."""
    strata: dict[str, list[int]] = defaultdict(list)
    result = [family.place or "" for family in families]
    for number, family in enumerate(families):
        if family.stratum is not None:
            strata[family.stratum].append(number)
    overall = _Tally(shares)
    for _, members in sorted(strata.items()):
        members.sort(key=lambda number: _hash(families[number].id, seed))
        _fill(members, families, overall, result)
    return result


class _Tally:
    """How far each split is below its share."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self.shares = shares
        self.counts = dict.fromkeys(shares, 0)
        self.done = 0

    def add(self, name: str, size: int) -> None:
        """A family has gone to a split."""
        self.counts[name] += size
        self.done += size

    def missing(self, name: str, size: int) -> float:
        """What the split will lack, in documents, once a family of this size has gone somewhere."""
        return self.shares[name] * (self.done + size) - self.counts[name]


def _fill(members: Sequence[int], families: Sequence[Family], overall: _Tally, result: list[str]) -> None:
    """Give each family of a stratum, in order, to the split that lacks most: in the stratum, and in all strata so far.

    The second evens out what large families leave over: of five in a stratum none may fit a tenth, but of fifty, five do.
    """
    own = _Tally(overall.shares)

    def give(number: int, name: str) -> None:
        result[number] = name
        own.add(name, families[number].size)
        overall.add(name, families[number].size)

    for number in members:
        place = families[number].place
        if place is not None:
            give(number, place)
    for number in members:
        if families[number].place is None:
            size = families[number].size
            give(number, max(own.shares, key=lambda name: own.missing(name, size) + overall.missing(name, size)))


def _hash(id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{id}".encode()).digest()
