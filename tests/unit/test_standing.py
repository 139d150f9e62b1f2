"""How a run stands, for whoever asks or follows; also before there is anything to see."""

import json
import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from mistral_dist import standing
from mistral_dist.errors import RunError
from mistral_dist.run import STARTING, RunDirectory
from mistral_dist.runtime import slurm


def told(run: RunDirectory) -> str:
    console = Console(width=200)
    with console.capture() as shown:
        console.print(standing.standing(run))
    return " ".join(shown.get().split())


def age(run: RunDirectory, seconds: float) -> None:
    """The status is as old as this."""
    file = run.path / "status.json"
    updated = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="milliseconds")
    file.write_text(json.dumps({**json.loads(file.read_text()), "updated": updated}))


def test_where_there_is_no_run_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run there"):
        standing.standing(RunDirectory(tmp_path))


def test_while_workers_are_waited_for_the_run_is_starting_and_later_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    run.set_status("running", None, STARTING)
    assert f"state starting message its workers are not there yet (log: {tmp_path}/log.txt)" in told(run)
    age(run, standing.JOIN_SECONDS + standing.START_SECONDS + 1)
    monkeypatch.setenv("MISTRAL_DIST_JOIN_SECONDS", "1800")
    assert "state starting" in told(run), "nodes wait longer for each other where they are told to"
    monkeypatch.delenv("MISTRAL_DIST_JOIN_SECONDS")
    assert "state interrupted message ended without a word; run the same command to go on" in told(run)


def test_what_ended_a_run_before_its_workers_came_is_shown(tmp_path: Path) -> None:
    """There is no recipe.yaml then."""
    run = RunDirectory(tmp_path)
    run.set_status("failed", 1, "only 1 of 2 nodes came within 600 s")
    assert "state failed message only 1 of 2 nodes came within 600 s" in told(run)


def test_followed_before_it_has_begun_it_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)

    def begin_and_end() -> None:
        time.sleep(0.7)
        run.set_status("running", None, STARTING)
        time.sleep(0.7)
        run.set_status("failed", 2, "the data are others")

    thread = threading.Thread(target=begin_and_end)
    thread.start()
    began = time.monotonic()
    standing.follow_to_the_end(run)
    thread.join()
    assert time.monotonic() - began >= 1.4
    assert "nothing there yet; waiting for it to begin" in " ".join(capfd.readouterr().out.split())


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with what `squeue` prints, and does; tests/slurm has a real one."""
    answer = tmp_path / "answer"
    command = tmp_path / "bin" / "squeue"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n. {answer}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return answer


def test_a_scheduler_that_does_not_answer_is_no_reason_to_leave(tmp_path: Path, scheduler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "QUEUE_EVERY", 0.1)
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.set_status("stopped", 85, "stopped on request", job="17")
    scheduler.write_text("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert slurm.state("17") is None
    following = threading.Thread(target=standing.follow_to_the_end, args=[run])
    following.start()
    time.sleep(1)
    assert following.is_alive()
    scheduler.write_text("echo 'PENDING||BeginTime|'")
    assert slurm.state("17") == "PENDING (BeginTime)"
    time.sleep(1)
    assert following.is_alive()
    scheduler.write_text("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.state("17") == ""
    following.join(10)
    assert not following.is_alive()


def test_without_a_scheduler_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.state("17") == ""
