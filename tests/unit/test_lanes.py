"""Streams: the order is that of one process that was never killed, whatever the ranks and the kills."""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_dist import retry
from mistral_dist.data.cursor import Cursor
from mistral_dist.data.encode import Encoded
from mistral_dist.data.lanes import Lane, Lanes, Part, Place, Read, Rules, Streamed
from mistral_dist.data.stream import Drop, Work
from mistral_dist.errors import DataError

CAPACITY = 32


@dataclass
class Memory:
    """A shard in memory, whose positions are offsets, as in a file, and not numbers of rows."""

    name: str
    texts: Sequence[str]

    def rows(self, start: int = 0) -> Iterator[tuple[int, str]]:
        offset = 0
        for text in self.texts:
            offset += len(text) + 1
            if offset > start:
                yield offset, text


@dataclass
class Lengths:
    """Reads `name/length` as an example of that length; drops what ends in ! as bad and in ? by rule; `name/3*2` holds two."""

    seen: "list[tuple[int, str]] | None" = None

    def block(self, rows: Sequence[tuple[int, str]]) -> Read:
        examples, drops = [], []
        for n, (source, text) in enumerate(rows):
            if self.seen is not None:
                self.seen.append((source, text))
            if text[-1] in "!?":
                drops.append((n, Drop(text, "odd" if text[-1] == "!" else "too_long", "as marked", text[-1] == "!")))
                continue
            length, _, times = text.partition("/")[2].partition("*")
            examples += [(f"{text}#{time}", encoded(int(length))) for time in range(int(times or 1))]
        return Read(examples, drops)


def encoded(length: int) -> Encoded:
    return Encoded([7] * length, list(range(1, length)), weight=1.0 + length % 3)


def source(*sizes: int, index: int = 0, weight: float = 1.0, marks: str = "") -> Streamed:
    """A source of shards of so many rows; `marks`: what the rows end in, over and over."""
    shards = []
    for shard, size in enumerate(sizes):
        texts = [f"{index}.{shard}.{n}/{2 + (n * 7 + shard * 5) % (CAPACITY - 2)}" for n in range(size)]
        texts = [text + marks[n % len(marks)].strip() if marks else text for n, text in enumerate(texts)]
        shards.append(Memory(f"shard{shard}", texts))
    return Streamed(index, f"data.sources.{index}", shards, weight)


def rows_of(source: Streamed) -> list[str]:
    return [row for shard in source.shards for _, row in shard.rows()]


def rules(lanes: int, block: int = 8, bad_rows: float = 1.0) -> Rules:
    return Rules(lanes, block, CAPACITY, 3, bad_rows)


Ids = list[tuple[str, ...]]


@dataclass
class Group:
    """Ranks that train together: each with its own iterator, their sums and gathered cursors as the runtime makes them."""

    ranks: list[Lanes]

    def steps(self, cursor: Cursor) -> Iterator[tuple[Work, Ids, Cursor, list[tuple[int, Drop]]]]:
        """(the agreed work, the ids of each slot, the cursor as a checkpoint holds it, the drops) of each step."""
        for own in zip(*(rank.from_cursor(cursor) for rank in self.ranks), strict=True):
            agreed = self.agreed(own)
            assert len({(w.step, w.targets, w.weight, w.tokens, w.examples, w.dropped, w.epoch, len(w.batches)) for w in agreed}) == 1
            weights = torch.cat([batch.weights for work in own for batch in work.batches])
            assert int((weights > 0).sum()) == agreed[0].targets, "fillers count as targets, or a target is missing"
            assert float(weights.sum()) == agreed[0].weight
            slots = sorted(entry for work in own for batch in work.batches for entry in batch.ids)
            assert [slot for slot, _ in slots] == list(range(self.ranks[0].rules.lanes)), "a slot is empty or served twice"
            drops = sorted((drop for work in own for drop in work.drops), key=lambda entry: entry[0])
            saved = json.loads(json.dumps(asdict(Cursor.whole(work.cursor for work in own))))
            yield agreed[0], [ids for _, ids in slots], Cursor.from_json(saved), drops

    def agreed(self, own: tuple[Work, ...]) -> list[Work]:
        """As `Runtime.sum` would have it: first what each rank brings, then the sums for each."""
        brought: list[list[float]] = []

        def bring(values: Sequence[float]) -> list[float]:
            brought.append(list(values))
            return list(values)

        def total(_: Sequence[float]) -> list[float]:
            return [sum(column) for column in zip(*brought, strict=True)]

        for rank, work in zip(self.ranks, own, strict=True):
            rank.agree(work, bring)
        return [rank.agree(work, total) for rank, work in zip(self.ranks, own, strict=True)]


def group(sources: Sequence[Streamed], rules: Rules, steps: int, world: int = 1, micro: int = 1) -> Group:
    return Group([Lanes(sources, Lengths(), rules, steps, rank, world, micro) for rank in range(world)])


shards = st.lists(st.integers(0, 30), min_size=1, max_size=12)
kills = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 8), st.integers(1, 3)), min_size=1, max_size=4)


def streams(sizes: list[int], lanes: int, several: bool) -> list[Streamed]:
    """Sources in which every lane has a row that can be used: one row in four is dropped, one in four holds two examples."""
    marks = " !? " if several else " "
    first = source(*(size + 1 for size in sizes), *([1] * max(0, 4 - len(sizes))), marks=marks)
    if sum(len(shard.texts) for shard in first.shards) < 4 * lanes and len(first.shards) < lanes:  # type: ignore[attr-defined]
        first = source(*(size + 4 * lanes for size in sizes), marks=marks)
    first.shards[0].texts[0] += "*2" if first.shards[0].texts[0][-1] not in "!?" else ""  # type: ignore[attr-defined]
    return [first, source(4 * lanes + 1, 3, index=1, weight=0.3)] if several else [first]


@settings(max_examples=80, deadline=None)
@given(sizes=shards, lanes=st.integers(1, 9), block=st.integers(1, 12), several=st.booleans(), kills=kills)
def test_killed_and_moved_to_other_ranks_the_order_is_that_of_one_process(
    sizes: list[int], lanes: int, block: int, several: bool, kills: list[tuple[int, int, int]]
) -> None:
    """Each kill comes some steps after the last checkpoint; the next ranks are as many as they please."""
    sources, ruled, steps = streams(sizes, lanes, several), rules(lanes, block), 12
    wanted = [seen(*step) for step in group(sources, ruled, steps).steps(Cursor())]
    assert len(wanted) == steps
    cursor = Cursor()
    for lost, world, micro in kills:
        start = cursor.pack // lanes
        for n, step in enumerate(group(sources, ruled, steps, min(world, lanes), micro).steps(cursor)):
            assert seen(*step) == wanted[start + n]
            if n == 1:
                cursor = step[2]
            if n == 1 + lost:
                break
    assert cursor.pack == 2 * len(kills) * lanes
    rest = [seen(*step) for step in group(sources, ruled, steps, min(kills[-1][1] + 1, lanes)).steps(cursor)]
    assert rest == wanted[2 * len(kills) :]


def seen(work: Work, ids: Ids, _: Cursor, drops: list[tuple[int, Drop]]) -> tuple[object, ...]:
    return work.step, ids, drops, work.targets, work.tokens, work.examples, work.dropped, work.epoch


@settings(max_examples=100, deadline=None)
@given(sizes=shards, lanes=st.integers(1, 9))
def test_the_lanes_share_a_source_out_and_each_goes_round_it(sizes: list[int], lanes: int) -> None:
    """Every row is in one lane, and a lane has each of its rows once in a round, from wherever it was opened."""
    streamed = source(*(size + lanes for size in sizes))
    everything: list[str] = []
    for number in range(lanes):
        part = Part(streamed, number, lanes)
        rows = part.rows(Place())
        first = []
        for place, row in rows:
            if place.round == 1:
                break
            first.append((place, row))
        everything += [row for _, row in first]
        assert row == first[0][1]
        again = [next(rows) for _ in range(len(first))]
        assert [row for _, row in again] == [row for _, row in [*first[1:], first[0]]]
        assert (again[-1][0].round, again[-1][0].taken) == (2, 2 * len(first) + 1)
        for n, (place, _) in enumerate(first):
            reopened = part.rows(place)
            wanted = [*first, (replace(again[0][0], row=first[0][0].row), first[0][1])][n + 1]
            assert next(reopened)[1] == wanted[1]
    assert sorted(everything) == sorted(rows_of(streamed))


@settings(max_examples=60, deadline=None)
@given(sizes=shards, lanes=st.integers(1, 6), block=st.integers(1, 12))
def test_a_lane_trains_on_each_of_its_examples_once_in_a_round(sizes: list[int], lanes: int, block: int) -> None:
    streamed = source(*(size + lanes for size in sizes), marks="  ! ")
    for number in range(lanes):
        ours = [row for place, row in _first_round(Part(streamed, number, lanes)) if not row.endswith("!")]
        if not ours:
            continue
        lane = Lane(number, [streamed], Lengths(), rules(lanes, block))
        ids: list[str] = []
        rounds: list[int] = []
        for fed in lane.packs(lane.beginning, lane.blocks(lane.beginning)):
            assert sum(len(example.ids) for _, example in fed.pack) <= CAPACITY
            if fed.epoch == 3:
                break
            ids += [id for id, _ in fed.pack]
            rounds += [fed.epoch] * len(fed.pack)
        for round in range(3):
            assert sorted(id for id, at in zip(ids, rounds, strict=True) if at == round) == sorted(f"{row}#0" for row in ours)


def _first_round(part: Part) -> Iterator[tuple[Place, str]]:
    for place, row in part.rows(Place()):
        if place.round:
            return
        yield place, row


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.05, 8.0), min_size=2, max_size=4), lanes=st.integers(1, 3), block=st.integers(1, 40))
def test_several_sources_come_in_the_shares_of_their_weights(weights: list[float], lanes: int, block: int) -> None:
    sources = [source(40 + 13 * n, 20, index=n, weight=weight) for n, weight in enumerate(weights)]
    reader = Lengths(seen=[])
    lane = Lane(lanes - 1, sources, reader, rules(lanes, block))
    blocks = lane.blocks(lane.beginning)
    for _ in range(400 // block + 2):
        next(blocks)
        taken = Counter(index for index, _ in reader.seen or ())
        for n, weight in enumerate(weights):
            # closer than one block: never further from its share than a row for each source
            assert abs(taken[n] - taken.total() * weight / sum(weights)) <= len(weights)
    for n, streamed in enumerate(sources):
        ours = [row for _, row in _first_round(Part(streamed, lanes - 1, lanes))]
        seen = [row for index, row in reader.seen or () if index == n]
        assert seen == [ours[k % len(ours)] for k in range(len(seen))], "each source goes round by itself, in order"


def test_a_block_is_shuffled_anew_in_each_round_and_lane() -> None:
    streamed = source(60, 60)
    first, second = (Lane(n, [streamed], Lengths(), rules(2, 60)) for n in range(2))
    one, two = (next(first.blocks(state)) for state in (first.beginning, replace(first.beginning, block=1)))
    assert sorted(_ids(one)) == sorted(_ids(two)) and _ids(one) != _ids(two)
    assert _ids(one) != sorted(_ids(one)), "as it was read"
    other = [id.replace("0.1.", "0.0.") for id in _ids(next(second.blocks(second.beginning)))]
    assert other != _ids(one)


def _ids(block: object) -> list[str]:
    return [id for pack in block.packs for id, _ in pack]  # type: ignore[attr-defined]


def test_a_block_is_packed_well() -> None:
    lane = Lane(0, [source(2048)], Lengths(), rules(1, 1024))
    packs = next(lane.blocks(lane.beginning)).packs
    assert sum(len(example.ids) for pack in packs for _, example in pack) / (len(packs) * CAPACITY) > 0.98


def test_every_drop_is_told_once_and_counted_each_time() -> None:
    streamed = source(12, 12, marks=" !? ")
    counted, told = 0, []
    steps = list(group([streamed], rules(2, 5), 24, world=2).steps(Cursor()))
    for work, _, _, drops in steps:
        counted += work.dropped
        told += [drop.place for _, drop in drops]
    assert sorted(told) == sorted(row for row in rows_of(streamed) if row[-1] in "!?")
    assert steps[-1][0].epoch >= 2 and counted >= 2 * len(told)


def test_blocks_without_an_example_are_passed_over_and_their_drops_told() -> None:
    shard = Memory("shard", [f"a.{n}/5?" for n in range(20)] + ["a.20/5"])
    lane = Lane(0, [Streamed(0, "data.sources.0", [shard])], Lengths(), rules(1, 4))
    packs = lane.packs(lane.beginning, lane.blocks(lane.beginning))
    first, second = next(packs), next(packs)
    assert [id for id, _ in first.pack] == [id for id, _ in second.pack] == ["a.20/5#0"]
    assert (first.dropped, len(first.drops), first.epoch) == (20, 20, 0)
    assert (second.dropped, len(second.drops), second.epoch) == (20, 0, 1)
    resumed = lane.packs(first.state, lane.blocks(first.state))
    third = next(resumed)
    assert [id for id, _ in third.pack] == ["a.20/5#0"]
    assert replace(third, pack=()) == replace(second, pack=())


def test_a_lane_with_no_usable_example_is_named() -> None:
    dead = Streamed(0, "data.sources.0", [Memory("good", ["a/5"]), Memory("dead", ["b/5!", "b/6?", "b/7?"])])
    lanes = group([dead], rules(2, 2), 3)
    with pytest.raises(DataError, match=r"part 2 of the 2 .*none of its rows can be used \(odd 1, too_long 2\)"):
        list(lanes.steps(Cursor()))
    reader = Lengths(seen=[])
    lane = Lane(1, [dead], reader, rules(2, 2))
    with pytest.raises(DataError):
        next(lane.blocks(lane.beginning))
    assert len(reader.seen or ()) <= 3 + 2, "read on after a whole round"


@pytest.mark.parametrize("sizes", [(2,), (1, 1), (5, 5, 0), (0, 0, 0, 0)])
def test_a_lane_without_rows_is_named(sizes: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"data\.sources\.1: .* part [13] has no row; lower train\.global_batch_size=3"):
        list(group([source(9), source(*sizes, index=1)], rules(3), 8).steps(Cursor()))


def test_too_many_bad_rows_stop_the_run_at_the_same_step_after_a_kill() -> None:
    """6 % of the rows are bad, 5 % are allowed; what a rule drops is not bad."""
    good = " " * 40 + "?" * 7
    streamed = source(5000, marks=good + "!!!")
    ruled = rules(1, 100, bad_rows=0.05)
    said = (
        r"data\.bad_rows=0\.05: 60 of the stream's first 1,000 rows are no examples \(odd 60 .*; the first here is 0\.0\.47/\d+!: as marked"
    )
    whole = until_refused(group([streamed], ruled, 10_000), Cursor(), said)
    rest = until_refused(group([streamed], ruled, 10_000), whole[200][2], said)
    assert [seen(*step) for step in rest] == [seen(*step) for step in whole[201:]]
    assert len(rest) > 10
    assert len(list(group([streamed], replace(ruled, bad_rows=0.07), len(whole) + 50).steps(Cursor()))) == len(whole) + 50


def until_refused(ranks: Group, cursor: Cursor, said: str) -> list[tuple[Work, Ids, Cursor, list[tuple[int, Drop]]]]:
    """The steps up to a DataError that says this."""
    steps = []

    def go() -> None:
        for step in ranks.steps(cursor):
            steps.append(step)

    with pytest.raises(DataError, match=said):
        go()
    return steps


@pytest.mark.parametrize("world", [1, 3])
def test_bad_rows_are_judged_over_all_parts_together(world: int) -> None:
    """Of 8 parts none has 1,000 rows, and yet the stream is refused once 1,000 were met, by all ranks at the same step."""
    streamed = source(2000, marks=" !!")
    until_refused(group([streamed], rules(8, 50, bad_rows=0.05), 1000, world), Cursor(), r"stream's first 1,[0-9]{3} rows are no examples")


def test_few_bad_rows_never_stop_a_run_by_coming_round() -> None:
    """Each row is counted once: few rows never become 1,000, and 4 % stay 4 % in the second round."""
    few = list(group([source(40, marks=" !")], rules(1, 10, bad_rows=0.05), 800).steps(Cursor()))
    assert few[-1][0].epoch > 1000 / 40
    many = list(group([source(1200, marks=" " * 24 + "!")], rules(1, 100, bad_rows=0.05), 1500).steps(Cursor()))
    assert many[-1][0].epoch >= 2


def test_rows_that_are_gone_since_the_checkpoint_are_noticed() -> None:
    lane = Lane(0, [source(40)], Lengths(), rules(1, 20))
    beyond = replace(lane.beginning, given=100)
    with pytest.raises(DataError, match="holds other rows than when the checkpoint was saved"):
        next(lane.packs(beyond, lane.blocks(beyond)))


def test_what_is_read_ahead_and_not_used_does_not_count() -> None:
    works = group([source(50, 50)], rules(2), 10).ranks[0].from_cursor(Cursor())
    first = next(works)
    assert [state.given for state in first.cursor.lanes] == [1, 1]
    assert first.cursor.pack == 2
    works.close()  # type: ignore[attr-defined]


def test_the_order_of_a_stream_is_the_same_on_every_machine() -> None:
    # literal, since a run that is resumed under other versions must find its order again
    steps = list(group([source(9, 9)], rules(2, 4), 4).steps(Cursor()))
    assert [ids for _, ids, _, _ in steps] == [
        [("0.0.3/23#0", "0.0.1/9#0"), ("0.1.2/21#0", "0.1.0/7#0")],
        [("0.0.2/16#0", "0.0.0/2#0"), ("0.1.1/14#0",)],
        [("0.0.7/21#0", "0.0.5/7#0"), ("0.1.3/28#0",)],
        [("0.0.6/14#0",), ("0.1.6/19#0", "0.1.5/12#0")],
    ]


def test_more_ranks_than_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks cannot share"):
        Lanes([source(9)], Lengths(), rules(2), 1, 0, 3)


def test_a_cursor_knows_when_ranks_do_not_stand_together() -> None:
    with pytest.raises(AssertionError, match="different packs"):
        Cursor.whole([Cursor(2), Cursor(4)])
    assert Cursor.from_json({"pack": 4}) == Cursor(4), "as checkpoints of earlier versions have it"


def test_a_rank_that_is_asked_to_stop_does_not_wait_for_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "GIVE_UP", threading.Event())
    here, comes, asked = threading.Event(), threading.Event(), threading.Event()

    class Late(Lengths):
        def block(self, rows: Sequence[tuple[int, str]]) -> Read:
            if here.is_set():
                comes.wait(60)
            here.set()
            return super().block(rows)

    lanes = Lanes([source(50, 50)], Late(), rules(1), 100, 0, 1, 1)
    works = lanes.from_cursor(Cursor(), asked.is_set)
    first = next(works)
    assert first is not None
    threading.Timer(0.5, asked.set).start()
    rest = list(works)
    assert rest[-1] is None, "and it has come back, though the block has not"
    assert retry.GIVE_UP.is_set()
    assert lanes.agree(None, list) is None
    assert lanes.agree(first, lambda own: [*own[:-1], 1.0]) is None, "where another one is asked"
    comes.set()
