"""The split: shares, strata, families, and that nothing ever moves."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_dist.data.split import SPLITS, Family, split

TENTHS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def families(n: int, strata: int = 3, start: int = 0) -> list[Family]:
    return [Family(f"id {i}", f"label {i % strata}") for i in range(start, start + n)]


def placed(old: list[Family], where: list[str]) -> list[Family]:
    return [Family(family.id, family.stratum, family.size, place) for family, place in zip(old, where, strict=True)]


def test_shares_are_exact_in_every_stratum() -> None:
    made = families(3000)
    where = split(made, TENTHS, seed=0)
    for stratum in range(3):
        counts = Counter(name for name, family in zip(where, made, strict=True) if family.stratum == f"label {stratum}")
        assert counts == {"train": 800, "validation": 100, "test": 100}


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 200), more=st.integers(0, 200), validation=st.floats(0, 0.45), test=st.floats(0, 0.45), seed=st.integers(0, 9))
def test_new_families_never_move_old_ones(n: int, more: int, validation: float, test: float, seed: int) -> None:
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    old = split(families(n), shares, seed)
    new = split([*placed(families(n), old), *families(more, start=n)], shares, seed)
    assert new[:n] == old
    assert len(new) == n + more
    assert set(new) <= set(SPLITS)


def test_new_families_fill_up_to_the_shares() -> None:
    old = split(families(900), TENTHS, seed=0)
    new = split([*placed(families(900), old), *families(900, start=900)], TENTHS, seed=0)
    assert Counter(new) == {"train": 1440, "validation": 180, "test": 180}


def test_large_families_are_whole_and_the_shares_near() -> None:
    made = [Family(f"id {n}", size=1 + n % 7) for n in range(400)]
    where = split(made, TENTHS, seed=0)
    sizes = Counter[str]()
    for family, name in zip(made, where, strict=True):
        sizes[name] += family.size
    for name, share in TENTHS.items():
        assert abs(sizes[name] / sum(sizes.values()) - share) < 0.01


def test_few_large_families_in_many_strata_fill_all_splits() -> None:
    made = [Family(f"id {n}", f"label {n % 10}", size=7) for n in range(50)]
    counts = Counter(split(made, TENTHS, seed=0))
    assert counts == {"train": 40, "validation": 5, "test": 5}


def test_the_order_of_the_rows_does_not_matter() -> None:
    made = families(500)
    assert split(made, TENTHS, seed=0) == split(made[::-1], TENTHS, seed=0)[::-1]


def test_the_seed_does() -> None:
    assert split(families(500), TENTHS, seed=0) != split(families(500), TENTHS, seed=1)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_first_of_few_are_for_training(n: int) -> None:
    assert set(split(families(n, strata=1), TENTHS, seed=0)) == {"train"}
