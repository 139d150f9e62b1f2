"""What a person sees of the speed."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from mistral_dist.cli import _status_table
from mistral_dist.display import _measures, _Metrics
from mistral_dist.run import RunDirectory

TRAINED: dict[str, Any] = {"loss": 0.5, "tokens": 300, "tokens_per_second": 100.0, "seconds": 3.0}
PASSED: dict[str, Any] = {"loss": None, "tokens": 300, "tokens_per_second": None, "seconds": 0.0001}


def run_of(folder: Path, *entries: dict[str, Any]) -> RunDirectory:
    lines = [json.dumps({"step": step, **entry}) for step, entry in enumerate(entries, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return RunDirectory(folder)


def test_a_step_that_is_passed_over_says_nothing_about_speed(tmp_path: Path) -> None:
    run = run_of(tmp_path, TRAINED, PASSED, PASSED)
    seen = _Metrics(run)
    assert seen.last() == {"step": 3, **PASSED}
    assert (seen.tokens_per_second(), seen.seconds_per_step()) == (100.0, 3.0)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(_status_table(run))
    assert "not trained at step 3\n" in "".join(f"{line.rstrip()}\n" for line in shown.get().splitlines())


def test_where_all_are_passed_over_no_speed_is_shown(tmp_path: Path) -> None:
    seen = _Metrics(run_of(tmp_path, PASSED))
    last = seen.last()
    assert (seen.tokens_per_second(), seen.seconds_per_step()) == (None, None)
    assert _measures(last, seen.tokens_per_second(), None) == "not trained"
