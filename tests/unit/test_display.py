"""What a person sees of a run, and that a run goes on where nobody sees it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mistral_dist.display import _measures, _Metrics, _News, _Outlasting, say
from mistral_dist.run import RunDirectory
from mistral_dist.standing import standing

TRAINED: dict[str, Any] = {"loss": 0.5, "tokens": 300, "tokens_per_second": 100.0, "seconds": 3.0}
PASSED: dict[str, Any] = {"loss": None, "tokens": 300, "tokens_per_second": None, "seconds": 0.0001}


def run_of(folder: Path, *entries: dict[str, Any]) -> RunDirectory:
    lines = [json.dumps({"step": step, **entry}) for step, entry in enumerate(entries, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return RunDirectory(folder)


def test_a_step_that_is_passed_over_says_nothing_about_speed(tmp_path: Path) -> None:
    run = run_of(tmp_path, TRAINED, PASSED, PASSED)
    run.set_status("running", None, "training")
    seen = _Metrics(run)
    assert seen.last() == {"step": 3, **PASSED}
    assert (seen.tokens_per_second(), seen.seconds_per_step()) == (100.0, 3.0)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(standing(run))
    assert "not trained at step 3\n" in "".join(f"{line.rstrip()}\n" for line in shown.get().splitlines())


def test_where_all_are_passed_over_no_speed_is_shown(tmp_path: Path) -> None:
    seen = _Metrics(run_of(tmp_path, PASSED))
    last = seen.last()
    assert (seen.tokens_per_second(), seen.seconds_per_step()) == (None, None)
    assert _measures(last, seen.tokens_per_second(), None) == "not trained"


def test_news_are_shown_once_and_whole(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("note: of the launch before\n")
    news = _News(log)
    assert news.lines() == []
    with open(log, "a", encoding="utf-8") as stream:
        stream.write(
            "checkpoint-15 is damaged (adapter is missing); passed over\ngoing on from checkpoint-10\nstep 11/20  loss 0.5\nnote: ra"
        )
        stream.flush()
        assert news.lines() == ["checkpoint-15 is damaged (adapter is missing); passed over", "going on from checkpoint-10"]
        stream.write("nk 1 is slow\nstep 12: because; back to checkpoint-10\n")
        stream.flush()
    assert news.lines() == ["note: rank 1 is slow", "step 12: because; back to checkpoint-10"]
    assert news.lines() == []


def test_what_is_said_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Also what the library would read as markup, or as the name of a picture."""
    say("models/[bold]a:x: d:bug:/rows.jsonl")
    assert capsys.readouterr().out == "models/[bold]a:x: d:bug:/rows.jsonl\n"


def test_a_terminal_that_closes_ends_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        screen = _Outlasting(stream)
        for _ in range(2):
            assert screen.write("step 1") == 6
            screen.flush()
        assert screen.isatty() is False
