"""Metrics against scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from mistral_dist import metrics

CLASSES = 5
Pairs = list[tuple[int, int]]


def pairs(most: int) -> st.SearchStrategy[Pairs]:
    return st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, most)), min_size=1, max_size=80)


@settings(max_examples=200, deadline=None)
@given(pairs=st.one_of(pairs(CLASSES - 1), pairs(CLASSES)))
def test_equal_to_scikit_learn(pairs: Pairs) -> None:
    """Also where some predictions are none of the labels: to scikit-learn those are a class that is left out of `labels`."""
    truth, predicted = (list(column) for column in zip(*pairs, strict=True))
    confusion = metrics.confusion_matrix(truth, [None if one == CLASSES else one for one in predicted], CLASSES)
    columns = confusion.shape[1]
    assert (confusion == confusion_matrix(truth, predicted, labels=range(CLASSES + 1))[:CLASSES, :columns]).all()
    assert columns == CLASSES + (CLASSES in predicted)
    found = metrics.summary(confusion)
    assert set(found) == set(metrics.MEASURES)
    assert float(found["accuracy"]) == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    seen = sorted({*truth, *predicted} - {CLASSES})  # what scikit-learn takes by itself
    for average in ("macro", "weighted", "micro"):
        wanted = precision_recall_fscore_support(truth, predicted, labels=seen, average=average, zero_division=0)
        for name, value in zip(metrics.NAMES, wanted, strict=False):
            assert float(found[f"{name}_{average}"]) == pytest.approx(value, abs=1e-12), (name, average)
    each = precision_recall_fscore_support(truth, predicted, labels=range(CLASSES), average=None, zero_division=0)
    for name, values in zip(metrics.NAMES, each, strict=False):
        np.testing.assert_allclose(metrics.per_class(confusion)[name], values, atol=1e-12)


def test_a_label_that_nobody_has_or_says_takes_nothing_from_the_mean() -> None:
    confusion = np.array([[3, 0, 0], [0, 2, 0], [0, 0, 0]])
    assert float(metrics.summary(confusion)["f1_macro"]) == 1.0
    assert metrics.report(confusion, ["a", "b", "c"], samples=200)["f1_macro"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert float(metrics.summary(np.array([[3, 0, 0], [0, 1, 1], [0, 0, 0]]))["f1_macro"]) < 0.6, "c was said, and wrongly"


def test_many_matrices_are_measured_at_once() -> None:
    matrices = np.random.default_rng(0).integers(0, 9, (4, 3, 3))
    together = metrics.summary(matrices)
    for n, matrix in enumerate(matrices):
        for name, value in metrics.summary(matrix).items():
            assert together[name][n] == pytest.approx(float(value), abs=1e-12)


def test_a_report_has_all_of_the_contract() -> None:
    report = metrics.report(np.array([[8, 2], [3, 7]]), ["a", "b"], samples=500)
    for name in metrics.MEASURES:
        measure = report[name]
        assert measure["low"] <= measure["value"] <= measure["high"]
    assert report["confusion_matrix"] == [[8, 2], [3, 7]]
    assert report["per_class"]["a"] == {"precision": 8 / 11, "recall": 0.8, "f1": 16 / 21, "support": 10}
    assert report == metrics.report(np.array([[8, 2], [3, 7]]), ["a", "b"], samples=500)
