"""The table of faults: a cell for each stage, each as bad as the worst that was seen, none lost."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.fault_table import STAGES, Mark, Outcome, Results, Stage, mark_of, table


def cells(results: Iterable[tuple[tuple[Stage, ...], Outcome]]) -> list[str]:
    """Of the only row, those of the stages."""
    page = table((Mark("a fault", "nothing lost", "test_it.py::test_it", stages), outcome) for stages, outcome in results)
    head, rule, row = page.splitlines()[-3:]
    assert head.count("|") == rule.count("|") == row.count("|")
    first, *found, last = [cell.strip() for cell in row.split("|")[1:-1]]
    assert (first, found[0], last) == ("a fault", "nothing lost", "`test_it.py::test_it`")
    assert len(found) == 1 + len(STAGES)
    return found[1:]


def test_a_stage_with_offload_is_another_than_the_stage() -> None:
    assert cells([((2,), "passed"), (("2+offload",), "failed"), (("3+offload",), "passed")]) == ["", "", "yes", "", "**no**", "yes"]


def test_a_test_that_was_skipped_keeps_its_row() -> None:
    assert cells([((0, 3), "skipped")]) == ["skipped", "", "", "skipped", "", ""]


@pytest.mark.parametrize("order", [1, -1])
def test_the_worst_is_shown(order: int) -> None:
    outcomes: list[tuple[tuple[Stage, ...], Outcome]] = [((0, 1, 2), "passed"), ((1, 2), "skipped"), ((2,), "failed")]
    assert cells(outcomes[::order]) == ["yes", "skipped", "**no**", "", "", ""]


def test_a_mark_names_its_stages_or_the_parameter_does() -> None:
    for mark, stages in (
        (pytest.mark.fault("a fault", "nothing lost", zero=(0, "3+offload")), (0, "3+offload")),
        (pytest.mark.fault("a fault", "nothing lost"), ("2+offload",)),
    ):
        test = SimpleNamespace(
            get_closest_marker={"fault": mark.mark}.get,
            nodeid="tests/dist/test_it.py::test_it[2-2+offload]",
            callspec=SimpleNamespace(params={"zero": "2+offload"}),
        )
        assert mark_of(cast("pytest.Item", test)) == Mark("a fault", "nothing lost", "test_it.py::test_it", stages)


def test_a_test_that_is_run_again_shows_what_it_showed_last(tmp_path: Path) -> None:
    """Of two tests of a row each counts: one that fails is not hidden by the other, which passes."""
    results = Results(tmp_path / "build" / "faults.jsonl")
    assert results.latest() == {}
    mark = Mark("a fault", "nothing lost", "test_it.py::test_it", (2, "3+offload"))
    results.add("it[1]", mark, "failed")
    results.add("it[2]", mark, "passed")
    results.add("other", None, "passed")
    assert results.latest() == {"it[1]": (mark, "failed"), "it[2]": (mark, "passed"), "other": (None, "passed")}
    assert results.table() == table([(mark, "failed")])
    results.add("it[1]", mark, "passed")
    assert Results(tmp_path / "build" / "faults.jsonl").table() == table([(mark, "passed")])
