"""Leaving together: on request, in time, because a rank is hung, differs or has no memory; nothing is lost, nobody is left."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from mistral_dist.runtime.process import catches
from tests import faults
from tests.conftest import WriteRecipe
from tests.dist.test_resume import assert_nobody_left, assert_same_run
from tests.launch import COMMAND, ROOT, kill, losses_so_far, mistral_dist, resume, status, train, training, wait_for, workers


@pytest.fixture(scope="module")
def recipe(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps of 4 micro-steps on two ranks, in bfloat16, a checkpoint every fifth, prepared."""
    write = recipe_writer(tmp_path_factory.mktemp("leaving"))
    recipe = write(model={"dtype": "bfloat16"}, train={"epochs": 4, "steps": 20, "global_batch_size": 8})
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


@pytest.fixture(scope="module")
def never_stopped(recipe: Path) -> Path:
    return train(recipe, recipe.parent / "never-stopped")


def workers_of(launcher: int) -> list[psutil.Process]:
    """The ranks below a launcher, in order."""
    return sorted(psutil.Process(launcher).children()[0].children(), key=lambda process: int(process.environ()["RANK"]))


def assert_stopped(run: Path, asked: str) -> None:
    assert_nobody_left(run)
    stopped = status(run)
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 85)
    assert stopped["message"].startswith(f"stopped {asked}")
    assert stopped["checkpoint"] == (f"checkpoint-{stopped['step']}" if stopped["step"] else None)


# on request


@pytest.mark.fault(
    "SIGTERM, SIGINT or SIGUSR1, twice, to the launcher or one worker",
    "all save the same step and stop, exit code 85; the same bits",
    zero=(2,),
)
def test_stop_signals_save_and_the_next_launch_goes_on(recipe: Path, never_stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for until, number in ((2, signal.SIGTERM), (7, signal.SIGINT), (12, signal.SIGUSR1)):
        with training(recipe, run, until=until) as started:
            os.kill(started.pid, number)
            os.kill(started.pid, number)
            assert started.wait(120) == 85
        assert_stopped(run, f"on request ({number.name})")

    # to one worker alone: all stop at the same step; and to the other, while it saves
    with training(recipe, run, until=16) as started:
        first, second = workers_of(started.pid)
        said = (run / "log.txt").read_text().count("stopping")
        second.send_signal(signal.SIGUSR1)
        wait_for(lambda: (run / "log.txt").read_text().count("stopping") > said, started)
        with suppress(psutil.NoSuchProcess):
            first.send_signal(signal.SIGTERM)
        assert started.wait(120) == 85
    assert_stopped(run, "on request (SIGUSR1)")

    resume(recipe, run)
    assert_same_run(run, never_stopped)


@pytest.mark.parametrize("zero", [pytest.param(zero, marks=pytest.mark.matrix) if zero != 2 else zero for zero in (0, 1, 2, 3)])
@pytest.mark.fault("a stop signal in the middle of a step", "all leave within a micro-step; the step is done again, to the same bits")
def test_a_step_that_is_left_in_the_middle_is_done_again(zero: int, recipe: Path, tmp_path: Path) -> None:
    """Steps of 40 micro-steps, left at one of them; resumed, the run is the same to the bit."""
    long_steps = ("train.global_batch_size=80", "train.epochs=30", "train.steps=3", "checkpoint.save_steps=3")
    wanted = train(recipe, tmp_path / "wanted", *long_steps, zero=zero)
    run = tmp_path / "run"
    with training(recipe, run, *long_steps, until=1, zero=zero) as started:
        workers_of(started.pid)[1].send_signal(signal.SIGTERM)
        assert started.wait(120) == 85
    assert_stopped(run, "on request (SIGTERM) at step 1 of 3")
    left = re.search(r"left off at step 2, micro-step (\d+)", (run / "log.txt").read_text())
    assert left is not None and 1 <= int(left[1]) < 40
    print(f"ZeRO {zero}: left after micro-step {left[1]} of 40")
    resume(recipe, run, *long_steps, zero=zero)
    for file in ("adapter/adapter_model.safetensors", "checkpoints/checkpoint-3/optimizer.safetensors", "data_order.jsonl"):
        assert (run / file).read_bytes() == (wanted / file).read_bytes(), file


@pytest.mark.fault("a stop signal while the model is loaded", "stopped with the checkpoint that there was", zero=(2,))
def test_asked_while_loading_they_leave_with_what_there_was(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(train(recipe, tmp_path / "short", "train.steps=5"), run)
    (run / "status.json").write_text('{"state": "running", "exit_code": null, "message": "", "checkpoint": "checkpoint-5", "step": 5}')
    before = {file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()}
    words = [*COMMAND, "train", str(recipe), f"run.dir={run}", "train.steps=5", "--processes", "2"]
    started = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: (run / "lease.json").is_file(), started)
        workers_of(started.pid)[0].send_signal(signal.SIGINT)
        assert started.wait(120) == 85, started.communicate()[0]
    finally:
        kill(started.pid)
        started.communicate()
    assert_stopped(run, "on request (SIGINT) while loading")
    assert {file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()} == before


@pytest.mark.fault("a stop signal while a worker still imports its libraries", "stopped, exit code 85", zero=(0,))
def test_asked_before_torch_is_imported_a_worker_stops_and_says_so(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-m", "mistral_dist.train", str(recipe), f"run.dir={run}"]
    started = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: catches(started.pid, signal.SIGTERM), started)
        assert "libtorch" not in Path(f"/proc/{started.pid}/maps").read_text(), "the signal would come too late to show anything"
        started.send_signal(signal.SIGTERM)
        assert started.wait(120) == 85, started.communicate()[0]
    finally:
        kill(started.pid)
        started.communicate()
    assert_stopped(run, "on request (SIGTERM) while loading")


@pytest.mark.matrix
@pytest.mark.fault("SIGUSR1 to a bare `accelerate launch` with PET_SIGNALS_TO_HANDLE", "passed on: saved and stopped", zero=(2,))
def test_a_bare_launcher_that_is_told_to_passes_a_signal_on(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "configs/accelerate/multi_gpu.yaml"]
    words += ["--main_process_port", "0", "-m", "mistral_dist.train", str(recipe), f"run.dir={run}"]
    handled = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "180"}
    started = subprocess.Popen(words, cwd=ROOT, env={**os.environ, **handled}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (run / "metrics.jsonl").is_file() and len(losses_so_far(run)) >= 2)
        started.send_signal(signal.SIGUSR1)
        assert started.wait(240) != 0
    finally:
        for pid in (started.pid, *(worker.pid for worker in workers(run))):
            kill(pid)
        started.wait()
    assert_stopped(run, "on request (SIGUSR1)")


@pytest.mark.matrix
@pytest.mark.fault("train.max_seconds", "saved and stopped in time, exit code 85", zero=(2,))
def test_in_time_they_save_and_leave(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    began = time.monotonic()
    done = mistral_dist(
        "train", recipe, f"run.dir={run}", "train.epochs=1000", "train.steps=20000", "train.max_seconds=100", "--processes=2"
    )
    seconds = time.monotonic() - began
    assert done.returncode == 85, done.stdout + done.stderr
    print(f"train.max_seconds=100: ended after {seconds:.0f} s, at step {status(run)['step']}")
    assert_stopped(run, "by train.max_seconds")


# because of one of them


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.matrix)])
@pytest.mark.fault("a rank that hangs (SIGSTOP)", "named, stacks kept, all end within a minute; the same bits")
def test_a_hung_rank_is_named_and_killed(zero: int, recipe: Path, never_stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for until, rank in ((7, 1), (12, 0)):
        with training(recipe, run, "train.stall_seconds=8", until=until, zero=zero) as started:
            pid = workers_of(started.pid)[rank].pid
            stopped = time.monotonic()
            kill(pid, signal.SIGSTOP)
            assert started.wait(60) == 1
            print(f"rank {rank} was stopped, all had ended {time.monotonic() - stopped:.0f} s later")
            assert_nobody_left(run)
        ended = status(run)
        assert (ended["state"], ended["exit_code"]) == ("failed", 1)
        assert f"rank {rank} (process {pid} on {socket.gethostname()})" in ended["message"]
        assert re.search(r"no sign of life for \d+ s; last seen at step \d+", ended["message"])
        assert "Thread" in (run / "stacks" / f"rank-{1 - rank}.txt").read_text()
    # with the same short limit, and nobody hung
    resume(recipe, run, "train.stall_seconds=8", zero=zero)
    assert_same_run(run, never_stopped if zero == 2 else train(recipe, tmp_path / "never-stopped", zero=zero))
    assert not (run / "stacks" / "rank-0.txt").exists()


@pytest.mark.matrix
@pytest.mark.fault("a rank that is slow", "named in the log, with process and machine; the run goes on", zero=(2,))
def test_a_slow_rank_is_named_and_ranks_that_keep_pace_are_not(recipe: Path, tmp_path: Path) -> None:
    """Forwards that sleep: on both ranks for as long, and on one for six times as long. What else runs here counts for little then."""
    said = {}
    for name, seconds in {"even": {"0": 0.4, "1": 0.4}, "one is slow": {"0": 0.1, "1": 0.6}}.items():
        run = tmp_path / name.replace(" ", "-")
        train(recipe, run, "train.steps=7", "train.stall_seconds=20", **faults.environment(slow=seconds))
        said[name] = re.findall(
            r"note: rank (\d) \(process \d+ on (\S+)\) is slow: a forward takes ([\d.]+) times", (run / "log.txt").read_text()
        )
    assert said["even"] == []
    ((rank, host, times),) = said["one is slow"]
    print(f"rank {rank} was {times} times slower")
    assert (rank, host) == ("1", socket.gethostname())
    assert 1.5 <= float(times) <= 6


def site(folder: Path, code: str) -> str:
    """A PYTHONPATH with which Python runs some code at its start, on rank 1 alone."""
    folder.mkdir()
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    (folder / "sitecustomize.py").write_text(f"import os, sys\nif os.environ.get('RANK') == '1':\n{body}")
    return os.pathsep.join([str(folder), str(ROOT)])


@pytest.mark.fault("a rank with other code or another recipe", "refused at the start, with both values", zero=(0,))
def test_a_rank_with_other_code_and_another_recipe_is_refused(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "mistral_dist", other / "mistral_dist", ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "mistral_dist" / "loss.py", "a", encoding="utf-8") as stream:
        stream.write("\n# one machine was not updated\n")
    path = site(tmp_path / "site", f"sys.path.insert(0, {str(other)!r})\nsys.argv.append('train.seed=7')")
    run = tmp_path / "run"
    # not in the clone, whose package would be found before any other
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    words = ("train", recipe, f"run.dir={run}", "--processes", "2", "--zero", "0")
    done = mistral_dist(*words, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 2, done.stdout + done.stderr
    message = status(run)["message"]
    found = re.search(
        r"rank 1 on \S+: the code of mistral-dist is (\w{16}) \(on rank 0: (\w{16})\), train\.seed is 7 \(on rank 0: 0\)", message
    )
    assert found is not None and found[1] != found[2], message
    assert message in " ".join((done.stdout + done.stderr).split())
    assert not (run / "metrics.jsonl").exists()
    assert_nobody_left(run)


@pytest.mark.fault("a rank without memory", "told with a remedy; the same bits after", zero=(2,))
def test_a_rank_without_memory_says_so_and_the_next_launch_goes_on(recipe: Path, never_stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    starve = f"""
import threading
def starve():
    import pathlib, resource, time
    metrics = pathlib.Path({str(run / "metrics.jsonl")!r})
    while not (metrics.is_file() and metrics.read_text().count("\\n") >= 7):
        time.sleep(0.05)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, used))
threading.Thread(target=starve, daemon=True).start()
"""
    path = site(tmp_path / "site", starve)
    done = mistral_dist("train", recipe, f"run.dir={run}", "--processes", "2", PYTHONPATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert_nobody_left(run)
    message = status(run)["message"]
    print(message)
    assert "memory" in message
    assert "Go on with" in message or "it needs less memory" in message
    resume(recipe, run)
    assert_same_run(run, never_stopped)


# because one never comes


@pytest.mark.fault("a machine that does not come, an address where nobody answers", "told in bounded time", zero=(0,))
@pytest.mark.parametrize(
    ("rank", "words"),
    [(0, "only 1 of 2 nodes came within"), (1, "nobody answers at 127.0.0.1, port ")],
    ids=["a node is missing", "stale port"],
)
def test_a_machine_that_does_not_come_is_told_in_bounded_time(rank: int, words: str, recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "two_machines.yaml"
    settings = f"num_machines: 2\nnum_processes: 2\nmachine_rank: {rank}\nmain_process_ip: 127.0.0.1\nmain_process_port: {port}\n"
    config.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nsame_network: true\nuse_cpu: false\n{settings}")
    run = tmp_path / "run"
    command = ("train", recipe, f"run.dir={run}", "--config-file", config)
    done = mistral_dist(*command, MISTRAL_DIST_JOIN_SECONDS="8")
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in status(run)["message"]
    assert not workers(run)
