"""docs/faults.md: what goes wrong, what comes of it, and the test that did it; made from the results of a test run.

    make faults        every fault under every ZeRO stage, some 40 minutes on 2 cores

A test that injects a fault says so: `@pytest.mark.fault("what goes wrong", "what comes of it", zero=(2,))`; parametrized by
stage it has no `zero`, its parameter of that name tells.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

Stage = int | str
Outcome = Literal["passed", "skipped", "failed"]
STAGES: dict[Stage, str] = {0: "ZeRO 0", 1: "1", 2: "2", 3: "3", "2+offload": "2 with offload", "3+offload": "3 with offload"}
"""As a parameter says it, and as a column's head."""
CELLS: dict[Outcome | None, str] = {None: "", "passed": "yes", "skipped": "skipped", "failed": "**no**"}
"""What is further down is told, where several tests make a cell."""
HEAD = f"""# What goes wrong, and what comes of it

Real processes on gloo, a real pretrained model (its lower layers) in NF4; each "yes" was seen by a run of the test.
ZeRO 0 is plain data parallelism, or one process. Made by `make faults`.

| what goes wrong | what comes of it | {" | ".join(STAGES.values())} | test |
|---|---|{"---|" * len(STAGES)}---|
"""


@dataclass
class Row:
    """One fault."""

    fault: str
    outcome: str
    test: str
    seen: dict[Stage, Outcome] = field(default_factory=dict)
    """By ZeRO stage: the worst that became of the test."""

    def __str__(self) -> str:
        cells = " | ".join(CELLS[self.seen.get(stage)] for stage in STAGES)
        return f"| {self.fault} | {self.outcome} | {cells} | `{self.test}` |"


class Mark(NamedTuple):
    """What a test says of its fault."""

    fault: str
    outcome: str
    test: str
    stages: tuple[Stage, ...]


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


def table(results: Iterable[tuple[Mark, Outcome]]) -> str:
    """The page; `results`: of each test with a mark, what the mark says and what became of it."""
    rows: dict[tuple[str, str], Row] = {}
    for (fault, promised, test, stages), outcome in results:
        row = rows.setdefault((fault, test), Row(fault, promised, test))
        for stage in stages:
            row.seen[stage] = max(row.seen.get(stage, "passed"), outcome, key=list(CELLS).index)
    return HEAD + "".join(f"{row}\n" for row in sorted(rows.values(), key=lambda row: (row.test, row.fault)))
