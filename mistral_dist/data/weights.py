"""Class weights: how much a target token counts in the loss, by the label of its example."""

from collections.abc import Mapping

import numpy as np

from mistral_dist.config import Task


def label_weights(task: Task, counts: Mapping[str, int]) -> dict[str, float]:
    """The weight of each label that does not weigh 1; `counts`: its examples in the train split, for `balanced`.

    Rounded to float32, which the loss computes with, so that the sum of weights that it is divided by is of the same numbers.
    """
    if task.class_weights == "balanced":
        shown = {label: count for label, count in counts.items() if count}
        total = sum(shown.values())
        weights = {label: total / (len(shown) * count) for label, count in shown.items()}
    else:
        weights = dict(task.class_weights or {})
    return {label: float(np.float32(weight)) for label, weight in weights.items() if weight != 1}
