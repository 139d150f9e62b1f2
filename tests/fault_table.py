"""docs/faults.md: what goes wrong, what comes of it, and the test that did it; made from the results of a test run.

    make faults        every fault under every ZeRO stage, some 40 minutes on 2 cores

A test that injects a fault says so: `@pytest.mark.fault("what goes wrong", "what comes of it", zero=(2,))`; parametrized by
stage it has no `zero`, its parameter of that name tells.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

STAGES = (0, 1, 2, 3)
HEAD = """# What goes wrong, and what comes of it

Real processes on gloo, a real pretrained model (its lower layers) in NF4; each cell was seen to hold by a run of the test.
ZeRO 0 is plain data parallelism, or one process. Made by `make faults`.

| what goes wrong | what comes of it | ZeRO 0 | 1 | 2 | 3 | test |
|---|---|---|---|---|---|---|
"""


@dataclass
class Row:
    """One fault."""

    fault: str
    outcome: str
    test: str
    seen: dict[int, bool] = field(default_factory=dict)
    """By ZeRO stage: whether the test passed."""

    def __str__(self) -> str:
        cells = " | ".join({None: "", True: "yes", False: "**no**"}[self.seen.get(stage)] for stage in STAGES)
        return f"| {self.fault} | {self.outcome} | {cells} | `{self.test}` |"


class Mark(NamedTuple):
    """What a test says of its fault."""

    fault: str
    outcome: str
    test: str
    stages: tuple[int, ...]


def mark_of(item: pytest.Item) -> Mark | None:
    """None for a test without a fault."""
    mark = item.get_closest_marker("fault")
    if mark is None:
        return None
    fault, outcome = mark.args
    parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    stages = mark.kwargs.get("zero") or (parameters["zero"],)
    file, _, name = item.nodeid.partition("::")
    return Mark(fault, outcome, f"{Path(file).name}::{name.partition('[')[0]}", tuple(stages))


def table(results: Iterable[tuple[Mark, bool]]) -> str:
    """The page; `results`: of each test with a mark, what the mark says and whether it passed."""
    rows: dict[tuple[str, str], Row] = {}
    for (fault, outcome, test, stages), passed in results:
        row = rows.setdefault((fault, test), Row(fault, outcome, test))
        for stage in (int(str(stage)[0]) for stage in stages):  # "2+offload" is seen to hold under ZeRO-2
            row.seen[stage] = row.seen.get(stage, True) and passed
    return HEAD + "".join(f"{row}\n" for row in sorted(rows.values(), key=lambda row: (row.test, row.fault)))
