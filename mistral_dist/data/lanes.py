"""A stream that was not prepared and a step -> the micro-batches of this rank.

The stream is dealt out into as many lanes as the global batch has slots, and slot k of every step is fed by lane k:

    part      what lane k of B has of a source: its shards k, k + B, ...; of fewer than B shards, its rows k, k + B, ...
    round     once through the part, in order, each row once; then the next. Each source goes round by itself
    mixture   of several sources the lane takes its next row from the one that is furthest behind its weight
    block     so many rows of the lane, read, shuffled by (seed, lane, block), encoded, packed best-fit, the packs shuffled.
              It ends early with the round of the slowest source, so that one source alone never has a row twice in a block

A lane is a pure function of (data, seed, its number). World size, micro-batch and restarts do not occur in it: ranks only
differ in which lanes they serve. The state of a lane is where its block begins and how many packs of it were given; to
resume is to read that block again. It travels with the work, so that what was read ahead is never counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mistral_dist.data.cursor import Cursor, LaneState, Place
from mistral_dist.data.encode import Encoded
from mistral_dist.data.pack import best_fit
from mistral_dist.data.sources import Shard
from mistral_dist.data.stream import Ahead, Batch, Drop, Work, background, collate, micro_slots, never, permutation
from mistral_dist.errors import DataError

COUNTS = 8
"""Numbers that the ranks sum up in each step."""
ENOUGH_ROWS = 1000
"""Rows of the stream before the share of bad ones says anything: of 1,000 rows, 5 % are 50, give or take 7."""

Examples = tuple[tuple[str, Encoded], ...]
Total = Callable[[Sequence[float]], list[float]]


@dataclass(frozen=True)
class Streamed:
    """A source to stream from."""

    index: int
    """Its place in the recipe."""
    name: str
    shards: Sequence[Shard]
    """In the same order on every machine."""
    weight: float = 1.0


@dataclass(frozen=True)
class Read:
    """What the rows of a block held."""

    examples: Sequence[tuple[str, Encoded]]
    """(id, token ids and targets), in the order of the rows; one row may hold several."""
    drops: Sequence[tuple[int, Drop]] = ()
    """(index of the row in the block, why it was dropped)."""


class Reader(Protocol):
    """Rows -> encoded examples, none longer than a pack; what it drops, it says."""

    def block(self, rows: Sequence[tuple[int, Any]]) -> Read:
        """`rows`: (the source by its place in the recipe, the row)."""


@dataclass(frozen=True)
class Rules:
    """What decides how a lane makes packs, beside its data."""

    lanes: int
    """The global batch."""
    block: int
    """Rows that are shuffled and packed together."""
    capacity: int
    """Tokens of a pack."""
    seed: int
    bad_rows: float
    """The share of rows that may be unreadable."""


class Part:
    """What one lane has of a source.

    Where the source has at least as many shards as there are lanes, the lane reads its own and no others. Where it has fewer,
    the lane reads every shard and passes over the rows of the other lanes: no row is encoded twice, but in a round the
    source is read as often as there are lanes, whatever the number of ranks. Cheap for lines on a disk; what comes over a
    network should have at least as many shards as train.global_batch_size.
    """

    def __init__(self, source: Streamed, lane: int, lanes: int) -> None:
        is_split = len(source.shards) >= lanes
        self._shards = source.shards[lane::lanes] if is_split else source.shards
        self._every, self._first = (1, 0) if is_split else (lanes, lane)
        remedy = f"lower train.global_batch_size={lanes}, or give it more rows"
        self._empty = f"{source.name}: a stream is dealt out in train.global_batch_size parts, and part {lane + 1} has no row; {remedy}"

    def rows(self, at: Place) -> Iterator[tuple[Place, Any]]:
        """Rows from a place on, round after round without end, each with the place after it. Raises DataError where there is none."""
        round, shard, position, number, taken = at.round, at.shard, at.position, at.row, at.taken
        while True:
            before, is_whole = taken, number == 0
            for opened, start in [(shard, position), *((later, 0) for later in range(shard + 1, len(self._shards)))]:
                for after, row in self._shards[opened].rows(start):
                    is_ours = number % self._every == self._first
                    number += 1
                    if is_ours:
                        taken += 1
                        yield Place(round, opened, after, number, taken), row
            if is_whole and taken == before:
                raise DataError(self._empty)
            round, shard, position, number = round + 1, 0, 0, 0


class _Mixture:
    """The rows of one lane, over all its sources, in the order in which they are taken."""

    def __init__(self, parts: Sequence[Part], weights: Sequence[float], places: Sequence[Place]) -> None:
        self.places = tuple(places)
        self._weights = weights
        self._rows = [part.rows(place) for part, place in zip(parts, places, strict=True)]
        self._next: list[tuple[Place, Any] | None] = [None] * len(parts)

    @property
    def epoch(self) -> int:
        """Rounds of the source that has gone round least often."""
        return min(place.round for place in self.places)

    def block(self, size: int) -> list[tuple[int, Place, Any]]:
        """(source, place after the row, row) of up to `size` rows, at least one, all of one epoch."""
        taken: list[tuple[int, Place, Any]] = []
        while len(taken) < size:
            source = min(range(len(self.places)), key=lambda n: (self.places[n].taken / self._weights[n], n))
            place, row = self._next[source] or next(self._rows[source])
            before, epoch = self.places, self.epoch
            self.places = (*before[:source], place, *before[source + 1 :])
            if taken and self.epoch > epoch:
                self.places, self._next[source] = before, (place, row)
                break
            self._next[source] = None
            taken.append((source, place, row))
        return taken


@dataclass(frozen=True)
class Block:
    """The packs of one block, at least one."""

    start: LaneState
    packs: tuple[Examples, ...]
    epoch: int
    """Rounds that the lane had finished before."""
    dropped: int
    """Rows dropped since the block before, which may have been passed over blocks without any pack."""
    drops: tuple[Drop, ...]
    """Those of them that were met for the first time."""


@dataclass(frozen=True)
class Fed:
    """One pack as a lane gives it."""

    pack: Examples
    state: LaneState
    """Of the lane after this pack."""
    epoch: int
    dropped: int = 0
    """Rows dropped on the way to this pack; those of a block count with its first."""
    drops: tuple[Drop, ...] = ()


class Lane:
    """One of the parts that a stream is dealt out in, as a sequence of packs without end."""

    def __init__(self, number: int, sources: Sequence[Streamed], reader: Reader, rules: Rules) -> None:
        self.number = number
        self._sources = sources
        self._parts = [Part(source, number, rules.lanes) for source in sources]
        self._reader = reader
        self._rules = rules

    @property
    def beginning(self) -> LaneState:
        """The state of a lane that has given nothing."""
        return LaneState(self.number, tuple(Place() for _ in self._sources))

    def blocks(self, state: LaneState) -> Iterator[Block]:
        """The block that a state is in, whole, and those after it; blocks without a pack are passed over.

        Raises DataError where a whole round of every source holds no usable example.
        """
        state = replace(state, given=0)
        mixture = _Mixture(self._parts, [source.weight for source in self._sources], state.places)
        fertile = state.places
        in_vain: list[Drop] = []
        dropped = 0
        while True:
            rows = mixture.block(self._rules.block)
            read = self._reader.block([(self._sources[source].index, row) for source, _, row in rows])
            after = self._counted(state, rows, read, mixture.places)
            dropped += len(read.drops)
            in_vain += [drop for row, drop in read.drops if rows[row][1].round == 0]
            if read.examples:
                yield Block(state, self._packed(read.examples, state.block), mixture.epoch, dropped, tuple(in_vain))
                fertile, in_vain, dropped = mixture.places, [], 0
            elif all((p.round, p.row) >= (f.round + 1, f.row) for p, f in zip(mixture.places, fertile, strict=True)):
                reasons = _by_reason(Counter(drop.reason for drop in in_vain))
                raise DataError(f"{self._name}: none of its rows can be used ({reasons}); lower train.global_batch_size, or mend the rows")
            state = after

    def packs(self, state: LaneState, blocks: Iterator[Block]) -> Iterator[Fed]:
        """The packs after a state, out of the blocks from it on."""
        given = state.given
        for block in blocks:
            if given > len(block.packs):
                raise DataError(f"{self._name}: holds other rows than when the checkpoint was saved; start another run with run.dir=...")
            for n in range(given, len(block.packs)):
                fed = Fed(block.packs[n], replace(block.start, given=n + 1), block.epoch)
                yield fed if n else replace(fed, dropped=block.dropped, drops=block.drops)
            given = 0

    @property
    def _name(self) -> str:
        return f"data.sources: part {self.number + 1} of the {self._rules.lanes} that the stream is dealt out in"

    def _packed(self, examples: Sequence[tuple[str, Encoded]], block: int) -> tuple[Examples, ...]:
        key = (self._rules.seed, self.number, block)
        members = [examples[n] for n in permutation(len(examples), *key)]
        found = best_fit([len(encoded.ids) for _, encoded in members], self._rules.capacity)
        # best-fit opens its packs from the longest example to the shortest; training should not see them so
        return tuple(tuple(members[n] for n in found[pack]) for pack in permutation(len(found), *key, 1))

    def _counted(self, state: LaneState, rows: Sequence[tuple[int, Place, Any]], read: Read, places: tuple[Place, ...]) -> LaneState:
        """The state at the next block. A row is counted when it is met first."""
        bad = [drop for row, drop in read.drops if drop.is_bad and rows[row][1].round == 0]
        counts = dict(Counter(state.bad) + Counter(drop.reason for drop in bad))
        first = state.first_bad or next((f"{drop.place}: {drop.because}" for drop in bad), "")
        count = state.rows + sum(place.round == 0 for _, place, _ in rows)
        return LaneState(self.number, places, state.block + 1, 0, count, counts, first)


def _by_reason(counts: "Counter[str] | dict[str, int]") -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items())) or "there is none"


@dataclass
class Lanes:
    """The work of one rank on a stream, step by step, read ahead in the background."""

    sources: Sequence[Streamed]
    reader: Reader
    rules: Rules
    steps: int
    """A stream has no end of its own."""
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int = 1
    _micro: list[range] = field(init=False)

    def __post_init__(self) -> None:
        self.regroup(self.micro_batch_size)

    def regroup(self, micro_batch_size: int) -> None:
        """Serve the same lanes in micro-batches of another size; before the work begins."""
        self.micro_batch_size = micro_batch_size
        self._micro = micro_slots(self.rules.lanes, self.rank, self.world_size, micro_batch_size)

    def from_cursor(self, cursor: Cursor, asked: Callable[[], bool] = never) -> Iterator[Work | None]:
        """The remaining work of the run. Counts and epoch are those of this rank's lanes until `agree` sums them up.

        None, at the last, where the data are late and this process is asked to stop: `agree` then tells the other ranks.

        Of each lane the next block is read while this one is trained on; else all lanes, which come to the end of a block
        at about the same step, would be waited for. So a rank holds two blocks of each lane that it serves: of 1,024
        rows of 500 tokens, some 12 MB a lane.
        """
        states = {state.lane: state for state in cursor.lanes}
        assert len(states) in (0, self.rules.lanes), f"a cursor of {len(states)} lanes, the recipe has {self.rules.lanes}"
        with background("blocks", asked) as reading, background("steps", asked) as building:
            lanes: dict[int, Iterator[Fed]] = {}
            for slot in (slot for slots in self._micro for slot in slots if slot < self.rules.lanes):
                lane = Lane(slot, self.sources, self.reader, self.rules)
                state = states.get(slot, lane.beginning)
                lanes[slot] = lane.packs(state, Ahead(lane.blocks(state), reading))
            start = cursor.pack // self.rules.lanes
            steps = Ahead((self._work(step, lanes) for step in range(start, self.steps)), building)
            while steps.comes(asked):
                work = next(steps, None)
                if work is None:
                    return
                yield work
            yield None

    def agree(self, work: Work | None, total: Total) -> Work | None:
        """The work with the counts of the global batch: one sum over the ranks, before the first forward needs them. Raises
        DataError on all ranks where too many rows are bad. None on all where one that is asked to stop waits for its data in vain.

        The epoch is the mean of the lanes' finished rounds: how long a round is, nobody knows before its end.
        """
        if work is None:
            total((0.0,) * COUNTS + (1.0,))
            return None
        states = work.cursor.lanes
        judged = (sum(state.rows for state in states), sum(sum(state.bad.values()) for state in states))
        own = (work.weight, work.targets, work.tokens, work.examples, work.dropped, work.epoch, *judged)
        assert len(own) == COUNTS
        weight, *counts, waiting = total((*own, 0.0))
        if waiting:
            return None
        targets, tokens, examples, dropped, rounds, rows, bad = map(int, counts)
        self._refuse_bad(rows, bad, states)
        epoch = rounds / self.rules.lanes
        return replace(work, targets=targets, weight=weight, tokens=tokens, examples=examples, dropped=dropped, epoch=epoch)

    def _refuse_bad(self, rows: int, bad: int, own: Sequence[LaneState]) -> None:
        """Raise DataError, on all ranks alike, where too many of the rows met so far are bad."""
        if rows < ENOUGH_ROWS or bad <= self.rules.bad_rows * rows:
            return
        counts: Counter[str] = Counter()
        for state in own:
            counts.update(state.bad)
        first = next((f"; the first here is {state.first_bad}" for state in own if state.first_bad), "")
        raise DataError(
            f"data.bad_rows={self.rules.bad_rows:g}: {bad:,} of the stream's first {rows:,} rows are no examples"
            f" ({_by_reason(counts)} of them on this rank){first};"
            " mend them (the run's quarantine.jsonl names each), or raise data.bad_rows"
        )

    def _work(self, step: int, lanes: dict[int, Iterator[Fed]]) -> Work:
        fed = {slot: next(lane) for slot, lane in lanes.items()}
        encoded = [encoded for given in fed.values() for _, encoded in given.pack]
        return Work(
            step=step,
            batches=tuple(_batch(fed, slots) for slots in self._micro),
            targets=sum(len(one.targets) for one in encoded),
            weight=sum(len(one.targets) * one.weight for one in encoded),
            tokens=sum(len(one.ids) for one in encoded),
            examples=len(encoded),
            epoch=sum(given.epoch for given in fed.values()),
            cursor=Cursor((step + 1) * self.rules.lanes, tuple(given.state for given in fed.values())),
            dropped=sum(given.dropped for given in fed.values()),
            drops=tuple((slot, drop) for slot, given in fed.items() for drop in given.drops),
        )


def _batch(fed: dict[int, Fed], slots: Sequence[int]) -> Batch:
    packs = [(slot, fed[slot].pack) for slot in slots if slot in fed]
    batch = collate([encoded for _, pack in packs for _, encoded in pack])
    return Batch(**batch, ids=tuple((slot, tuple(id for id, _ in pack)) for slot, pack in packs))
