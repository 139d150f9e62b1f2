"""Confusion matrix -> accuracy, precision, recall, F1, with bootstrap intervals. Pure functions of counts.

`confusion[i, j]` counts the examples of label i that were given label j; a last column more than there are labels counts those
that were given none of them. A class that is never predicted has precision 0, one that never occurs recall 0, as in
scikit-learn with `zero_division=0`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mistral_dist.resampling import intervals_of_counts

NAMES = ("precision", "recall", "f1")
MEASURES = ("accuracy", *(f"{name}_{average}" for average in ("macro", "weighted", "micro") for name in NAMES))
"""What is said about one model. macro: the mean over the classes; weighted: by how often each occurs; micro: over all decisions, which
is accuracy again unless some answer was no label."""


def confusion_matrix(labels: Sequence[int], predictions: Sequence[int | None], classes: int) -> np.ndarray:
    """int64 [classes, classes] from label and prediction indices; with a column more where a prediction is None."""
    columns = classes + any(prediction is None for prediction in predictions)
    confusion = np.zeros((classes, columns), np.int64)
    given = [classes if prediction is None else prediction for prediction in predictions]
    np.add.at(confusion, (np.asarray(labels, np.int64), np.asarray(given, np.int64)), 1)
    return confusion


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """precision, recall, f1: float64 [..., classes] of confusion matrices [..., classes, columns]."""
    hits, predicted, actual = _decisions(confusion)
    return {"precision": _ratio(hits, predicted), "recall": _ratio(hits, actual), "f1": _ratio(2 * hits, predicted + actual)}


def summary(confusion: np.ndarray, drawn_from: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Each of MEASURES, float64 [...], of confusion matrices [..., classes, columns].

    The mean over the classes leaves out a class that is neither there nor said, as scikit-learn does, which then knows nothing of it.
    `drawn_from`: the matrix that these are resamples of. A class that is there but was not drawn says nothing about the model, so it is
    left out, too; counted as 0, of many small classes some would always pull the mean down.
    """
    hits, predicted, actual = (counts.sum(-1) for counts in _decisions(confusion))
    micro = {"precision": _ratio(hits, predicted), "recall": _ratio(hits, actual), "f1": _ratio(2 * hits, predicted + actual)}
    share = _ratio(confusion.sum(-1), actual[..., None])
    classes = per_class(confusion)
    origin = confusion if drawn_from is None else drawn_from
    is_said = origin[..., : confusion.shape[-2]].sum(-2) > 0
    counted = np.where(origin.sum(-1) > 0, confusion.sum(-1) > 0, is_said)
    return {
        "accuracy": _ratio(hits, actual),
        **{f"{name}_macro": (classes[name] * counted).sum(-1) / counted.sum(-1) for name in NAMES},
        **{f"{name}_weighted": (classes[name] * share).sum(-1) for name in NAMES},
        **{f"{name}_micro": micro[name] for name in NAMES},
    }


def report(confusion: np.ndarray, labels: Sequence[str], samples: int) -> dict[str, Any]:
    """Everything that test.json says about one model: measures with intervals, per class, confusion matrix."""
    classes = per_class(confusion)
    rows = {
        label: {**{name: float(values[i]) for name, values in classes.items()}, "support": int(confusion[i].sum())}
        for i, label in enumerate(labels)
    }
    intervals = intervals_of_counts(confusion, lambda drawn: summary(drawn, confusion), samples)
    return {**intervals, "per_class": rows, "confusion_matrix": confusion.tolist()}


def _decisions(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class how often it was given rightly, given, and there: float64 [..., classes]."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    predicted = confusion[..., : confusion.shape[-2]].sum(-2)
    return hits.astype(np.float64), predicted.astype(np.float64), confusion.sum(-1).astype(np.float64)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    result: np.ndarray = np.divide(numerator, denominator, out=np.zeros(denominator.shape), where=denominator > 0)
    return result
