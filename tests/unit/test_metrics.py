"""Metrics against scikit-learn's, and intervals that cover."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from mistral_dist import metrics


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=80))
def test_equal_to_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = (list(column) for column in zip(*pairs, strict=True))
    confusion = metrics.confusion_matrix(truth, predicted, 5)
    assert (confusion == confusion_matrix(truth, predicted, labels=range(5))).all()
    precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, labels=range(5), average="macro", zero_division=0)
    found = metrics.summary(confusion)
    wanted = {"accuracy": accuracy_score(truth, predicted), "precision_macro": precision, "recall_macro": recall, "f1_macro": f1}
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-12)
    each = precision_recall_fscore_support(truth, predicted, labels=range(5), average=None, zero_division=0)
    for name, values in zip(("precision", "recall", "f1"), each, strict=False):
        np.testing.assert_allclose(metrics.per_class(confusion)[name], values, atol=1e-12)


def test_a_report_has_all_of_the_contract() -> None:
    report = metrics.report(np.array([[8, 2], [3, 7]]), ["a", "b"], samples=500)
    for name in metrics.MEASURES:
        measure = report[name]
        assert measure["low"] <= measure["value"] <= measure["high"]
    assert report["confusion_matrix"] == [[8, 2], [3, 7]]
    assert report["per_class"]["a"] == {"precision": 8 / 11, "recall": 0.8, "f1": 16 / 21, "support": 10}
    assert report == metrics.report(np.array([[8, 2], [3, 7]]), ["a", "b"], samples=500)


def test_intervals_cover_the_truth() -> None:
    """Over 1,000 test sets of 300 drawn from a known classifier, the 95 % interval holds the truth about that often."""
    rng = np.random.default_rng(1)
    cells = np.array([[0.30, 0.05, 0.05], [0.02, 0.20, 0.08], [0.05, 0.05, 0.20]])
    truth = float(metrics.summary(cells * 1e6)["f1_macro"])
    held = 0
    for _ in range(1000):
        drawn = rng.multinomial(300, cells.ravel()).reshape(3, 3)
        interval = metrics.with_intervals(drawn, samples=1000)["f1_macro"]
        held += interval["low"] <= truth <= interval["high"]
    assert 0.92 <= held / 1000 <= 0.98
