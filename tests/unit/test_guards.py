"""Steps that are left out and ways back: pure, and silent in runs that go well."""

import json
import math
import random
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_dist.config import Train
from mistral_dist.guards import HISTORY, PATIENCE, Guard, Trouble, center_and_spread, reach

TRAIN = Train()


def after(losses: list[float | None], train: Train = TRAIN) -> tuple[Guard, list[tuple[int, Trouble]]]:
    """The guard after these steps, and every alarm with its step."""
    guard, alarms = Guard(), []
    for step, loss in enumerate(losses, 1):
        guard = guard.after(step, loss)
        trouble = guard.trouble(step, train)
        if trouble is not None:
            alarms.append((step, trouble))
    return guard, alarms


def falling(steps: int, seed: int = 0) -> list[float | None]:
    """Losses of a run that goes well: from 3 to 0.3, with the scatter of small batches and some hard ones."""
    rng = random.Random(seed)
    return [(0.3 + 2.7 * math.exp(-step / 40)) * rng.lognormvariate(0, 0.25) * (4 if rng.random() < 0.03 else 1) for step in range(steps)]


@pytest.mark.parametrize("seed", range(40))
def test_a_run_that_goes_well_raises_no_alarm(seed: int) -> None:
    assert after(falling(2000, seed))[1] == []


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("factor", [8.0, 100.0])
def test_a_loss_that_jumps_and_stays_up_is_seen_after_five_steps(seed: int, factor: float) -> None:
    well = falling(300, seed)
    spoiled = [loss * factor for loss in falling(400, seed)[300:] if loss is not None]
    _, alarms = after([*well, *spoiled])
    step, trouble = alarms[0]
    assert step == 300 + PATIENCE
    # step 301 is the first to show what an update before it did
    assert (trouble.first, trouble.last) == (step + 1 - 2 * PATIENCE, step)
    assert trouble.first < 300


def test_one_hard_batch_is_no_trouble() -> None:
    usual: list[float | None] = [1.0 + 0.01 * (n % 7) for n in range(HISTORY + PATIENCE)]
    assert after([*usual, *[50.0] * (PATIENCE - 1), *usual])[1] == []
    assert len(after([*usual, *[50.0] * PATIENCE])[1]) == 1


def test_before_there_is_a_history_no_loss_is_a_spike() -> None:
    assert after([1.0] * (HISTORY - 1) + [99.0] * PATIENCE)[1] == []
    assert after([1.0] * HISTORY + [99.0] * PATIENCE)[1] != []


def test_a_spike_threshold_of_null_asks_for_none() -> None:
    assert after([1.0] * HISTORY + [99.0] * PATIENCE, train=Train(spike_threshold=None))[1] == []


def test_losses_that_do_not_vary_raise_no_alarm_over_a_hundredth() -> None:
    assert after([0.5] * HISTORY + [0.505] * 50)[1] == []


def test_steps_that_are_not_finite_are_left_out_and_after_three_the_run_goes_back() -> None:
    guard, alarms = after([1.0, None, 1.0, None, None, 1.0, None, None, None])
    assert guard.untrained == (2, 4, 5, 7, 8, 9)
    assert guard.losses == (1.0, 1.0, 1.0)
    ((step, trouble),) = alarms
    assert (step, trouble.first, trouble.last) == (9, 1, 9), "only three were trained before"
    assert "not finite in 3 steps in a row" in trouble.because
    assert after([1.0] * 20 + [None] * 3)[1][0][1].first == 21 - PATIENCE
    assert [step for step, _ in after([None] * 4, train=Train(max_skipped_steps=1))[1]] == [1, 2, 3, 4]


def test_after_going_back_the_steps_are_passed_over_and_count_as_no_update() -> None:
    saved = after([1.0] * 10)[0]
    guard = after([1.0] * 14)[0].after_going_back(saved, Trouble(12, 14, "because"))
    assert [step for step in range(1, 20) if guard.passes_over(step)] == [12, 13, 14]
    again = guard.after(11, None).after_passing(12)
    assert again.untrained == (11, 12)
    assert again.refused == 0, "what is passed over says nothing about the adapter"
    assert again.losses == guard.losses == saved.losses


@pytest.mark.parametrize("kind", ["spike", "not finite"])
def test_a_run_that_has_gone_back_in_vain_goes_further_back(kind: str) -> None:
    """The steps that it passed over have not changed the adapter: what comes after them is as bad as it was before them."""
    train = Train()
    guard, alarms = after([1.0] * HISTORY + [99.0] * PATIENCE)
    step, trouble = alarms[0]
    back = after([1.0] * (trouble.first - 1))[0].after_going_back(after([1.0] * (trouble.first - 1))[0], trouble)
    guard = replace(back, losses=(1.0,) * HISTORY)
    for passed in range(trouble.first, step + 1):
        guard = guard.after_passing(passed)
    for bad in range(step + 1, step + 1 + (PATIENCE if kind == "spike" else train.max_skipped_steps)):
        assert guard.trouble(bad - 1, train) is None
        guard = guard.after(bad, 99.0 if kind == "spike" else None)
    again = guard.trouble(bad, train)
    assert again is not None
    assert again.first == trouble.first - PATIENCE
    assert again.last == bad


@pytest.mark.parametrize("skipped", [1, 3, 5, 9])
@pytest.mark.parametrize("kind", ["spike", "not finite"])
def test_a_checkpoint_that_is_old_enough_lies_before_the_trouble(skipped: int, kind: str) -> None:
    train = Train(max_skipped_steps=skipped)
    bad = [99.0] * PATIENCE if kind == "spike" else [None] * skipped
    step, trouble = after([1.0] * HISTORY + bad, train)[1][0]
    assert step - reach(train) < trouble.first
    only = Train(max_skipped_steps=skipped, spike_threshold=None)
    if kind == "not finite":
        assert step - reach(only) == trouble.first - 1, "and none that is younger"
    elif skipped <= PATIENCE:
        assert step - reach(train) == trouble.first - 1


def test_a_run_that_never_goes_back_needs_no_old_checkpoint() -> None:
    assert reach(Train(max_rewinds=0)) == 0


def test_each_way_back_is_remembered_however_far_it_leads() -> None:
    """Else a run could go back for ever between the same two checkpoints."""
    early = after([1.0] * 5)[0]
    once = early.after_going_back(after([1.0] * 20)[0], Trouble(31, 33, "because"))
    twice = once.after_going_back(early, Trouble(8, 22, "because"))
    assert twice.windows == ((31, 33), (8, 22))
    assert twice.losses == early.losses


@given(st.lists(st.one_of(st.none(), st.floats(0, 1e6)), max_size=150), st.integers(0, 150))
def test_a_guard_that_was_saved_goes_on_as_if_never_stopped(losses: list[float | None], cut: int) -> None:
    whole = after(losses)[0]
    first = after(losses[:cut])[0]
    read = Guard.from_json(json.loads(json.dumps(asdict(first))))
    assert read == first
    for step, loss in enumerate(losses[cut:], min(cut, len(losses)) + 1):
        read = read.after(step, loss)
    assert read == whole


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=60), st.floats(0.01, 100))
def test_spread_scales_with_the_losses(losses: list[float], factor: float) -> None:
    center, spread = center_and_spread(tuple(losses))
    scaled = center_and_spread(tuple(factor * loss for loss in losses))
    assert scaled == pytest.approx((factor * center, factor * spread))
