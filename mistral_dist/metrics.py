"""Confusion matrix -> accuracy, precision, recall, F1, and their bootstrap intervals. Pure functions of counts.

`confusion[i, j]` counts the examples of label i that were given label j. A class that is never predicted has precision 0,
one that never occurs recall 0, as in scikit-learn with `zero_division=0`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

MEASURES = ("accuracy", "precision_macro", "recall_macro", "f1_macro")


def confusion_matrix(labels: Sequence[int], predictions: Sequence[int], classes: int) -> np.ndarray:
    """int64 [classes, classes] from label and prediction indices."""
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (np.asarray(labels, np.int64), np.asarray(predictions, np.int64)), 1)
    return confusion


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """precision, recall, f1: float64 [..., classes] of confusion matrices [..., classes, classes]."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    predicted, actual = confusion.sum(-2), confusion.sum(-1)
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, actual),
        "f1": _ratio(2 * hits, predicted + actual),
    }


def summary(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Each of MEASURES, float64 [...], of confusion matrices [..., classes, classes]."""
    classes = per_class(confusion)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).sum(-1)
    return {
        "accuracy": _ratio(hits.astype(np.float64), confusion.sum((-2, -1))),
        **{f"{name}_macro": values.mean(-1) for name, values in classes.items()},
    }


def with_intervals(confusion: np.ndarray, samples: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Each of MEASURES as value, low, high: the 95 % percentile bootstrap interval over examples.

    Drawing n examples with replacement from n is one multinomial draw over the cells of the confusion matrix, so no
    example is touched (Efron and Tibshirani, 1993, chapter 13).
    """
    n, classes = int(confusion.sum()), confusion.shape[0]
    draws = np.random.default_rng(seed).multinomial(n, confusion.ravel() / n, size=samples).reshape(samples, classes, classes)
    values, resampled = summary(confusion), summary(draws)
    bounds = {name: np.percentile(resampled[name], [2.5, 97.5]) for name in MEASURES}
    return {name: {"value": float(values[name]), "low": float(bounds[name][0]), "high": float(bounds[name][1])} for name in MEASURES}


def report(confusion: np.ndarray, labels: Sequence[str], samples: int) -> dict[str, Any]:
    """Everything that test.json says about one model: measures with intervals, per class, confusion matrix."""
    classes = per_class(confusion)
    rows = {
        label: {**{name: float(values[i]) for name, values in classes.items()}, "support": int(confusion[i].sum())}
        for i, label in enumerate(labels)
    }
    return {**with_intervals(confusion, samples), "per_class": rows, "confusion_matrix": confusion.tolist()}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.divide(numerator, denominator, out=np.zeros_like(numerator, np.float64), where=denominator > 0)
    return result
