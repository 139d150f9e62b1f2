"""How sure a measure is: bootstrap intervals, and whether two models that answered the same examples differ. Pure functions.

All intervals are 95 % percentile intervals over examples (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Interval = dict[str, float]
"""value, low, high."""
LEVEL = (2.5, 97.5)
"""Percentiles."""
CHUNK = 1 << 24
"""Counts that are held at once, 128 MB."""


def intervals_of_counts(
    counts: np.ndarray, measures: Callable[[np.ndarray], Mapping[str, np.ndarray]], samples: int, seed: int = 0
) -> dict[str, Interval]:
    """Of each measure of a table of counts (a function of [..., *counts.shape]).

    Drawing n examples with replacement from n is one multinomial draw over the cells, so no example is touched.
    """
    n, rng, rows = int(counts.sum()), np.random.default_rng(seed), max(1, CHUNK // counts.size)
    found = []
    for begin in range(0, samples, rows):
        draws = rng.multinomial(n, counts.ravel() / n, size=min(rows, samples - begin))
        found.append(measures(draws.reshape(-1, *counts.shape)))
    return {name: _interval(value, np.concatenate([part[name] for part in found])) for name, value in measures(counts).items()}


def interval_of_ratio(
    numerators: np.ndarray, denominators: np.ndarray, samples: int, seed: int = 0, of: Sequence[str] | None = None
) -> Interval:
    """Of sum(numerators) / sum(denominators), each float64 [examples]: a loss per token, or with ones below a mean.

    `of`: what each example is a piece of. Pieces of one document are alike, so documents are drawn, each whole (the cluster bootstrap;
    Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
    """
    both = np.stack([numerators, denominators], axis=1).astype(np.float64)
    if of is not None:
        documents, number = np.unique(np.asarray(of), return_inverse=True)
        pieces, both = both, np.zeros((len(documents), 2))
        np.add.at(both, number, pieces)
    sums = np.concatenate([counts @ both for counts in _resamples(len(both), samples, seed)])
    return _interval(both[:, 0].sum() / both[:, 1].sum(), sums[:, 0] / sums[:, 1])


def gain(before: np.ndarray, after: np.ndarray, samples: int, of: Sequence[str] | None = None) -> Interval:
    """How much a measure has risen on the same examples: the mean of the differences, float64 or bool [examples] each."""
    return interval_of_ratio(after.astype(np.float64) - before, np.ones(len(before)), samples, of=of)


def is_interval(value: Any) -> bool:
    """Whether this is one, among other things that are said of a model."""
    return isinstance(value, dict) and {"value", "low", "high"} <= set(value)


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Whether two models that answered the same examples are right equally often: bool [examples] each.

    McNemar's exact test (Psychometrika 12, 1947): of the examples that one alone gets right, each model would get half.
    Returns how many those are, and the two-sided p-value.
    """
    from scipy.stats import binomtest  # half a second to import

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differ = only_first + only_second
    return {
        "only_base_right": only_first,
        "only_tuned_right": only_second,
        "p_value": float(binomtest(only_first, differ).pvalue) if differ else 1.0,
    }


def _resamples(n: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n examples is drawn: int64 [some, n], together `samples` rows."""
    rng, rows = np.random.default_rng(seed), max(1, CHUNK // n)
    for begin in range(0, samples, rows):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(rows, samples - begin))


def _interval(value: Any, resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled, LEVEL)
    return {"value": float(value), "low": float(low), "high": float(high)}
