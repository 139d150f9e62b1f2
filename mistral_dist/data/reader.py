"""Rows of a stream -> encoded examples, a block at a time; what is dropped is said."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mistral_dist.data.cleaner import Cleaner
from mistral_dist.data.encode import Encoded
from mistral_dist.data.example import BadRow, Rejected, Row
from mistral_dist.data.lanes import Read
from mistral_dist.data.stream import Drop


class BlockReader:
    """Reads blocks the way `prepare` reads chunks."""

    def __init__(self, cleaner: Cleaner, label_weights: Mapping[str, float] | None = None) -> None:
        """`label_weights`: what a target of each label counts in the loss, where it is not 1."""
        self._cleaner = cleaner
        self._weights = label_weights or {}

    def block(self, rows: Sequence[tuple[int, Row]]) -> Read:
        """The examples of a block, and what was dropped."""
        examples: list[tuple[str, Encoded]] = []
        drops: list[tuple[int, Drop]] = []
        for n, found in enumerate(self._cleaner.documents(rows)):
            if isinstance(found, Rejected):
                drops.append((n, Drop(rows[n][1].place, found.reason, found.because, isinstance(found, BadRow))))
            else:
                weight = self._weights.get(found.example.label, 1.0)
                examples += [(piece.id, replace(piece.encoded, weight=weight)) for piece in found.pieces]
        return Read(examples, drops)
