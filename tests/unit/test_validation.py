"""What validations decide: pure; and the validation examples, dealt out to any number of ranks."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_dist.config import Train
from mistral_dist.data.held_out import HeldOut
from mistral_dist.display import validation_words
from mistral_dist.model import scoring
from mistral_dist.validation import Measured, Validation
from tests.unit.test_stream import Numbered

EACH = Train(eval_steps=5)


def after(losses: list[float], train: Train = EACH) -> Validation:
    """After validations each fifth step."""
    validation = Validation()
    for number, loss in enumerate(losses, 1):
        validation = validation.after(5 * number, 5 * number, loss, train)
    return validation


# which was the best


def test_the_lowest_is_the_best_and_of_equal_ones_the_first() -> None:
    assert after([0.5, 0.3, 0.4, 0.3]) == Validation(step=20, updates=20, loss=0.3, best=0.3, best_step=10, stale=2)
    assert after([]) == Validation()


@given(st.lists(st.floats(0, 20), min_size=1))
def test_it_is_the_minimum_whatever_comes(losses: list[float]) -> None:
    found = after(losses)
    assert (found.best, found.best_step) == (min(losses), 5 * (1 + losses.index(min(losses))))
    assert found.stale == len(losses) - 1 - losses.index(min(losses))


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_is_never_the_best(odd: float) -> None:
    assert after([odd]) == Validation(step=5, updates=5, stale=1)
    assert after([0.5, odd]) == Validation(10, 10, None, 0.5, 5, 1)
    assert after([odd, odd, 0.5]) == Validation(15, 15, 0.5, 0.5, 15, 0)


# when it is enough


@pytest.mark.parametrize(
    ("losses", "threshold", "stale"),
    [
        ([0.5, 0.4, 0.3], 0.0, 0),
        ([0.5, 0.5, 0.5], 0.0, 2),
        ([0.5, 0.6, 0.4, 0.45], 0.0, 1),
        # lower, but not by more than the threshold: the best, and no improvement
        ([0.5, 0.45], 0.1, 1),
        ([0.5, 0.45, 0.35], 0.0625, 0),
        # each is compared with the best before it, as in Trainer: a slow fall is none
        ([0.5, 0.45, 0.4, 0.35], 0.1, 3),
        ([9.0], 100.0, 0),
    ],
)
def test_stale_counts_validations_since_it_improved(losses: list[float], threshold: float, stale: int) -> None:
    train = Train(eval_steps=5, early_stopping_patience=9, early_stopping_threshold=threshold)
    found = after(losses, train)
    assert found.stale == stale
    assert found.best == min(losses)


def test_it_is_enough_after_as_many_as_the_patience() -> None:
    losses = [0.5, 0.4, 0.6, 0.7, 0.8]
    told = [after(losses[:n], patient := Train(eval_steps=5, early_stopping_patience=2)).is_enough(patient) for n in range(6)]
    assert told == [False, False, False, False, True, True]
    assert not after([0.1, *range(1, 99)]).is_enough(EACH), "without patience nothing is ever enough"


def test_what_a_checkpoint_holds_comes_back_and_decides_the_same() -> None:
    train = Train(eval_steps=5, early_stopping_patience=3)
    for losses in ([], [0.5], [0.5, math.nan, 0.7], [0.1 + 0.2]):
        found = after(losses, train)
        again = Validation(**json.loads(json.dumps(asdict(found), allow_nan=False)))
        assert again == found
        assert again.after(99, 99, 0.3, train) == found.after(99, 99, 0.3, train)


# when it is due


def test_it_is_due_each_so_many_steps_and_after_the_last() -> None:
    assert [step for step in range(14) if Validation().is_due(step, step, 13, EACH)] == [5, 10, 13]
    assert not any(Validation().is_due(step, step, 13, Train()) for step in range(14)), "without eval_steps never"


def test_it_is_taken_once_and_not_where_nothing_was_trained_since() -> None:
    validation = Validation().after(5, 5, 0.5, EACH)
    assert not validation.is_due(5, 5, 13, EACH)
    assert not validation.is_due(10, 5, 13, EACH), "steps 6 to 10 were passed over"
    assert not validation.is_due(13, 5, 13, EACH)
    assert validation.is_due(10, 6, 13, EACH)


# what is told


def test_the_metrics_are_json_whatever_was_found() -> None:
    found = Measured(0.5, 12, 3, 1.23456)
    assert found.metrics() == {"loss": 0.5, "perplexity": math.exp(0.5), "targets": 12, "examples": 3, "seconds": 1.2346}
    for odd in (math.nan, math.inf, 1e5):
        told = json.loads(json.dumps(Measured(odd, 12, 3, 0.0).metrics(), allow_nan=False))
        assert told["perplexity"] is None
        assert told["loss"] == (odd if math.isfinite(odd) else None)


def test_it_is_told_in_words() -> None:
    assert after([0.5]).told() == "validation loss 0.5000"
    assert after([0.5, 0.75]).told() == "validation loss 0.7500, best 0.5000 at step 5"
    assert after([math.nan]).told() == "validation loss is not finite"
    assert validation_words({"step": 10, "loss": 0.5, "best_step": 10}) == "0.5000 at 10 (the best)"
    assert validation_words({"step": 10, "loss": None, "best_step": 5}) == "not finite at 10 (the best at 5)"


# the examples


def held_out(lengths: list[int], rank: int, world: int) -> HeldOut:
    tokens = np.array(lengths)
    return HeldOut(Numbered(lengths), (tokens, tokens - 1), 64, rank, world)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 64), min_size=1, max_size=60), world=st.integers(1, 9))
def test_every_example_is_scored_once_on_any_ranks(lengths: list[int], world: int) -> None:
    ranks = [held_out(lengths, rank, world) for rank in range(world)]
    batches = [list(rank.batches()) for rank in ranks]
    assert {len(own) for own in batches} == {ranks[0].rounds}, "each forward may be a collective"
    filled = [batch for own in batches for batch in own if batch.ids]
    assert sorted(id for batch in filled for _, ids in batch.ids for id in ids) == sorted(f"id{n}" for n in range(len(lengths)))
    assert {(rank.examples, rank.targets) for rank in ranks} == {(len(lengths), sum(lengths) - len(lengths))}
    assert sum(float(batch.weights.sum()) for own in batches for batch in own) >= ranks[0].targets
    assert all(not batch.weights.any() for own in batches for batch in own if not batch.ids), "what fills counts nothing"
    assert all(batch.input_ids.shape[1] <= 64 for own in batches for batch in own)
    # the packs are those of one rank, so each forward gives the same bits
    alone = {ids for batch in held_out(lengths, 0, 1).batches() for _, ids in batch.ids}
    assert {ids for batch in filled for _, ids in batch.ids} == alone


def test_a_validation_is_the_same_each_time() -> None:
    own = held_out([5, 9, 60, 33, 2], 0, 2)
    first, again = (list(own.batches()) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.input_ids, other.input_ids)


def test_an_example_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="has 65 tokens, a pack holds 64"):
        held_out([5, 65], 0, 1)


# the mode of the model


def test_scoring_is_without_noise_and_gradient_and_leaves_the_model_in_training() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.Dropout(0.5))).train()
    with scoring(model) as scored:
        first, again = (scored(torch.ones(1, 8)) for _ in range(2))
        assert torch.equal(first, again)
        assert not first.requires_grad
    assert all(module.training for module in model.modules())
    assert model(torch.ones(1, 8)).requires_grad
    with pytest.raises(KeyError), scoring(model):
        raise KeyError
    assert all(module.training for module in model.modules()), "also where it is left in the middle"
