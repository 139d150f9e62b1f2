"""Several runs: in what their recipes differ, and whether their results do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mistral_dist.config import leaves
from mistral_dist.report.facts import Facts
from mistral_dist.resampling import Interval, gain, interval_of_ratio, mcnemar

UNSAID = ("run.dir", "data.dir", "model.path")
"""Where things lie, which is no difference."""
SAMPLES = 2000
FEW = 20
"""Examples; with fewer an interval says nothing."""


@dataclass(frozen=True)
class Difference:
    """How much better a run is than another on the same test examples."""

    measure: str
    interval: Interval
    n: int
    """Examples."""
    p_value: float | None = None
    """Of McNemar's exact test, where answers are right or wrong."""

    @property
    def is_real(self) -> bool:
        """Whether it would be there with other test examples, as far as these can tell."""
        if self.p_value is not None:
            return self.p_value < 0.05
        # resamples of a few examples are all alike, and their interval far too narrow
        return self.n >= FEW and (self.interval["low"] > 0 or self.interval["high"] < 0)


def differing_fields(runs: Sequence[Facts]) -> list[tuple[str, list[Any]]]:
    """(field, its value in each run) of the recipes, where they are not all the same."""
    recipes = [dict(leaves(facts.recipe.model_dump(mode="json"))) for facts in runs]
    names = sorted({name for recipe in recipes for name in recipe} - set(UNSAID))
    found = [(name, [recipe.get(name) for recipe in recipes]) for name in names]
    return [(name, values) for name, values in found if any(value != values[0] for value in values)]


def difference(first: Facts, second: Facts) -> Difference | str:
    """Of the second run's tuned model to the first's; or why they cannot be compared."""
    if first.test is None or second.test is None:
        return "not evaluated"
    if first.test["task"] == "classification":
        before, after = ({line["id"]: line for line in facts.evaluation("predictions")} for facts in (first, second))
    else:
        before, after = ({line["id"]: line for line in facts.evaluation("scores")} for facts in (first, second))
    if before.keys() != after.keys() or first.test["task"] != second.test["task"]:
        return "evaluated on other test examples"
    if first.test.get("method") != second.test.get("method"):
        return "evaluated in another way (evaluate.method)"
    if any(before[id].get("label") != after[id].get("label") for id in before):
        return "evaluated on examples with other labels"
    if first.test["task"] == "classification":
        first_right, second_right = (
            np.array([line["tuned"] == line["label"] for line in lines]) for lines in (before.values(), (after[id] for id in before))
        )
        return Difference("accuracy", gain(first_right, second_right, SAMPLES), len(before), mcnemar(first_right, second_right)["p_value"])
    if any(before[id]["targets"] != after[id]["targets"] for id in before):
        return "another tokenizer or format: the loss per token is not comparable"
    targets = np.array([line["targets"] for line in before.values()], np.float64)
    change = np.array([after[id]["tuned"] - line["tuned"] for id, line in before.items()])
    return Difference("loss", interval_of_ratio(change, targets, SAMPLES), len(before))
