"""The validation examples as one rank scores them while it trains.

Packed once, best-fit, over all of them: which examples are in which pack depends on no number of ranks. Pack p goes to rank p % W, one
pack to a forward. Every rank has as many forwards, since under ZeRO-3 each is a collective; what is missing is filled by empty
packs, which count nothing.
"""

from collections.abc import Iterator

import numpy as np

from mistral_dist.data.pack import best_fit
from mistral_dist.data.stream import Ahead, Batch, Examples, background, collate


class HeldOut:
    """One rank's share of the validation examples."""

    def __init__(self, examples: Examples, lengths: tuple[np.ndarray, np.ndarray], capacity: int, rank: int, world_size: int) -> None:
        """`lengths`: (tokens, targets) of each example, int [examples]. Raises ValueError for an example above `capacity`."""
        tokens, targets = lengths
        packs = best_fit(tokens.tolist(), capacity)
        self.examples = len(tokens)
        """Of all ranks."""
        self.targets = int(targets.sum())
        """Of all ranks."""
        self.rounds = -(-len(packs) // world_size)
        """Forwards, the same on every rank."""
        self._examples = examples
        self._own = packs[rank::world_size]

    def batches(self) -> Iterator[Batch]:
        """`rounds` batches of one pack each, the same each time; the next is encoded while one is used."""
        with background("validation") as encoding:
            yield from Ahead(map(self._batch, range(self.rounds)), encoding)

    def _batch(self, number: int) -> Batch:
        pack = self._examples.encode(self._own[number]) if number < len(self._own) else []
        batch = collate([encoded for _, encoded in pack])
        return Batch(**batch, ids=((number, tuple(id for id, _ in pack)),) if pack else ())
