"""Several runs: in what their recipes differ, and whether their results do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mistral_dist.config import leaves
from mistral_dist.errors import RunError
from mistral_dist.exams.exam import document_of
from mistral_dist.report.facts import Facts, Line
from mistral_dist.resampling import Interval, gain, interval_of_ratio, mcnemar

Pairs = list[tuple[Line, Line]]
"""What two runs say of each example."""
UNSAID = ("run.dir", "data.dir", "model.path")
"""Where things lie, which is no difference."""
SAMPLES = 2000
FEW = 20
"""Examples; with fewer an interval says nothing."""


@dataclass(frozen=True)
class Difference:
    """What a run's measure is above another's on the same test examples."""

    measure: str
    interval: Interval
    n: int
    """Examples; documents, where these are cut into several."""
    p_value: float | None = None
    """Of McNemar's exact test, where answers are right or wrong."""
    tests: int = 1
    """How many are made at once: of 20 runs that are equal, one would look different by chance (Bonferroni)."""

    @property
    def verdict(self) -> str:
        """In a word or two."""
        is_better = (self.interval["value"] > 0) != (self.measure == "loss")
        return ("better" if is_better else "worse") if self.is_real else "no difference shown"

    @property
    def is_real(self) -> bool:
        """Whether it would be there with other test examples, as far as these can tell."""
        if self.p_value is not None:
            return self.p_value * self.tests < 0.05
        # resamples of a few examples are all alike, and their interval far too narrow
        return self.n >= FEW and (self.interval["low"] > 0 or self.interval["high"] < 0)


def differing_fields(runs: Sequence[Facts]) -> list[tuple[str, list[Any]]]:
    """(field, its value in each run) of the recipes, where they are not all the same; of `evaluate`, as it was evaluated last."""
    recipes = [dict(leaves(facts.recipe.model_dump(mode="json"))) | _evaluated(facts) for facts in runs]
    names = sorted({name for recipe in recipes for name in recipe} - set(UNSAID))
    found = [(name, [recipe.get(name) for recipe in recipes]) for name in names]
    return [(name, values) for name, values in found if any(value != values[0] for value in values)]


def _evaluated(facts: Facts) -> dict[str, Any]:
    return {f"evaluate.{name}": value for name, value in ((facts.test or {}).get("evaluate") or {}).items()}


def difference(first: Facts, second: Facts, tests: int = 1) -> Difference | str:
    """Of the second run's tuned model to the first's, one of so many tests; or why they cannot be compared."""
    if first.test is None or second.test is None:
        return "not evaluated"
    classifies = first.test["task"] == "classification"
    before, after = (_lines(facts, "predictions" if classifies else "scores") for facts in (first, second))
    if isinstance(before, str) or isinstance(after, str):
        return before if isinstance(before, str) else str(after)
    if before.keys() != after.keys() or first.test["task"] != second.test["task"]:
        return "evaluated on other test examples"
    pairs = [(before[id], after[id]) for id in before]
    if classifies:
        return _of_labels(first.test, second.test, pairs, tests)
    return _of_losses(pairs, [document_of(id) for id in before], tests)


def _lines(facts: Facts, name: str) -> dict[str, Line] | str:
    file = facts.run.path / "evaluation" / f"{name}.jsonl"
    try:
        found = {line["id"]: line for line in facts.evaluation(name)}
    except RunError:
        found = {}
    there = f"{len(found):,} of the {facts.test['n']:,} examples that test.json counts" if facts.test else ""
    return found if facts.test and len(found) == facts.test["n"] else f"{file} holds {there}; evaluate that run again"


def _of_labels(first: Line, second: Line, pairs: Pairs, tests: int) -> Difference | str:
    if first.get("method") != second.get("method"):
        return "evaluated in another way (evaluate.method)"
    if any(one["label"] != other["label"] for one, other in pairs):
        return "evaluated on examples with other labels"
    before, after = (np.array([pair[n]["tuned"] == pair[n]["label"] for pair in pairs]) for n in (0, 1))
    return Difference("accuracy", gain(before, after, SAMPLES), len(pairs), mcnemar(before, after)["p_value"], tests)


def _of_losses(pairs: Pairs, documents: list[str], tests: int) -> Difference | str:
    if any(one["targets"] != other["targets"] for one, other in pairs):
        return "another tokenizer or format: the loss per token is not comparable"
    targets = np.array([one["targets"] for one, _ in pairs], np.float64)
    change = np.array([other["tuned"] - one["tuned"] for one, other in pairs])
    return Difference("loss", interval_of_ratio(change, targets, SAMPLES, of=documents), len(set(documents)), tests=tests)
