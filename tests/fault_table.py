"""docs/faults.md: what goes wrong, what comes of it, and the test that did it; made from the results of a test run.

    make faults        every fault under every ZeRO stage, some two hours on 2 cores
    make faults-left   those that were not reached, or did not pass

A test that injects a fault says so: `@pytest.mark.fault("what goes wrong", "what comes of it", zero=(2,))`; parametrized by
stage it has no `zero`, its parameter of that name tells.
"""

import json
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


class Results:
    """What became of each test, in lines of JSON, each written at once: a run that is cut short leaves it. A test's last one counts."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def add(self, test: str, mark: Mark | None, outcome: str) -> None:
        """`test`: its node id."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps([test, mark, outcome]) + "\n")

    def latest(self) -> dict[str, tuple[Mark | None, Outcome]]:
        """By node id; empty where there is no file."""
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        found = {test: (mark, outcome) for test, mark, outcome in map(json.loads, lines)}
        return {test: (Mark(*mark[:3], tuple(mark[3])) if mark else None, outcome) for test, (mark, outcome) in found.items()}

    def table(self) -> str:
        """The page."""
        return table((mark, outcome) for mark, outcome in self.latest().values() if mark is not None)


def table(results: Iterable[tuple[Mark, Outcome]]) -> str:
    """The page; `results`: of each test with a mark, what the mark says and what became of it."""
    rows: dict[tuple[str, str], Row] = {}
    for (fault, promised, test, stages), outcome in results:
        row = rows.setdefault((fault, test), Row(fault, promised, test))
        for stage in stages:
            row.seen[stage] = max(row.seen.get(stage, "passed"), outcome, key=list(CELLS).index)
    return HEAD + "".join(f"{row}\n" for row in sorted(rows.values(), key=lambda row: (row.test, row.fault)))
