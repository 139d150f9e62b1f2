"""The writer of checkpoints: beside the steps, one at a time; what fails is told and passes, or ends the run, by its kind."""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mistral_dist import checkpoint, files
from mistral_dist.config import Checkpoint
from mistral_dist.ending import end, publish
from mistral_dist.errors import FINISHED, CheckpointError, MachineError, TrainingError
from mistral_dist.run import Lease, RunDirectory, holder
from mistral_dist.runtime import process
from mistral_dist.saver import Saver
from tests.launch import fill, small_disk
from tests.unit.test_checkpoint import NAME, snapshot
from tests.unit.test_run import foreign, steps_in


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def saver(run: RunDirectory, said: list[str]) -> Saver:
    return Saver(run, Checkpoint(), said.append)


def fails_with(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_checkpoint_is_written_beside_the_steps(run: RunDirectory, saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, main = threading.Event(), threading.current_thread()
    real, wrote = checkpoint.write_tensors, []

    def slowly(*words: Any) -> None:
        wrote.append(threading.current_thread())
        assert may_go_on.wait(30)
        real(*words)

    monkeypatch.setattr(checkpoint, "write_tensors", slowly)
    saver.start(snapshot(5), 0.25)
    assert saver.is_writing() and not saver.settle()
    assert saver.take_clocks() == {}
    run.append("metrics.jsonl", {"step": 6})  # the steps go on
    may_go_on.set()
    assert saver.newest() == 5
    assert not saver.is_writing()
    assert main not in wrote
    clocks = saver.take_clocks()["save"]
    assert (clocks["step"], clocks["gather_seconds"], clocks["waited_seconds"]) == (5, 0.25, 0.0)
    assert clocks["write_seconds"] > 0
    assert saver.take_clocks() == {}, "once"
    assert checkpoint.verify(run.checkpoints / "checkpoint-5") is None


def test_a_second_save_waits_for_the_first(run: RunDirectory, saver: Saver) -> None:
    saver.start(snapshot(5), 0.0)
    with pytest.raises(AssertionError, match="one save at a time"):
        saver.start(snapshot(10), 0.0)
    assert saver.newest() == 5
    saver.start(snapshot(10), 0.0)
    saver.finish()
    assert saver.step == 10
    assert saver.take_clocks()["save"]["step"] == 10


def test_the_steps_are_on_the_disk_before_the_checkpoint_says_so(run: RunDirectory, saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, publish = os.fsync, files.publish
    run.append("metrics.jsonl", {"step": 5})
    metrics = os.stat(run.path / "metrics.jsonl").st_ino
    monkeypatch.setattr(
        os, "fsync", lambda handle: (order.append("metrics" if os.fstat(handle).st_ino == metrics else "other"), fsync(handle))
    )
    monkeypatch.setattr(checkpoint, "publish", lambda *paths: (order.append("publish"), publish(*paths)))
    saver.start(snapshot(5), 0.0)
    saver.finish()
    assert order.count("publish") == order.count("metrics") == 1
    assert order.index("metrics") < order.index("publish")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("place", ["aside_of", "save_adapter", "write_tensors", "_write_json", "_manifest", "publish"])
def test_a_save_that_fails_is_told_once_and_passes(
    run: RunDirectory, saver: Saver, said: list[str], monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    saver.start(snapshot(5), 0.0)
    assert saver.newest() == 5
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, place, fails_with(number))
        saver.start(snapshot(10), 0.0)
        assert saver.newest() == 5
    (line,) = said
    needed = f"{snapshot(10).bytes:,}"
    for words in (str(run.path), "checkpoint-10", os.strerror(number), f"it needs {needed} bytes, ", " are free", "tried again"):
        assert words in line
    assert line.count("\n") == 0
    assert saver.trouble
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-5"], "nothing half written, the older one untouched"
    saver.start(snapshot(15), 0.0)
    assert saver.newest() == 15
    assert (saver.trouble, len(said)) == ("", 1)


def test_the_last_save_must_succeed(run: RunDirectory, saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write_tensors", fails_with(errno.ENOSPC))
    saver.start(snapshot(20), 0.0)
    with pytest.raises(MachineError) as caught:
        saver.finish()
    for words in (str(run.path), "checkpoint-20 could not be saved", "No space left", "bytes", "are free", "make room", "begins anew"):
        assert words in str(caught.value)
    saver.step = 15
    saver.start(snapshot(20), 0.0)
    with pytest.raises(MachineError, match="it goes on from checkpoint-15"):
        saver.finish()


def test_what_room_does_not_mend_has_another_remedy(run: RunDirectory, saver: Saver) -> None:
    with Lease(run) as lease:
        lease.renewed -= 2 * Lease.EXPIRES
        saver.start(snapshot(20), 0.0)
        with pytest.raises(
            MachineError, match=r"lease could not be renewed .*; see that its disk or file server answers and run"
        ) as caught:
            saver.finish()
    assert "make room" not in str(caught.value)


def test_how_a_run_ended_that_cannot_be_written_has_a_remedy(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(on_main=lambda action: action(), gather_adapter=dict)
    session: Any = SimpleNamespace(run=run, runtime=runtime, progress=SimpleNamespace(step=9), steps=9, saver=SimpleNamespace(step=9))
    for method, number in (("check_publishing", errno.ETIMEDOUT), ("sync", errno.ENOSPC), ("set_status", errno.EROFS)):
        with monkeypatch.context() as patch:
            patch.setattr(run, method, fails_with(number))
            with pytest.raises(MachineError, match=rf"{os.strerror(number)} .*and run the same command again: nothing is trained anew"):
                publish(session, None) if method == "check_publishing" else end(session, FINISHED)


def test_steps_that_cannot_be_written_down_are_in_no_checkpoint(run: RunDirectory, saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails_with(errno.ENOSPC))
        run.append("metrics.jsonl", {"step": 5})
        saver.start(snapshot(5), 0.0)
        assert saver.newest() == 0
    assert "No space left" in saver.trouble
    assert not run.checkpoints.exists()
    saver.start(snapshot(6), 0.0)
    assert saver.newest() == 6
    assert steps_in(run.path / "metrics.jsonl") == [5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_ends_the_run(run: RunDirectory, saver: Saver, value: float) -> None:
    saver.start(snapshot(5), 0.0)
    assert saver.newest() == 5
    saver.start(snapshot(10, {NAME: torch.full((2, 3), value)}), 0.0)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-10 was not saved: the adapter holds values that are not finite, first in .*lora_A"
    ):
        saver.newest()
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-5"]


def test_what_nobody_expected_ends_the_run(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_manifest", lambda _: 1 / 0)
    saver.start(snapshot(5), 0.0)
    with pytest.raises(TrainingError, match="ZeroDivisionError"):
        saver.newest()


def test_a_writer_that_may_not_give_way_writes_all_the_same(saver: Saver, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "give_way", fails_with(errno.EACCES))
    saver.start(snapshot(5), 0.0)
    assert saver.newest() == 5
    assert said == []


def test_a_run_that_was_taken_over_is_left_alone(run: RunDirectory, saver: Saver) -> None:
    with Lease(run):
        saver.start(snapshot(5), 0.0)
        assert saver.newest() == 5
        foreign(run, 0)
        saver.start(snapshot(10), 0.0)
        with pytest.raises(TrainingError, match="another process has taken this run over"):
            saver.newest()
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-5"]


def test_a_lease_that_has_expired_lets_nothing_be_published(run: RunDirectory, saver: Saver) -> None:
    with Lease(run) as lease:
        lease.renewed -= 2 * Lease.EXPIRES
        saver.start(snapshot(5), 0.0)
        assert saver.newest() == 0
        assert "the lease could not be renewed" in saver.trouble
        run.append("metrics.jsonl", {"step": 6})
        assert not (run.path / "metrics.jsonl").exists()
        with pytest.raises(OSError, match="lease"):
            run.set_status("running", None, "training")
        lease.renewed = time.monotonic()
        saver.start(snapshot(10), 0.0)
        assert saver.newest() == 10
    assert steps_in(run.path / "metrics.jsonl") == [6]


def test_the_lease_is_kept_until_the_writer_has_ended(run: RunDirectory, saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `open_run` does: whatever ends the training, what is being written is finished first."""
    held: list[str | None] = []
    publish = files.publish
    monkeypatch.setattr(checkpoint, "publish", lambda *paths: (held.append(holder(run.path)), publish(*paths)))
    with ExitStack() as stack:
        stack.enter_context(Lease(run))
        stack.enter_context(run.closing)
        saver.start(snapshot(5), 0.0)
    assert held == [f"process {os.getpid()} on this machine"]
    assert checkpoint.verify(run.checkpoints / "checkpoint-5") is None
    assert holder(run.path) is None


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as path:
        yield path


def test_a_folder_that_has_become_read_only_passes(disk: Path, said: list[str]) -> None:
    run = RunDirectory(disk / "run")
    saver = Saver(run, Checkpoint(), said.append)
    with Lease(run) as lease:
        saver.start(snapshot(5), 0.0)
        assert saver.newest() == 5
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        run.append("metrics.jsonl", {"step": 6})
        saver.start(snapshot(10), 0.0)
        assert saver.newest() == 5
        assert "Read-only file system" in said[0]
        assert not lease.lost
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        saver.start(snapshot(15), 0.0)
        assert saver.newest() == 15
    assert steps_in(run.path / "metrics.jsonl") == [6]


def test_tensors_that_do_not_fit_are_an_error_of_the_disk(disk: Path) -> None:
    """The library that writes them has errors of its own."""
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.write_tensors(disk / "optimizer.safetensors", {"a": torch.zeros(1 << 20)})
    assert caught.value.errno == errno.ENOSPC


def test_status_and_lease_are_renewed_on_a_full_disk(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(disk / "run")
    run.path.mkdir()
    run.set_status("running", None, "training", step=3, steps=9, checkpoint="checkpoint-2")
    monkeypatch.setattr(Lease, "RENEW", 0.02)
    monkeypatch.setattr(Lease, "EXPIRES", 0.5)
    with Lease(run) as lease:
        fill(disk)
        first = files.read_json(run.path / "lease.json")
        run.set_status("failed", 2, "the disk is full, " * 20)
        status = run.status()
        assert status is not None
        assert (status["state"], status["step"], status["message"]) == ("failed", 3, "the disk is full, " * 20)
        assert first is not None
        waited = threading.Event()
        for _ in range(100):
            waited.wait(0.02)
            assert not lease.lost and not lease.expired
        assert (files.read_json(run.path / "lease.json") or {})["renewed"] > first["renewed"]
        run.set_status("running", None, "short")
        assert (run.status() or {})["message"] == "short"


@pytest.mark.parametrize("in_haste", [False, True])
def test_a_writer_gives_way_to_steps(saver: Saver, in_haste: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no steps go on it has its turn like all else; it never changes how many threads PyTorch computes with."""
    real, seen = checkpoint.write_tensors, []

    def looked_at(*words: Any) -> None:
        seen.append(os.sched_getscheduler(threading.get_native_id()))
        real(*words)

    monkeypatch.setattr(checkpoint, "write_tensors", looked_at)
    monkeypatch.setattr(torch, "set_num_threads", None)
    saver.start(snapshot(5), 0.0, in_haste=in_haste)
    saver.finish()
    assert set(seen) == {os.SCHED_OTHER if in_haste else os.SCHED_IDLE}
