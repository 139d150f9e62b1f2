"""Prepared data and a step -> the micro-batches of this rank.

The order of the data is a pure function of (lengths, seed, step):

    epoch e     all examples, permuted by (seed, e)
    windows     of 4,096 examples, each packed best-fit, its packs permuted by (seed, e, window)
    pack p      of the whole run goes to step p // B, slot p % B, where B is the global batch
    slot s      is served by rank s % W of W; slots beyond B, and those past the run's end, are empty packs

World size, micro-batch and restarts do not occur in the first three lines; that is the whole trick. The cursor is one
integer, the next pack, and travels with each step's work: what a background thread has read ahead is never counted.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Protocol, TypeVar

import numpy as np
import torch

from mistral_dist import retry
from mistral_dist.data.cursor import Cursor
from mistral_dist.data.encode import Encoded
from mistral_dist.data.pack import best_fit

T = TypeVar("T")

WINDOW = 4096
"""Examples packed together: enough for a fill of 98 % and more at any usual length, small enough to pack in 2 ms."""


@dataclass(frozen=True)
class Batch:
    """What one rank feeds one forward: packs laid end to end in one row of T tokens, with N targets.

    Positions restart at each example, which is how every attention implementation knows where to stop.
    """

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T], 0 at the start of each example"""
    predict_from: torch.Tensor
    """int64 [N]: positions in the row whose hidden states predict the targets"""
    targets: torch.Tensor
    """int64 [N]: the token ids to predict"""
    weights: torch.Tensor
    """float32 [N]: 1 for a target, or what its label weighs; 0 for the filler of an empty pack"""
    ids: tuple[tuple[int, tuple[str, ...]], ...]
    """(slot, ids of its examples) of each pack in the row"""

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.position_ids.shape and self.input_ids.shape[0] == 1
        assert self.predict_from.shape == self.targets.shape == self.weights.shape
        assert self.targets.numel() > 0, "a forward without targets would leave a rank out of the backward's collectives"

    @property
    def slot(self) -> int:
        """The first slot in the row; -1 for an empty pack."""
        return self.ids[0][0] if self.ids else -1

    @property
    def packs(self) -> list[int]:
        """Tokens of each pack in the row."""
        starts = (self.position_ids[0] == 0).nonzero()[:, 0].tolist()
        ends = iter([*starts[1:], self.input_ids.shape[1]])
        bounds = [0, *(list(islice(ends, len(ids)))[-1] for _, ids in self.ids)]
        return [end - start for start, end in pairwise(bounds)]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on a device."""
        tensors = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name != "ids"}
        return Batch(**tensors, ids=self.ids)


@dataclass(frozen=True)
class Drop:
    """A row that is not trained on, and why."""

    place: str
    reason: str
    because: str
    is_bad: bool
    """Whether it could not be read or is no example; else a rule of the recipe leaves it out."""


@dataclass(frozen=True)
class Work:
    """One optimizer step, as this rank sees it; the counts, once agreed on, are those of the global batch."""

    step: int
    batches: tuple[Batch, ...]
    targets: int
    weight: float
    """The sum of the targets' weights, which the loss is divided by; their number where no class is weighted."""
    tokens: int
    examples: int
    epoch: float
    """Epochs finished after this step; of a stream, the rounds that its lanes have finished, on average."""
    cursor: Cursor
    """Where the run stands after this step; of the lanes of a stream, those of this rank."""
    dropped: int = 0
    """Rows of a stream that were dropped on the way to this step."""
    drops: tuple[tuple[int, Drop], ...] = ()
    """(slot, drop) of those of this rank's rows that were met for the first time."""


class Plan:
    """Which examples are in which pack, for the whole run."""

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        capacity: int,
        seed: int,
        epochs: int,
        global_batch_size: int,
        steps: int | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        """`lengths`: tokens of each example, int [examples]; `weights`: how often an epoch shows each, float [examples].

        Raises ValueError for a length above `capacity`.
        """
        self.global_batch_size = global_batch_size
        wanted = None if steps is None else steps * global_batch_size
        members: list[np.ndarray] = []
        sizes: list[int] = []
        ends = [0]
        for epoch in range(epochs):
            if wanted is not None and len(sizes) >= wanted:
                break
            order = _order(len(lengths), seed, epoch, weights)
            packed, of_each = _packed(order, lengths, capacity, seed, epoch)
            members.append(packed)
            sizes += of_each
            ends.append(ends[-1] + len(order))
        sizes = sizes[:wanted]
        self.packs = len(sizes)
        self.steps = -(-self.packs // global_batch_size)
        self._members = np.concatenate(members)
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._epoch_ends = np.array(ends)

    def pack(self, number: int) -> np.ndarray:
        """The examples of a pack, by index."""
        return self._members[self._starts[number] : self._starts[number + 1]]

    def step(self, step: int) -> list[np.ndarray]:
        """The packs of a step (from 0), slot by slot; only the run's last step may have fewer than the global batch."""
        first = step * self.global_batch_size
        return [self.pack(number) for number in range(first, min(first + self.global_batch_size, self.packs))]

    def epoch_after(self, step: int) -> float:
        """Epochs finished after a step (from 0)."""
        seen = self._starts[min((step + 1) * self.global_batch_size, self.packs)]
        return float(np.interp(seen, self._epoch_ends, np.arange(len(self._epoch_ends))))


def _order(examples: int, seed: int, epoch: int, weights: np.ndarray | None) -> np.ndarray:
    """The examples of one epoch in their order, int64; each once, or as often as its weight says.

    A weight of w shows an example floor(w) or ceil(w) times, so that after e epochs it was shown e * w times, give or take
    one; which examples are shown in which epoch follows from a permutation that stays.
    """
    if weights is None or (weights == 1).all():
        return permutation(examples, seed, epoch)
    phase = (permutation(examples, seed) + 0.5) / examples
    copies = np.floor((epoch + 1) * weights + phase) - np.floor(epoch * weights + phase)
    shown = np.repeat(np.arange(examples), copies.astype(np.int64))
    return shown[permutation(len(shown), seed, epoch)]


def _packed(order: np.ndarray, lengths: np.ndarray, capacity: int, seed: int, epoch: int) -> tuple[np.ndarray, list[int]]:
    """The packs of one epoch: their examples end to end, and how many each has."""
    members: list[np.ndarray] = [np.empty(0, np.int64)]
    sizes: list[int] = []
    for window, start in enumerate(range(0, len(order), WINDOW)):
        own = order[start : start + WINDOW]
        found = best_fit(lengths[own].tolist(), capacity)
        # best-fit opens its packs from the longest example to the shortest; training should not see them so
        shuffled = [found[n] for n in permutation(len(found), seed, epoch, window + 1)]
        members.append(own[np.fromiter(chain.from_iterable(shuffled), np.int64, len(own))])
        sizes += map(len, shuffled)
    return np.concatenate(members), sizes


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n], decided by the key alone.

    Sorted by the raw output of the counter-based generator Philox (Salmon et al., 2011), which NumPy keeps stable; its
    `Generator.permutation` may change between versions.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


class Examples(Protocol):
    """Where the examples come from: indices in, encoded examples out."""

    def encode(self, indices: Sequence[int]) -> list[tuple[str, Encoded]]:
        """(id, token ids and targets) of some examples; together they take a fraction of the time of each alone."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


class Stream:
    """The work of one rank, step by step, read ahead in the background."""

    def __init__(
        self,
        plan: Plan,
        examples: Examples,
        lengths: tuple[np.ndarray, np.ndarray],
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        weights: np.ndarray | None = None,
    ) -> None:
        """`lengths`: (tokens, targets) of each example, int [examples]; `weights`: what a target of each counts in the loss,
        float64 [examples], the same as its `Encoded.weight`; None for 1."""
        self.plan = plan
        self._examples = examples
        self._tokens, self._targets = lengths
        self._weights = weights
        self._rank, self._world_size = rank, world_size
        self.regroup(micro_batch_size)

    def regroup(self, micro_batch_size: int) -> None:
        """Serve the same slots in micro-batches of another size; before the work begins."""
        self._micro = micro_slots(self.plan.global_batch_size, self._rank, self._world_size, micro_batch_size)

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.plan.steps

    def work(self, step: int) -> Work:
        """The work of a step (from 0): a pure function, whatever was read before."""
        packs = self.plan.step(step)
        members = np.concatenate(packs)
        targets = self._targets[members]
        return Work(
            step=step,
            batches=tuple(self._batch(packs, slots) for slots in self._micro),
            targets=int(targets.sum()),
            weight=float(targets.sum() if self._weights is None else targets @ self._weights[members]),
            tokens=int(self._tokens[members].sum()),
            examples=len(members),
            epoch=self.plan.epoch_after(step),
            cursor=Cursor((step + 1) * self.plan.global_batch_size),
        )

    def from_cursor(self, cursor: Cursor, asked: Callable[[], bool] = never) -> Iterator[Work | None]:  # noqa: ARG002
        """The remaining work of the run; the next step is encoded while this one is trained on."""
        start = cursor.pack // self.plan.global_batch_size
        with background("encode") as encoding:
            yield from Ahead(map(self.work, range(start, self.plan.steps)), encoding)

    def agree(self, work: Work | None, total: Callable[[Sequence[float]], list[float]]) -> Work | None:  # noqa: ARG002
        """The work as it is: every rank knows the counts of the global batch from the plan."""
        return work

    def _batch(self, packs: Sequence[np.ndarray], slots: Sequence[int]) -> Batch:
        filled = [slot for slot in slots if slot < len(packs)]
        encoded = iter(self._examples.encode([int(i) for slot in filled for i in packs[slot]]) if filled else [])
        rows = [(slot, [next(encoded) for _ in packs[slot]]) for slot in filled]
        batch = collate([one for _, pack in rows for _, one in pack])
        return Batch(**batch, ids=tuple((slot, tuple(id for id, _ in pack)) for slot, pack in rows))


def micro_slots(global_batch_size: int, rank: int, world_size: int, micro_batch_size: int) -> list[range]:
    """The slots that a rank serves, one range for each micro-batch; all ranks have as many, some with slots beyond the batch."""
    if world_size > global_batch_size:
        raise ValueError(f"{world_size} ranks cannot share a global batch of {global_batch_size}")
    slots = range(rank, -(-global_batch_size // world_size) * world_size, world_size)
    return [slots[i : i + micro_batch_size] for i in range(0, len(slots), micro_batch_size)]


@contextmanager
def background(name: str, asked: Callable[[], bool] = never) -> Iterator[ThreadPoolExecutor]:
    """One thread; at the end, what it has not begun is not done; what it is doing is waited for, unless this process is asked to stop."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    try:
        yield thread
    finally:
        if asked():
            retry.GIVE_UP.set()
        thread.shutdown(wait=not asked(), cancel_futures=True)


class Ahead(Iterator[T]):
    """The same items, each made in a background thread while the one before is used. The first is begun at once."""

    def __init__(self, items: Iterator[T], thread: ThreadPoolExecutor) -> None:
        self._items, self._thread = items, thread
        self._coming = thread.submit(self._make)

    def __next__(self) -> T:
        made = self._coming.result()
        if not made:
            raise StopIteration
        self._coming = self._thread.submit(self._make)
        return made[0]

    def comes(self, asked: Callable[[], bool]) -> bool:
        """Wait for the next item; False where this process is asked to stop before it is there."""
        while not self._coming.done():
            if asked():
                return False
            wait([self._coming], timeout=0.2)
        return True

    def _make(self) -> list[T]:
        """The next item in a list; at the end an empty one, since a thread cannot hand over a StopIteration."""
        return list(islice(self._items, 1))


def collate(examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Examples laid end to end, as the tensors of a Batch. No examples make an empty pack: two tokens, one target of weight 0."""
    examples = examples or [Encoded([0, 0], [1], weight=0.0)]
    lengths = [example.ids.size for example in examples]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = np.concatenate([example.ids for example in examples], dtype=np.int64)
    positions = np.arange(ids.size) - np.repeat(starts, lengths)
    sizes = [example.targets.size for example in examples]
    where = np.concatenate([example.targets for example in examples])
    where += np.repeat(starts, sizes)
    weights = np.repeat(np.array([example.weight for example in examples], dtype=np.float32), sizes)
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "predict_from": torch.from_numpy(where - 1),
        "targets": torch.from_numpy(ids[where]),
        "weights": torch.from_numpy(weights),
    }
