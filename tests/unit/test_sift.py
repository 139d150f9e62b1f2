"""Which documents stay, and in which split: who wins, what hangs together, and what leaks."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_dist.config import Data
from mistral_dist.data.assignments import Known
from mistral_dist.data.columns import group_id
from mistral_dist.data.duplicates import PERMUTATIONS, sketch
from mistral_dist.data.example import Example
from mistral_dist.data.sift import Documents, Sifted, _leakage, remembered, sift
from mistral_dist.data.split import SPLITS

FOX = "the quick brown fox jumps over the lazy dog and runs away from all the other animals in the wide green wood today"


def data(*into: str | None, **fields: object) -> Data:
    sources = [{"path": "x.jsonl", "into": side} for side in (into or (None,))]
    return Data.model_validate({"sources": sources, **fields})


def documents(rows: list[dict[str, Any]], *, near: bool = True) -> Documents:
    """Rows of text, and optionally label (a number), source, group."""
    texts = [row["text"] for row in rows]
    return Documents(
        ids=np.array([int(Example("", text).id, 16) for text in texts], np.uint64),
        labels=np.array([row.get("label", -1) for row in rows], np.int32),
        sources=np.array([row.get("source", 0) for row in rows], np.int16),
        groups=np.array([group_id(row.get("group", "")) for row in rows], np.uint64),
        sketches=np.array([sketch(text) for text in texts], np.uint32).reshape(len(rows), PERMUTATIONS)
        if near
        else np.empty((len(rows), 0), np.uint32),
        text=texts.__getitem__,
        place=lambda number: f"f:{number}",
    )


def where(found: Sifted) -> list[str | None]:
    return [None if number < 0 else SPLITS[number] for number in found.splits.tolist()]


def reasons(found: Sifted) -> dict[int, str]:
    return {document: reason for document, reason, _ in found.dropped}


def different(n: int) -> list[dict[str, Any]]:
    return [{"text": f"row {i} says {i * 7919 % 1009} and {i * 104729 % 997}"} for i in range(n)]


def test_of_equal_texts_the_first_stays() -> None:
    found = sift(documents([{"text": "a"}, {"text": "b"}, {"text": "a"}]), data(), Known())
    assert found.dropped == [(2, "duplicate", "same as f:0")]


def test_of_near_duplicates_the_first_stays() -> None:
    found = sift(documents([{"text": FOX}, {"text": FOX + " again"}]), data(), Known())
    assert found.dropped == [(1, "near_duplicate", "like f:0")]
    assert sift(documents([{"text": FOX}, {"text": FOX + " again"}], near=False), data(near_duplicates=None), Known()).dropped == []


def test_a_text_under_two_labels_goes_altogether() -> None:
    found = sift(documents([{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "a", "label": 1}]), data(), Known())
    assert reasons(found) == {0: "conflicting_labels", 2: "conflicting_labels"}
    assert "f:0" in found.dropped[1][2]


def test_where_two_sides_contradict_each_other_the_test_example_stays() -> None:
    rows = [{"text": "a", "label": 0, "source": 0}, {"text": "b", "label": 0, "source": 0}, {"text": "a", "label": 1, "source": 1}]
    found = sift(documents(rows), data("train", "test"), Known())
    assert where(found) == [None, "train", "test"]
    assert found.dropped == [(0, "conflicting_labels", "the same text has another label at f:2 (test)")]


def test_near_equal_test_examples_of_ones_own_are_taken_as_they_are() -> None:
    rows = [
        {"text": FOX, "source": 1},
        {"text": FOX + " again", "source": 1},
        {"text": FOX + " too", "source": 0},
        {"text": "x", "source": 0},
    ]
    found = sift(documents(rows), data("train", "test"), Known())
    assert where(found) == ["test", "test", None, "train"]


def test_the_order_of_the_rows_decides_no_split() -> None:
    rows = [{**row, "group": f"patient {n % 30}", "label": n % 3} for n, row in enumerate(different(300))]
    sides = where(sift(documents(rows, near=False), data(near_duplicates=None), Known()))
    other = where(sift(documents(rows[::-1], near=False), data(near_duplicates=None), Known()))
    assert other[::-1] == sides


def test_a_test_example_of_ones_own_stays_and_what_says_the_same_in_train_goes() -> None:
    rows = [{"text": "a", "source": 0}, {"text": FOX + " again", "source": 0}, {"text": "c", "source": 0}]
    rows += [{"text": "a", "source": 1}, {"text": FOX, "source": 1}]
    found = sift(documents(rows), data("train", "test"), Known())
    assert where(found) == [None, None, "train", "test", "test"]
    assert found.dropped == [(0, "duplicate", "same as f:3 (test)"), (1, "near_duplicate", "like f:4 (test)")]
    assert found.leakage == {"equal": 0, "near": 0}


def test_splits_of_ones_own_take_no_part_in_the_shares() -> None:
    rows = different(200) + [{**row, "text": "own " + row["text"], "source": 1} for row in different(100)]
    found = sift(documents(rows, near=False), data(None, "test", near_duplicates=None), Known())
    assert Counter(where(found)[:200]) == {"train": 160, "validation": 20, "test": 20}
    assert set(where(found)[200:]) == {"test"}


def test_near_duplicates_can_stay_together_instead() -> None:
    rows = [{"text": f"{FOX} {FOX[::-1]} {n} times"} for n in range(30)] + different(300)
    found = sift(documents(rows), data(near_duplicate_policy="keep_together"), Known())
    assert found.dropped == []
    assert len(set(where(found)[:30])) == 1
    assert found.leakage == {"equal": 0, "near": 0}


def test_leakage_is_seen_where_there_is_some() -> None:
    """The same documents, parted by a split that knows nothing of near-duplicates or groups."""
    rows = [{"text": FOX, "group": "g"}, {"text": FOX + " again", "group": "g"}, {"text": "other", "group": "h"}, {"text": "other"}]
    made = documents(rows)
    assert _leakage(made, np.array([0, 1, 0, 2], np.int8), 0.8, grouping=True) == {"equal": 1, "groups": 1, "near": 2}
    assert _leakage(made, np.array([0, 0, 2, 2], np.int8), 0.8, grouping=True) == {"equal": 0, "groups": 0, "near": 0}


def test_a_group_stays_in_one_split() -> None:
    rows = [{**row, "group": f"patient {n % 40}"} for n, row in enumerate(different(400))]
    found = sift(documents(rows, near=False), data(near_duplicates=None), Known())
    sides = {n: {side for row, side in zip(rows, where(found), strict=True) if row["group"] == f"patient {n}"} for n in range(40)}
    assert all(len(side) == 1 for side in sides.values())
    assert Counter(next(iter(side)) for side in sides.values()) == {"train": 32, "validation": 4, "test": 4}
    assert _leakage(documents(rows, near=False), found.splits, None, grouping=True) == {"equal": 0, "groups": 0}


def known(made: Documents, found: Sifted) -> Known:
    """What `prepare` writes down."""
    return remembered(Known(), made, found, data())


def test_what_was_there_before_stays_even_where_new_rows_come_first() -> None:
    old = documents([{"text": FOX}, *different(50)])
    before = sift(old, data(), Known())
    new = documents([{"text": FOX + " again"}, *different(50)[::-1], {"text": FOX}])
    after = sift(new, data(), known(old, before))
    assert after.dropped == [(0, "near_duplicate", f"like f:51 ({where(before)[0]})")]
    assert where(after)[1:51][::-1] == where(before)[1:]


def test_a_new_row_near_both_sides_is_left_out() -> None:
    one, other = " ".join(f"a{n}" for n in range(40)), " ".join(f"b{n}" for n in range(40))
    old = documents([{"text": one}, {"text": other}])
    places = Known({int(old.ids[0]): "train", int(old.ids[1]): "test"})
    between = {"text": one + " x", "group": "g"}
    rows = [{"text": one}, {"text": other}, between, {"text": other + " x", "group": "g"}, {"text": "alone"}]
    found = sift(documents(rows), data(near_duplicate_policy="keep_together"), places)
    assert reasons(found) == {2: "between_splits", 3: "between_splits"}
    assert where(found)[:2] == ["train", "test"]
    assert found.dropped[0][2] == "belongs together with f:1 in test and f:0 in train"


def test_a_copy_that_is_dropped_leaves_its_group_to_the_one_that_stays() -> None:
    rows = [{**row, "group": f"g{n}"} for n, row in enumerate(different(40))]
    copies = [{"text": f"copied {n}"} for n in range(40)] + [{"text": f"copied {n}", "group": f"g{n}"} for n in range(40)]
    sides = where(sift(documents(rows + copies, near=False), data(near_duplicates=None), Known()))
    assert sides[:40] == sides[40:80]
    assert sides[80:] == [None] * 40
    assert set(sides[:40]) == set(SPLITS)


def test_a_new_row_of_a_known_group_goes_where_the_group_is() -> None:
    old = documents([{**row, "group": f"g{n}"} for n, row in enumerate(different(30))])
    before = sift(old, data(), Known())
    for group, side in [(0, where(before)[0]), (where(before).index("test"), "test")]:
        new = documents([{"text": "something that is new here", "group": f"g{group}"}])
        assert where(sift(new, data(), known(old, before))) == [side]


def test_groups_of_ones_own_splits_that_touch_leave_the_test_alone() -> None:
    rows = [{"text": "a", "source": 0, "group": "g"}, {"text": "b", "source": 0}, {"text": "c", "source": 1, "group": "g"}]
    found = sift(documents(rows), data("train", "test"), Known())
    assert where(found) == [None, "train", "test"]
    assert reasons(found) == {0: "leaks"}


@settings(max_examples=60, deadline=None)
@given(
    first=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 6), st.integers(0, 2)), max_size=40),
    more=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 6), st.integers(0, 2)), max_size=40),
    order=st.randoms(use_true_random=False),
    policy=st.sampled_from(["drop", "keep_together"]),
)
def test_nothing_moves_and_nothing_leaks(first: Any, more: Any, order: Any, policy: str) -> None:
    """Rows of 26 texts in 3 nearly equal forms and 6 groups; more rows mixed in at any place."""

    def made(rows: Any) -> Documents:
        base = [" ".join(f"t{text}w{n}" for n in range(40)) for text in range(26)]
        group = {0: ""} | {n: f"g{n}" for n in range(1, 7)}
        return documents([{"text": base[text] + " x" * form, "group": group[g]} for text, g, form in rows])

    choice = data(near_duplicate_policy=policy)
    old = made(first)
    before = sift(old, choice, Known())
    rows = [*first, *more]
    order.shuffle(rows)
    new = made(rows)
    after = sift(new, choice, known(old, before))
    assert set(after.leakage.values()) == {0}
    assert len(after.dropped) + sum(side is not None for side in where(after)) == len(rows)
    sides = {int(new.ids[n]): side for n, side in enumerate(where(after)) if side is not None}
    for n, side in enumerate(where(before)):
        if side is not None:
            assert sides[int(old.ids[n])] == side


@pytest.mark.parametrize(("stratify", "wanted"), [("auto", {8}), ("label", {8}), ("none", {6, 7, 8, 9, 10})])
def test_each_label_has_the_same_shares(stratify: str, wanted: set[int]) -> None:
    rows = [{**row, "label": n % 10} for n, row in enumerate(different(100))]
    found = sift(documents(rows, near=False), data(near_duplicates=None, stratify=stratify), Known())
    counts = Counter(row["label"] for row, side in zip(rows, where(found), strict=True) if side == "train")
    assert set(counts.values()) <= wanted
    assert where(found).count("train") == 80


def test_without_labels_each_source_has_the_same_shares() -> None:
    rows = [{**row, "source": n % 2} for n, row in enumerate(different(200))]
    found = sift(documents(rows, near=False), data(None, None, near_duplicates=None), Known())
    counts = Counter((row["source"], side) for row, side in zip(rows, where(found), strict=True))
    assert counts == {(s, side): n for s in (0, 1) for side, n in (("train", 80), ("validation", 10), ("test", 10))}


def test_nothing_is_nothing() -> None:
    assert sift(documents([], near=False), data(near_duplicates=None), Known()).dropped == []
