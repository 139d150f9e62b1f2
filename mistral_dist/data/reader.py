"""Rows of a stream -> encoded examples, a block at a time; what is dropped is said."""

from collections.abc import Sequence

from mistral_dist.data.cleaner import Cleaner
from mistral_dist.data.encode import Encoded
from mistral_dist.data.example import BadRow, Rejected, Row
from mistral_dist.data.lanes import Read
from mistral_dist.data.stream import Drop


class BlockReader:
    """Reads blocks the way `prepare` reads chunks."""

    def __init__(self, cleaner: Cleaner) -> None:
        self._cleaner = cleaner

    def block(self, rows: Sequence[tuple[int, Row]]) -> Read:
        """The examples of a block, and what was dropped."""
        examples: list[tuple[str, Encoded]] = []
        drops: list[tuple[int, Drop]] = []
        for n, found in enumerate(self._cleaner.documents(rows)):
            if isinstance(found, Rejected):
                drops.append((n, Drop(rows[n][1].place, found.reason, found.because, isinstance(found, BadRow))))
            else:
                examples += [(piece.id, piece.encoded) for piece in found.pieces]
        return Read(examples, drops)
