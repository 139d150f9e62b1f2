"""Which documents stay, and in which split: duplicates, contradictions, families, leakage.

Decided on a few columns that fit into memory at any size (some 550 bytes a document, 512 of them its sketch); texts are
looked at only where two documents may be near-duplicates.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from mistral_dist.config import Data
from mistral_dist.data.assignments import Known
from mistral_dist.data.duplicates import Families, candidates, near_pairs, similarity, superfluous
from mistral_dist.data.split import SPLITS, TEST, TRAIN, VALIDATION, Family, split

DROPPED = -1
KNOWN_BEFORE, IN_ANOTHER_GROUP, NEW = 2, 3, 4
RANK = {TEST: 0, VALIDATION: 1, TRAIN: NEW, None: NEW}
"""Who stays where two say the same: a test example of the user's own, a validation example, what was there before (in its
group, then in another), the rest."""


@dataclass(frozen=True)
class Documents:
    """What is known of each document, by columns."""

    ids: np.ndarray
    """uint64 [documents]: of the content"""
    labels: np.ndarray
    """int32 [documents]: the label's number, -1 for none"""
    sources: np.ndarray
    """int16 [documents]: the source's place in the recipe"""
    groups: np.ndarray
    """uint64 [documents]: of the user's group, 0 for none"""
    sketches: np.ndarray
    """uint32 [documents, 128], or [documents, 0] where near-duplicates are not looked for"""
    text: Callable[[int], str]
    """A document's gist."""
    place: Callable[[int], str]
    """Where a document stands."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Sifted:
    """What became of each document."""

    splits: np.ndarray
    """int8 [documents]: the split's number in SPLITS, or DROPPED"""
    dropped: list[tuple[int, str, str]]
    """(document, reason, because), in the order of the documents"""
    leakage: dict[str, int]
    """How often something stands on two sides: equal texts, near-duplicates, groups. Measured on the result."""


@dataclass
class _Sifter:
    """Documents in the order of who stays, and those that are still in."""

    documents: Documents
    data: Data
    sides: np.ndarray
    """object [documents]: the split that a document has already, or that its group has, or None"""
    placed: np.ndarray
    """bool [documents]: whether it is the document's own: it is not new"""
    rank: np.ndarray
    """int8 [documents]: the lower stays where two say the same"""
    alive: np.ndarray
    """int64: the documents that are still in, in the order of who stays"""
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    stand_ins: list[tuple[int, int]] = field(default_factory=list)
    """(document, one that says the same and was dropped): the groups of the one are also the other's"""

    @classmethod
    def of(cls, documents: Documents, data: Data, known: Known) -> Self:
        """All documents, each with the place that it or its group has already."""
        own = [source.into for source in data.sources]
        sides = np.array([own[source] for source in documents.sources.tolist()], dtype=object)
        rank = np.array([RANK[side] for side in sides.tolist()], dtype=np.int8)
        placed = np.array([side is not None for side in sides.tolist()], dtype=bool)
        if known.splits:
            for document, (id, group) in enumerate(zip(documents.ids.tolist(), documents.groups.tolist(), strict=True)):
                if sides[document] is not None:
                    continue
                if id in known.splits and known.groups.get(id, 0) == group:
                    sides[document], placed[document], rank[document] = known.splits[id], True, KNOWN_BEFORE
                else:
                    rank[document] = IN_ANOTHER_GROUP if id in known.splits else NEW
                    # new, or of another group than before: then the group decides
                    sides[document] = (known.splits.get(group) if group else None) or known.splits.get(id)
        return cls(documents, data, sides, placed, rank, alive=np.lexsort((np.arange(len(documents)), rank)))

    def drop(self, members: Iterable[tuple[int, str, str]]) -> int:
        """Take documents out; return how many."""
        found = list(members)
        self.dropped += found
        self.alive = self.alive[~np.isin(self.alive, [document for document, _, _ in found])]
        return len(found)


def sift(documents: Documents, data: Data, known: Known) -> Sifted:
    """Drop what says the same or contradicts itself, and give the rest to the splits; what was assigned before is kept."""
    sifter = _Sifter.of(documents, data, known)
    sifter.drop(_contradictions(sifter))
    sifter.drop(_repetitions(sifter))
    near = data.near_duplicates if len(documents) and documents.sketches.shape[1] else None
    if near is not None and data.near_duplicate_policy == "drop":
        # of a long run each is compared with the first; where that went, a second look finds those that were near it
        while sifter.drop(_near_repetitions(sifter, near)):
            pass
    together: list[tuple[int, int]] = []
    if near is not None and data.near_duplicate_policy == "keep_together":
        together = list(near_pairs(documents.sketches, sifter.alive, near, documents.text))
    sifter.drop(_own_splits_that_touch(sifter, together))
    sifter.drop(_between_two_splits(sifter, together))
    splits = _assign(sifter, together)
    sifter.dropped.sort()
    return Sifted(splits, sifter.dropped, _leakage(documents, splits, near, grouping=any(source.group for source in data.sources)))


def _contradictions(sifter: _Sifter) -> Iterator[tuple[int, str, str]]:
    """Texts under more than one label: which one is right cannot be known here. What has precedence stays, if it agrees with itself."""
    alive, documents = sifter.alive, sifter.documents
    _, text = np.unique(documents.ids[alive], return_inverse=True)
    pairs = np.unique(np.stack([text, documents.labels[alive]]), axis=1)
    kinds = np.bincount(pairs[0], minlength=1)
    torn: dict[int, list[int]] = {}
    for number in np.flatnonzero(kinds[text] > 1).tolist():
        torn.setdefault(int(text[number]), []).append(int(alive[number]))
    for members in torn.values():
        best = [document for document in members if sifter.rank[document] == sifter.rank[members[0]]]
        agreed = len({int(documents.labels[document]) for document in best}) == 1 and len(best) < len(members)
        for document in members:
            if not (agreed and document in best):
                other = next(one for one in members if documents.labels[one] != documents.labels[document])
                yield document, "conflicting_labels", f"the same text has another label at {_told(sifter, other)}"


def _repetitions(sifter: _Sifter) -> Iterator[tuple[int, str, str]]:
    _, first, text = np.unique(sifter.documents.ids[sifter.alive], return_index=True, return_inverse=True)
    for number in np.flatnonzero(first[text] != np.arange(len(text))).tolist():
        document, other = int(sifter.alive[number]), int(sifter.alive[first[text[number]]])
        sifter.stand_ins.append((other, document))
        yield document, "duplicate", f"same as {_told(sifter, other)}"


def _near_repetitions(sifter: _Sifter, threshold: float) -> Iterator[tuple[int, str, str]]:
    """Near-duplicates of one that stays; what the user holds out is taken as it is, and only checked against the rest."""
    documents, sources = sifter.documents, sifter.data.sources

    def both_stay(one: int, other: int) -> bool:
        sides = {sources[documents.sources[document]].into for document in (one, other)}
        return len(sides) == 1 and sides <= {VALIDATION, TEST}

    for document, other in superfluous(documents.sketches, sifter.alive, threshold, documents.text, both_stay).items():
        sifter.stand_ins.append((other, document))
        yield document, "near_duplicate", f"like {_told(sifter, other)}"


def _told(sifter: _Sifter, document: int) -> str:
    side = sifter.sides[document]
    return sifter.documents.place(document) + (f" ({side})" if side else "")


# families


def _families(sifter: _Sifter, members: np.ndarray, together: list[tuple[int, int]], *, own_groups_only: bool = False) -> Families:
    """The families of some documents: near-duplicates, those of a group, and those of a group through a dropped copy."""
    families = Families(len(sifter.documents))
    inside = np.zeros(len(sifter.documents), dtype=bool)
    inside[members] = True
    for one, other in together:
        if inside[one] and inside[other]:
            families.join(one, other)
    first: dict[int, int] = {}
    groups = sifter.documents.groups
    grouped = members[groups[members] > 0].tolist()
    through = [] if own_groups_only else [pair for pair in sifter.stand_ins if inside[pair[0]]]
    for document, named in [*zip(grouped, grouped, strict=True), *through]:
        if groups[named]:
            families.join(first.setdefault(int(groups[named]), document), document)
    return families


def _sides_of(sifter: _Sifter, families: Families, members: np.ndarray) -> dict[int, dict[str, int]]:
    """Family -> the splits that its members have already, each with its first member."""
    found: dict[int, dict[str, int]] = {}
    for document in members.tolist():
        if sifter.sides[document] is not None:
            found.setdefault(families.of(document), {}).setdefault(sifter.sides[document], document)
    return found


def _own_splits_that_touch(sifter: _Sifter, together: list[tuple[int, int]]) -> Iterator[tuple[int, str, str]]:
    """Documents with a place, of a family that has members in a split more precious: test before validation before train."""
    placed = sifter.alive[sifter.placed[sifter.alive]]
    # a dropped copy's group does not speak against a place: a new copy of an old row must not drive out another old row
    families = _families(sifter, placed, together, own_groups_only=True)
    sides = _sides_of(sifter, families, placed)
    for document in placed.tolist():
        touched = sides[families.of(document)]
        best = min(touched, key=lambda side: RANK[side])
        if sifter.sides[document] != best:
            other = sifter.documents.place(touched[best])
            yield document, "leaks", f"is in {sifter.sides[document]}, and belongs together with {other} in {best}"


def _between_two_splits(sifter: _Sifter, together: list[tuple[int, int]]) -> Iterator[tuple[int, str, str]]:
    """New documents that would join a family of two splits: to take one in would move another."""
    families = _families(sifter, sifter.alive, together)
    sides = _sides_of(sifter, families, sifter.alive)
    for document in sifter.alive.tolist():
        touched = sides.get(families.of(document), {})
        if len(touched) > 1 and not sifter.placed[document]:
            others = " and ".join(f"{sifter.documents.place(other)} in {side}" for side, other in sorted(touched.items()))
            yield document, "between_splits", f"belongs together with {others}"


def _assign(sifter: _Sifter, together: list[tuple[int, int]]) -> np.ndarray:
    """The split of each document, int8 [documents]."""
    data, documents = sifter.data, sifter.documents
    found = _families(sifter, sifter.alive, together)
    torn = {family for family, sides in _sides_of(sifter, found, sifter.alive).items() if len(sides) > 1}
    members: dict[int, list[int]] = {}
    for document in sifter.alive.tolist():
        family = found.of(document)
        # all that is left of a torn family has a place, and keeps it
        members.setdefault(-1 - document if family in torn else family, []).append(document)
    families = [
        Family(
            # not the first in the files: the split must not depend on their order
            id=f"{documents.ids[own].min():016x}",
            stratum=_stratum(documents, own[int(documents.ids[own].argmin())], data),
            size=len(own),
            place=next((side for side in sifter.sides[own].tolist() if side is not None), None),
        )
        for own in members.values()
    ]
    shares = {TRAIN: 1.0 - data.validation_fraction - data.test_fraction, VALIDATION: data.validation_fraction, TEST: data.test_fraction}
    splits = np.full(len(documents), DROPPED, dtype=np.int8)
    for own, name in zip(members.values(), split(families, shares, data.seed), strict=True):
        splits[own] = SPLITS.index(name)
    return splits


def _stratum(documents: Documents, document: int, data: Data) -> str | None:
    """What has the same shares in each split; splits of the user's own take no part in the shares."""
    label, source = int(documents.labels[document]), int(documents.sources[document])
    if data.sources[source].into is not None:
        return None
    if data.stratify == "none":
        return ""
    return f"source {source}" if data.stratify == "source" or label < 0 else f"label {label}"


def _leakage(documents: Documents, splits: np.ndarray, threshold: float | None, *, grouping: bool) -> dict[str, int]:
    """Counted on the result: none is taken on trust from what made the splits."""
    kept = np.flatnonzero(splits != DROPPED)
    found = {"equal": _on_two_sides(documents.ids[kept], splits[kept])}
    if grouping:
        grouped = kept[documents.groups[kept] > 0]
        found["groups"] = _on_two_sides(documents.groups[grouped], splits[grouped])
    if threshold is not None:
        found["near"] = 0
        for later, earlier in candidates(documents.sketches, kept, threshold):
            document = int(kept[later])
            for other in kept[earlier][splits[kept[earlier]] != splits[document]].tolist():
                found["near"] += similarity(documents.text(document), documents.text(other)) >= threshold
    return found


def _on_two_sides(keys: np.ndarray, splits: np.ndarray) -> int:
    """How many keys occur in more than one split."""
    pairs = np.unique(np.stack([keys.astype(np.uint64), splits.astype(np.uint64)]), axis=1)
    _, counts = np.unique(pairs[0], return_counts=True)
    return int((counts > 1).sum())


def remembered(known: Known, documents: Documents, sifted: Sifted, data: Data) -> Known:
    """All assignments so far; but for splits of the user's own, which the recipe keeps."""
    divided = np.array([source.into is None for source in data.sources])[documents.sources]
    kept = np.flatnonzero((sifted.splits != DROPPED) & divided)
    names = [SPLITS[number] for number in sifted.splits[kept].tolist()]
    ids, groups = documents.ids[kept].tolist(), documents.groups[kept].tolist()
    by_group = {group: name for group, name in zip(groups, names, strict=True) if group}
    own_groups = {id: group for id, group in zip(ids, groups, strict=True) if group}
    present = set(ids)
    before = {id: group for id, group in known.groups.items() if id not in present}
    return Known({**known.splits, **dict(zip(ids, names, strict=True)), **by_group}, before | own_groups)
