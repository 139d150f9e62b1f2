"""The split: shares, strata, and that nothing ever moves."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_dist.data.example import Example
from mistral_dist.data.split import SPLITS, split


def examples(n: int, labels: int = 3, start: int = 0) -> list[Example]:
    return [Example(f"f:{i}", f"text {i}", f"label {i % labels}") for i in range(start, start + n)]


def test_shares_are_exact_in_every_label() -> None:
    made = examples(3000)
    where = split(made, 0.1, 0.1, seed=0)
    for label in range(3):
        counts = Counter(where[example.id] for example in made if example.label == f"label {label}")
        assert counts == {"train": 800, "validation": 100, "test": 100}


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 200), more=st.integers(0, 200), validation=st.floats(0, 0.45), test=st.floats(0, 0.45), seed=st.integers(0, 9))
def test_new_rows_never_move_old_ones(n: int, more: int, validation: float, test: float, seed: int) -> None:
    old = split(examples(n), validation, test, seed)
    new = split(examples(n + more), validation, test, seed, assigned=old)
    assert all(new[id] == where for id, where in old.items())
    assert set(new) == {example.id for example in examples(n + more)}
    assert set(new.values()) <= set(SPLITS)


def test_new_rows_fill_up_to_the_shares() -> None:
    old = split(examples(900), 0.1, 0.1, seed=0)
    new = split(examples(1800), 0.1, 0.1, seed=0, assigned=old)
    assert Counter(new.values()) == {"train": 1440, "validation": 180, "test": 180}


def test_the_order_of_the_rows_does_not_matter() -> None:
    made = examples(500)
    assert split(made, 0.1, 0.1, seed=0) == split(made[::-1], 0.1, 0.1, seed=0)


def test_the_seed_does() -> None:
    assert split(examples(500), 0.1, 0.1, seed=0) != split(examples(500), 0.1, 0.1, seed=1)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_first_of_few_are_for_training(n: int) -> None:
    assert set(split(examples(n, labels=1), 0.1, 0.1, seed=0).values()) == {"train"}
