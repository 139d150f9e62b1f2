"""The order of the data: pure, complete, and the same for every number of ranks."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_dist.data.encode import Encoded
from mistral_dist.data.pack import best_fit
from mistral_dist.data.stream import Cursor, Plan, Stream, collate, permutation

lengths_of = st.lists(st.integers(2, 64), min_size=1, max_size=150)


class Numbered:
    """Examples whose tokens tell which one they are."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def encode(self, indices: Sequence[int]) -> list[tuple[str, Encoded]]:
        return [(f"id{n}", Encoded([n] * self.lengths[n], list(range(1, self.lengths[n])), weight=1.0 + n % 3)) for n in indices]


def stream(
    lengths: list[int], batch: int, rank: int = 0, world: int = 1, micro: int = 1, epochs: int = 1, steps: int | None = None
) -> Stream:
    tokens = np.array(lengths)
    plan = Plan(tokens, capacity=64, seed=3, epochs=epochs, global_batch_size=batch, steps=steps)
    weights = 1.0 + np.arange(len(lengths)) % 3
    return Stream(plan, Numbered(lengths), (tokens, tokens - 1), rank=rank, world_size=world, micro_batch_size=micro, weights=weights)


def order(ranks: list[Stream]) -> list[list[str]]:
    """Ids of each step in slot order, put together from all ranks."""
    steps = []
    for step in range(ranks[0].plan.steps):
        slots = sorted(entry for rank in ranks for batch in rank.work(step).batches for entry in batch.ids)
        steps.append([id for _, ids in slots for id in ids])
    return steps


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), max_size=300))
def test_packs_hold_each_example_once_and_never_overflow(lengths: list[int]) -> None:
    packs = best_fit(lengths, 64)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= 64 for pack in packs)


def test_best_fit_takes_the_fullest_pack_with_room() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_an_example_above_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="example 1 has 65 tokens"):
        best_fit([3, 65], 64)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of, batch=st.integers(1, 9), world=st.integers(1, 8), micro=st.integers(1, 4), epochs=st.integers(1, 3))
def test_the_order_does_not_depend_on_ranks_or_micro_batches(lengths: list[int], batch: int, world: int, micro: int, epochs: int) -> None:
    world = min(world, batch)
    alone = order([stream(lengths, batch, epochs=epochs)])
    together = [stream(lengths, batch, rank, world, micro, epochs) for rank in range(world)]
    assert order(together) == alone
    ids = [id for step in alone for id in step]
    assert sorted(ids) == sorted(f"id{n}" for n in range(len(lengths)) for _ in range(epochs))


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of, batch=st.integers(1, 9), world=st.integers(1, 8), micro=st.integers(1, 4))
def test_ranks_take_the_same_number_of_forwards_and_count_every_target(lengths: list[int], batch: int, world: int, micro: int) -> None:
    """And every rank knows the sum of the weights of the whole global batch, before any forward."""
    ranks = [stream(lengths, batch, rank, min(world, batch), micro) for rank in range(min(world, batch))]
    for step in range(ranks[0].plan.steps):
        works = [rank.work(step) for rank in ranks]
        assert len({len(work.batches) for work in works}) == 1
        assert sum(int((b.weights > 0).sum()) for work in works for b in work.batches) == works[0].targets
        assert sum(float(b.weights.sum()) for work in works for b in work.batches) == works[0].weight
        assert len({(work.targets, work.weight, work.tokens, work.examples, work.epoch, work.cursor) for work in works}) == 1


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_of, batch=st.integers(1, 5), stop=st.integers(0, 40))
def test_going_on_from_a_cursor_is_as_if_never_stopped(lengths: list[int], batch: int, stop: int) -> None:
    whole = [work.step for work in stream(lengths, batch, epochs=2).from_cursor(Cursor())]
    stop = min(stop, len(whole))
    cursors = [Cursor(), *(work.cursor for work in stream(lengths, batch, epochs=2).from_cursor(Cursor()))]
    rest = list(stream(lengths, batch, epochs=2).from_cursor(cursors[stop]))
    assert [work.step for work in rest] == whole[stop:]


@settings(max_examples=60, deadline=None)
@given(
    lengths=lengths_of,
    batch=st.integers(1, 9),
    epochs=st.integers(1, 3),
    kills=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(1, 8), st.integers(1, 3)), max_size=4),
)
def test_killed_and_moved_to_other_ranks_the_order_is_that_of_one_process(
    lengths: list[int], batch: int, epochs: int, kills: list[tuple[int, int, int, int]]
) -> None:
    """Each group of ranks goes on from the last checkpoint, makes some steps, saves, and is killed some steps later."""
    wanted = order([stream(lengths, batch, epochs=epochs)])
    cursor = Cursor()
    for saves_after, lost, world, micro in [*kills, (0, len(wanted), 8, 2)]:
        start, world = cursor.pack // batch, min(world, batch)
        made = []
        ranks = [stream(lengths, batch, rank, world, micro, epochs).from_cursor(cursor) for rank in range(world)]
        for works in islice(zip(*ranks, strict=True), saves_after + lost):
            slots = sorted(entry for work in works for one in work.batches for entry in one.ids)
            made.append([id for _, ids in slots for id in ids])
            if len(made) == saves_after:
                cursor = Cursor.from_json(json.loads(json.dumps(asdict(Cursor.whole(work.cursor for work in works)))))
        assert made == wanted[start : start + saves_after + lost]
    assert start + len(made) == len(wanted)


def test_only_the_last_step_has_empty_slots_and_epochs_follow_without_a_gap() -> None:
    plan = stream([40] * 10, batch=4, epochs=2).plan
    assert [len(plan.step(step)) for step in range(plan.steps)] == [4, 4, 4, 4, 4]
    assert [len(stream([40] * 10, batch=4).plan.step(step)) for step in range(3)] == [4, 4, 2]


def test_steps_can_be_limited() -> None:
    limited, whole = stream([40] * 10, batch=2, epochs=2, steps=7), stream([40] * 10, batch=2, epochs=2)
    assert (limited.plan.steps, whole.plan.steps) == (7, 10)
    assert order([limited]) == order([whole])[:7]


def test_epochs_differ_and_the_seed_decides() -> None:
    ids = order([stream([30] * 20, batch=1, epochs=2)])
    assert ids[:10] != ids[10:]
    tokens = np.array([30] * 20)
    other = Plan(tokens, capacity=64, seed=4, epochs=1, global_batch_size=1)
    plan = stream([30] * 20, batch=1).plan
    assert [list(other.pack(n)) for n in range(10)] != [list(plan.pack(n)) for n in range(10)]


def test_permutations_are_the_same_on_every_machine() -> None:
    # literal, since a run that is resumed under another NumPy must find its order again
    assert permutation(8, 0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]


def test_more_ranks_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks cannot share"):
        stream([5], batch=2, world=3)


def test_a_row_restarts_positions_and_knows_its_targets() -> None:
    row = collate([Encoded([7, 8, 9], [2]), Encoded([5, 6], [1])])
    assert row["input_ids"].tolist() == [[7, 8, 9, 5, 6]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert row["predict_from"].tolist() == [1, 3]
    assert row["targets"].tolist() == [9, 6]
    assert row["weights"].tolist() == [1, 1]


def test_the_targets_of_an_example_have_its_weight() -> None:
    row = collate([Encoded([7, 8, 9], [1, 2], weight=0.5), Encoded([5, 6], [1]), Encoded([3, 4], [1], weight=3.0)])
    assert row["weights"].tolist() == [0.5, 0.5, 1, 3]
    assert row["weights"].dtype is torch.float32


def test_an_empty_pack_has_a_target_that_weighs_nothing() -> None:
    assert collate([])["weights"].tolist() == [0]
    assert collate([])["targets"].numel() == 1


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of, batch=st.integers(1, 5), epochs=st.integers(1, 6), weight=st.sampled_from([0.1, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]))
def test_weights_say_how_often_an_epoch_shows_an_example(lengths: list[int], batch: int, epochs: int, weight: float) -> None:
    """Half of the examples have the weight, the others 1."""
    weights = np.where(np.arange(len(lengths)) % 2 == 0, weight, 1.0)
    plan = Plan(np.array(lengths), capacity=64, seed=3, epochs=epochs, global_batch_size=batch, weights=weights)
    shown = np.bincount(np.concatenate([plan.pack(n) for n in range(plan.packs)] or [np.empty(0, int)]), minlength=len(lengths))
    assert (shown[1::2] == epochs).all()
    assert (np.abs(shown[::2] - epochs * weight) < 1).all()
    if plan.steps:
        assert plan.epoch_after(plan.steps - 1) == pytest.approx(epochs) or not shown.all()


def test_a_weight_of_one_changes_nothing() -> None:
    lengths = np.array([7, 9, 30, 31, 2, 40] * 20)
    plain = Plan(lengths, capacity=64, seed=3, epochs=2, global_batch_size=4)
    weighted = Plan(lengths, capacity=64, seed=3, epochs=2, global_batch_size=4, weights=np.ones(120))
    assert [plain.pack(n).tolist() for n in range(plain.packs)] == [weighted.pack(n).tolist() for n in range(weighted.packs)]


def test_half_a_weight_shows_each_example_once_in_two_epochs() -> None:
    plan = Plan(np.full(40, 32), capacity=64, seed=0, epochs=2, global_batch_size=1, weights=np.full(40, 0.5))
    shown = np.concatenate([plan.pack(n) for n in range(plan.packs)])
    assert plan.packs == 20
    assert sorted(shown.tolist()) == list(range(40))
    assert plan.epoch_after(9) == 1


@pytest.mark.parametrize(("mean", "sigma", "capacity", "least"), [(4.6, 0.6, 2048, 0.99), (6.4, 1.0, 4096, 0.98)])
def test_packs_are_full_and_whole(mean: float, sigma: float, capacity: int, least: float) -> None:
    """50,000 examples: short chats (mean about 120 tokens) at 2,048, long-tailed ones (mean about 1,000) at 4,096."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(mean, sigma, 50_000).astype(int), 8, capacity)
    plan = Plan(lengths, capacity=capacity, seed=0, epochs=1, global_batch_size=8)
    packed = [plan.pack(n) for n in range(plan.packs)]
    assert sorted(np.concatenate(packed).tolist()) == list(range(50_000))
    assert max(int(lengths[pack].sum()) for pack in packed) <= capacity
    assert lengths.sum() / (plan.packs * capacity) >= least
    assert [len(plan.step(step)) for step in range(plan.steps - 1)] == [8] * (plan.steps - 1)
    assert min(map(len, packed)) > 0
