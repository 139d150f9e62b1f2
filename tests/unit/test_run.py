"""The run directory: one writer at a time, files that are whole, metrics that a kill does not spoil."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mistral_dist import run as module
from mistral_dist.config import Recipe
from mistral_dist.errors import RunError, TrainingError
from mistral_dist.run import Lease, RunDirectory, check_free, holder, move_aside, remove_lease, wait_until_free, write_text
from mistral_dist.runtime import process

ROOT = Path(__file__).parent.parent.parent
RECIPE = "version: 1\ntask: {kind: chat}\ndata: {sources: [{path: x.jsonl}]}\nmodel: {name: org/model}\n"
LIMIT = 30.0


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "r")


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return lambda *overrides: Recipe.load(path, overrides)


def until(condition: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < LIMIT, "waited too long"
        time.sleep(0.01)


# the recipe


def test_a_run_remembers_the_recipe_that_it_began_with(run: RunDirectory, recipe: Callable[..., Recipe]) -> None:
    run.begin(recipe("optim.learning_rate=1e-5"))
    assert run.recipe() == recipe("optim.learning_rate=1e-5")


def test_a_changed_recipe_is_refused_with_both_ways_out(run: RunDirectory, recipe: Callable[..., Recipe]) -> None:
    run.begin(recipe())
    with pytest.raises(RunError) as caught:
        run.begin(recipe("optim.learning_rate=1e-5"))
    for word in [str(run.path), "optim.learning_rate=0.0002", "1e-05", "run.dir=", "--fresh"]:
        assert word in str(caught.value)
    assert run.recipe() == recipe()


def test_the_number_of_further_changes_is_told(run: RunDirectory, recipe: Callable[..., Recipe]) -> None:
    run.begin(recipe())
    with pytest.raises(RunError, match=r"lora\.r=16.*now says 8 \(and 2 more\)"):
        run.begin(recipe("lora.r=8", "train.seed=1", "optim.weight_decay=0.1"))


def test_what_changes_no_promise_may_change_and_is_written_down(run: RunDirectory, recipe: Callable[..., Recipe]) -> None:
    run.begin(recipe())
    changed = recipe("train.micro_batch_size=4", "checkpoint.save_steps=7")
    run.begin(changed)
    assert run.recipe() == changed


def test_a_folder_without_a_run_names_the_command(run: RunDirectory) -> None:
    with pytest.raises(RunError, match=r"no run there .*mistral-dist train RECIPE"):
        run.recipe()


# the status


def test_there_is_no_status_before_the_first(run: RunDirectory) -> None:
    assert run.status() is None


def test_the_status_keeps_step_steps_and_checkpoint_unless_given(run: RunDirectory) -> None:
    run.set_status("running", None, "training", step=3, steps=9, checkpoint="checkpoint-2")
    run.set_status("running", None, "training", step=4)
    assert {key: run.status()[key] for key in ("step", "steps", "checkpoint")} == {  # type: ignore[index]
        "step": 4,
        "steps": 9,
        "checkpoint": "checkpoint-2",
    }
    run.set_status("failed", 1, "out of memory")
    status = run.status()
    assert status is not None
    assert status.pop("updated").endswith("+00:00")
    assert status == {"state": "failed", "exit_code": 1, "message": "out of memory", "step": 4, "steps": 9, "checkpoint": "checkpoint-2"}


# metrics and data order


def fill(run: RunDirectory, steps: int) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    for step in range(1, steps + 1):
        run.append("metrics.jsonl", {"step": step, "loss": 1 / step})
        run.append("data_order.jsonl", {"step": step, "ids": ["a" * 16] * 3})
    run.sync()


def steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_what_is_appended_can_be_read_at_once(run: RunDirectory) -> None:
    run.path.mkdir(parents=True)
    run.append("metrics.jsonl", {"step": 1})
    assert steps_in(run.path / "metrics.jsonl") == [1]
    run.sync()


def test_a_sync_ends_nothing(run: RunDirectory) -> None:
    fill(run, 2)
    run.append("metrics.jsonl", {"step": 3})
    run.sync()
    run.sync()
    assert steps_in(run.path / "metrics.jsonl") == [1, 2, 3]


def test_what_lies_after_a_step_is_cut_back(run: RunDirectory) -> None:
    fill(run, 9)
    for step in (2, 2, 5, 6, 6):
        run.append("quarantine.jsonl", {"step": step, "place": "a.jsonl:7", "reason": "not_json", "because": "..."})
    run.sync()
    run.cut_back(5)
    for name in ("metrics.jsonl", "data_order.jsonl"):
        assert steps_in(run.path / name) == [1, 2, 3, 4, 5]
    assert steps_in(run.path / "quarantine.jsonl") == [2, 2, 5]
    run.append("metrics.jsonl", {"step": 6})
    run.sync()
    assert steps_in(run.path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("half", ['{"step": 4, "lo', '{"step": 4', "{", '{"step": 4}'[:-1] + ', "ids": ["ab'])
def test_a_half_written_last_line_is_cut_back(run: RunDirectory, half: str) -> None:
    fill(run, 3)
    for name in ("metrics.jsonl", "data_order.jsonl"):
        with open(run.path / name, "a") as stream:
            stream.write(half)
    run.cut_back(8)
    for name in ("metrics.jsonl", "data_order.jsonl"):
        assert steps_in(run.path / name) == [1, 2, 3]
        assert (run.path / name).read_text().endswith("\n")


def test_to_cut_back_a_run_that_has_nothing_is_nothing(run: RunDirectory) -> None:
    run.cut_back(0)
    assert not run.path.exists()


def test_recent_metrics_are_the_last_oldest_first(run: RunDirectory) -> None:
    assert run.recent_metrics(3) == []
    fill(run, 5)
    assert [entry["step"] for entry in run.recent_metrics(3)] == [3, 4, 5]
    assert [entry["step"] for entry in run.recent_metrics(100)] == [1, 2, 3, 4, 5]


def test_recent_metrics_leave_out_a_half_written_line(run: RunDirectory) -> None:
    fill(run, 3)
    with open(run.path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')
    assert [entry["step"] for entry in run.recent_metrics(2)] == [2, 3]


def test_validations_stand_beside_the_steps(run: RunDirectory) -> None:
    assert run.last_validation() is None
    fill(run, 4)
    run.append("metrics.jsonl", {"step": 4, "eval": {"loss": 0.5, "best_step": 4}})
    run.append("metrics.jsonl", {"step": 5, "loss": 0.2})
    assert [entry["step"] for entry in run.recent_metrics(3)] == [3, 4, 5]
    assert all("loss" in entry for entry in run.recent_metrics(9))
    assert run.last_validation() == {"step": 4, "loss": 0.5, "best_step": 4}


def test_the_validation_of_the_step_is_cut_back_where_the_checkpoint_does_not_know_it(run: RunDirectory) -> None:
    fill(run, 4)
    run.append("metrics.jsonl", {"step": 4, "eval": {"loss": 0.5}})
    run.append("metrics.jsonl", {"step": 5, "loss": 0.2})
    run.cut_back(4.5)
    assert [("eval" in line, step) for line, step in with_text(run)] == [(False, 1), (False, 2), (False, 3), (False, 4), (True, 4)]
    run.cut_back(4)
    assert [("eval" in line, step) for line, step in with_text(run)] == [(False, 1), (False, 2), (False, 3), (False, 4)]
    assert steps_in(run.path / "data_order.jsonl") == [1, 2, 3, 4]


def with_text(run: RunDirectory) -> list[tuple[str, int]]:
    file = run.path / "metrics.jsonl"
    return list(zip(file.read_text().splitlines(), steps_in(file), strict=True))


def test_recent_metrics_of_a_long_run_read_its_end_only(run: RunDirectory) -> None:
    fill(run, 3000)
    with open(run.path / "metrics.jsonl", "r+b") as stream:
        stream.write(b"\xff\xff")  # were the beginning read, it would not be JSON
    assert [entry["step"] for entry in run.recent_metrics(2)] == [2999, 3000]


# files


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "new" / "f.txt"
    write_text(file, "one")
    with open(file) as reader:
        write_text(file, "two ü")
        assert reader.read() == "one"  # who had it open keeps the old content, whole
    assert file.read_text(encoding="utf-8") == "two ü"
    assert [path.name for path in file.parent.iterdir()] == ["f.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "f.txt"
    write_text(file, "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "two \ud800")
    assert file.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["f.txt"]


def test_a_run_is_moved_to_the_first_free_name(tmp_path: Path) -> None:
    path = tmp_path / "r"
    for n in (1, 2, 3):
        path.mkdir()
        (path / "mark").write_text(str(n))
        assert move_aside(path) == tmp_path / f"r.old-{n}"
    assert move_aside(path) is None
    assert [(tmp_path / f"r.old-{n}" / "mark").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]


def test_a_run_in_use_is_not_moved(run: RunDirectory) -> None:
    with Lease(run), pytest.raises(RunError, match="in use"):
        move_aside(run.path)
    assert run.path.is_dir()


# the lease


HOLD = """
import sys, time
from pathlib import Path
from mistral_dist.run import Lease, RunDirectory
with Lease(RunDirectory(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def another_process_holds(path: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLD, str(path)]
    other = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield other
    finally:
        other.kill()
        other.communicate()


def foreign(run: RunDirectory, seconds_ago: float) -> None:
    lease = {"host": "elsewhere", "process": "4711:1.00", "token": "t", "renewed": time.time() - seconds_ago}
    write_text(run.path / "lease.json", json.dumps(lease))


def test_a_lease_is_there_while_it_is_held_and_leaves_nothing(run: RunDirectory) -> None:
    with Lease(run):
        assert holder(run.path) == f"process {os.getpid()} on this machine"
        run.check_lease()
    assert holder(run.path) is None
    assert list(run.path.iterdir()) == []


def test_a_lease_ends_with_an_error_too(run: RunDirectory) -> None:
    with pytest.raises(KeyError), Lease(run):
        raise KeyError
    check_free(run.path)


def test_a_second_holder_is_refused_with_the_pid_of_the_first(run: RunDirectory) -> None:
    with another_process_holds(run.path) as other:
        with pytest.raises(RunError) as caught, Lease(run):
            pass
        for word in [str(run.path), f"process {other.pid} on this machine", "run.dir="]:
            assert word in str(caught.value)
        assert [path.name for path in run.path.iterdir()] == ["lease.json"]
        assert holder(run.path) == f"process {other.pid} on this machine"


def test_the_lease_of_a_killed_holder_is_taken_over(run: RunDirectory) -> None:
    with another_process_holds(run.path) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert (run.path / "lease.json").is_file()
        with Lease(run):
            assert holder(run.path) == f"process {os.getpid()} on this machine"
            assert [path.name for path in run.path.iterdir()] == ["lease.json"]


def test_another_process_with_the_same_pid_is_not_the_holder(run: RunDirectory) -> None:
    with Lease(run):
        lease = json.loads((run.path / "lease.json").read_text())
        assert holder(run.path) == f"process {os.getpid()} on this machine"
        pid, started, boot = lease["process"].split(":")
        write_text(run.path / "lease.json", json.dumps({**lease, "process": f"{pid}:{int(started) - 1}:{boot}"}))
        assert holder(run.path) is None


@pytest.mark.parametrize("ahead", [0.0, -300.0, 300.0], ids=["clocks agree", "ours is ahead", "ours is behind"])
def test_a_foreign_hosts_lease_is_respected_whatever_the_clocks_say(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """It is renewed by another clock than ours, which says that it expired long ago, or will be renewed in the future."""
    monkeypatch.setattr(Lease, "EXPIRES", 30.0)
    foreign(run, -ahead)
    renewing = threading.Timer(1.0, foreign, [run, -ahead - 1.0])
    renewing.start()
    said: list[str] = []
    with pytest.raises(RunError, match="in use by process 4711 on elsewhere; wait for it"):
        wait_until_free(run.path, said.append)
    renewing.join()
    assert (run.path / "lease.json").is_file()
    assert len(said) == 1
    assert "waiting for its next sign, 30 s at most" in said[0]


def test_a_foreign_hosts_lease_is_taken_over_when_it_is_not_renewed(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "EXPIRES", 1.0)
    foreign(run, 0.0)
    began = time.monotonic()
    with Lease(run):
        assert holder(run.path) == f"process {os.getpid()} on this machine"
    assert time.monotonic() - began >= 1.0, "it was given its time"


def test_a_foreign_hosts_lease_of_yesterday_is_nobodys(run: RunDirectory) -> None:
    foreign(run, 86400.0)
    wait_until_free(run.path, lambda line: pytest.fail(line))
    assert not (run.path / "lease.json").exists()


def test_a_lease_is_renewed(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "RENEW", 0.02)
    with Lease(run):
        first = json.loads((run.path / "lease.json").read_text())
        until(lambda: json.loads((run.path / "lease.json").read_text())["renewed"] > first["renewed"])
        assert json.loads((run.path / "lease.json").read_text())["token"] == first["token"]


def test_a_renewal_under_way_does_not_put_back_a_lease_that_was_given_back(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    is_renewing, ended, real = threading.Event(), threading.Event(), module.replace_text

    def slowly(file: Path, text: str) -> None:
        is_renewing.set()
        time.sleep(0.3)
        real(file, text)
        ended.set()

    monkeypatch.setattr(module, "replace_text", slowly)
    monkeypatch.setattr(Lease, "RENEW", 0.02)
    with Lease(run):
        assert is_renewing.wait(LIMIT)
    assert ended.wait(LIMIT)
    assert list(run.path.iterdir()) == []


def test_a_lease_that_could_not_be_read_for_a_moment_is_renewed_again(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "RENEW", 0.02)
    with Lease(run) as lease:
        content = (run.path / "lease.json").read_text()

        def is_damaged() -> bool:
            write_text(run.path / "lease.json", content[:20])
            time.sleep(0.1)  # a renewal under way may yet replace it
            return (run.path / "lease.json").read_text() == content[:20]

        until(is_damaged)
        with pytest.raises(OSError, match="the lease cannot be read"):
            run.check_publishing()
        write_text(run.path / "lease.json", content)
        before = lease.renewed
        until(lambda: lease.renewed > before)
    assert not lease.lost


@pytest.mark.parametrize("gone", [False, True])
def test_a_lost_lease_is_noticed_and_the_new_holders_is_left_alone(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, gone: bool) -> None:
    monkeypatch.setattr(Lease, "RENEW", 0.02)
    with Lease(run) as lease:
        foreign(run, 0)
        if gone:
            (run.path / "lease.json").unlink()
        until(lambda: lease.lost)
        with pytest.raises(TrainingError, match="another process has taken this run over"):
            run.check_lease()
    assert (run.path / "lease.json").exists() is not gone


def test_of_two_that_find_a_dead_holder_one_gets_the_lease(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has looked at the dead holder's file before the first replaced it, and removes it afterwards."""
    foreign(run, Lease.FAR + 1)
    first, second = Lease(RunDirectory(run.path)), Lease(run)

    def then_the_first_is_quicker(file: Path, token: str) -> None:
        monkeypatch.setattr(module, "remove_lease", remove_lease)
        first.__enter__()
        remove_lease(file, token)

    monkeypatch.setattr(module, "remove_lease", then_the_first_is_quicker)
    try:
        with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
            second.__enter__()
    finally:
        second.__exit__()
        first.__exit__()


def test_of_many_that_start_at_once_one_gets_the_lease(run: RunDirectory) -> None:
    """It keeps it until the others have been refused, however long they took to start."""
    foreign(run, Lease.FAR + 1)
    code = HOLD.replace("time.sleep(600)", "sys.stdin.read()").replace(
        "with Lease", "while time.time() < float(sys.argv[2]): pass\nwith Lease"
    )
    words = [sys.executable, "-c", code, str(run.path), str(time.time() + 2)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    many = [subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, **pipes) for _ in range(6)]
    end = time.monotonic() + LIMIT
    while sum(each.poll() is not None for each in many) < 5 and time.monotonic() < end:
        time.sleep(0.1)
    shown = [each.communicate(timeout=LIMIT) for each in many]
    assert sum(out == "held\n" for out, _ in shown) == 1, shown
    assert sum("in use by process" in err for _, err in shown) == 5, shown


def test_this_process_is_known_by_its_lease(run: RunDirectory) -> None:
    with Lease(run):
        assert json.loads((run.path / "lease.json").read_text())["process"] == process.identity()
