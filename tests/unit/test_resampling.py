"""Intervals that cover, and a test of whether two models differ."""

import numpy as np
import pytest

from mistral_dist import metrics, resampling
from mistral_dist.resampling import interval_of_ratio, intervals_of_counts, mcnemar


def test_intervals_of_counts_cover_the_truth() -> None:
    """Over 1,000 test sets of 300 drawn from a known classifier, the 95 % interval holds the truth about that often."""
    rng = np.random.default_rng(1)
    cells = np.array([[0.30, 0.05, 0.05], [0.02, 0.20, 0.08], [0.05, 0.05, 0.20]])
    truth = {name: float(value) for name, value in metrics.summary(cells * 1e6).items()}
    held = dict.fromkeys(truth, 0)
    for _ in range(1000):
        drawn = rng.multinomial(300, cells.ravel()).reshape(3, 3)
        for name, interval in intervals_of_counts(drawn, lambda one, whole=drawn: metrics.summary(one, whole), samples=1000).items():
            held[name] += interval["low"] <= truth[name] <= interval["high"]
    for name, times in held.items():
        assert 0.92 <= times / 1000 <= 0.98, name


def test_intervals_of_many_small_classes_hold_their_value() -> None:
    """Of 40 classes with 3 examples each some are in no resample. A perfect classifier is perfect in each of them."""
    perfect = metrics.report(3 * np.eye(40, dtype=np.int64), [str(n) for n in range(40)], samples=300)
    for name in metrics.MEASURES:
        assert perfect[name] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    rng = np.random.default_rng(3)
    good = 3 * np.eye(40, dtype=np.int64)
    for n in rng.choice(40, 12, replace=False):
        good[n, n] -= 1
        good[n, (n + 1) % 40] += 1
    found = metrics.report(good, [str(n) for n in range(40)], samples=1000)
    for name in metrics.MEASURES:
        assert found[name]["low"] < found[name]["value"] < found[name]["high"], name


def test_the_interval_of_a_loss_per_token_covers_the_truth() -> None:
    """Long examples have lower losses here, as in real text: the ratio is no mean of means."""
    rng = np.random.default_rng(2)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(1, 60, n)
        return tokens * (3 - tokens / 40 + rng.normal(0, 0.7, n)), tokens.astype(np.float64)

    losses, tokens = draw(1_000_000)
    truth, held = losses.sum() / tokens.sum(), 0
    for _ in range(500):
        interval = interval_of_ratio(*draw(200), samples=1000)
        held += interval["low"] <= truth <= interval["high"]
    assert 0.92 <= held / 500 <= 0.98


def test_resamples_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values, ones = np.arange(50.0), np.ones(50)
    wanted = interval_of_ratio(values, ones, samples=300)
    monkeypatch.setattr(resampling, "CHUNK", 50 * 7)
    assert interval_of_ratio(values, ones, samples=300) == wanted
    assert wanted["value"] == 24.5 and wanted["low"] < 24.5 < wanted["high"]


@pytest.mark.parametrize(
    ("only_base", "only_tuned", "p_value"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 6, 2 / 2**6), (1, 9, 22 / 2**10), (9, 1, 22 / 2**10)],
    ids=["they never differ", "as often", "6 to nothing", "9 to 1", "the other way"],
)
def test_mcnemar_is_exact(only_base: int, only_tuned: int, p_value: float) -> None:
    base = np.array([True] * only_base + [False] * only_tuned + [True, False])
    tuned = np.array([False] * only_base + [True] * only_tuned + [True, False])
    assert mcnemar(base, tuned) == {"only_base_right": only_base, "only_tuned_right": only_tuned, "p_value": pytest.approx(p_value)}


def test_pieces_of_a_document_are_drawn_together() -> None:
    """20 documents of 10 pieces that are alike: drawn one by one, the interval would hold the truth in half of the cases."""
    held = {"by document": 0, "piece by piece": 0}
    documents = [str(n) for n in range(20) for _ in range(10)]
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values = np.repeat(rng.normal(size=20), 10) + 0.1 * rng.normal(size=200)
        for name, of in (("by document", documents), ("piece by piece", None)):
            interval = interval_of_ratio(values, np.ones(200), 500, seed, of)
            assert interval["value"] == pytest.approx(values.mean())
            held[name] += interval["low"] <= 0 <= interval["high"]
    assert held["by document"] >= 176, "of 20 draws alone, a percentile interval is known to be a little too narrow"
    assert held["piece by piece"] < 120
