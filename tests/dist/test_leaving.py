"""Leaving together: on request, in time, because a rank is hung, differs or has no memory; nothing is lost, nobody is left."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from mistral_dist.base_cache import fingerprint
from mistral_dist.config import Recipe
from tests import faults
from tests.conftest import WriteRecipe
from tests.dist.test_resume import assert_nobody_left, assert_same_run
from tests.launch import (
    COMMAND,
    ROOT,
    STAGES,
    kill,
    losses_so_far,
    metrics,
    mistral_dist,
    resume,
    status,
    train,
    training,
    wait_for,
    workers,
)

LAST, MICRO_STEPS = 20, 4
"""Steps of the run, and forwards of each rank in one of them."""


@pytest.fixture(scope="module")
def recipe(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps of 4 micro-steps on two ranks, in bfloat16, a checkpoint every fifth, prepared."""
    write = recipe_writer(tmp_path_factory.mktemp("leaving"))
    recipe = write(model={"dtype": "bfloat16"}, train={"epochs": 4, "steps": LAST, "global_batch_size": 2 * MICRO_STEPS})
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


@pytest.fixture(scope="module")
def never_stopped(recipe: Path) -> Callable[[int], Path]:
    """By ZeRO stage: the run that nothing happens to, made when it is first asked for."""
    return cache(lambda zero: train(recipe, recipe.parent / f"never-stopped-{zero}", zero=zero))


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


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.fault(
    "SIGTERM, SIGINT or SIGUSR1, twice, to the launcher or one worker", "all save the same step and stop, exit code 85; the same bits"
)
def test_stop_signals_save_and_the_next_launch_goes_on(
    zero: int, recipe: Path, never_stopped: Callable[[int], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for until, number in ((2, signal.SIGTERM), (7, signal.SIGINT), (12, signal.SIGUSR1)):
        with training(recipe, run, until=until, zero=zero) as started:
            os.kill(started.pid, number)
            os.kill(started.pid, number)
            assert started.wait(120) == 85
        assert_stopped(run, f"on request ({number.name})")

    # to one worker alone: all stop at the same step; and to each while it saves, or waits for the one that does
    with training(recipe, run, until=16, zero=zero, **faults.environment(slow_save=3)) as started:
        first, second = workers_of(started.pid)
        said = (run / "log.txt").read_text().count("stopping")
        second.send_signal(signal.SIGUSR1)
        wait_for(lambda: (run / "log.txt").read_text().count("stopping") > said, started)
        for worker in (second, first):
            worker.send_signal(signal.SIGTERM)
        assert status(run)["state"] == "running"
        assert started.wait(120) == 85
    assert_stopped(run, "on request (SIGUSR1)")

    resume(recipe, run, zero=zero)
    assert_same_run(run, never_stopped(zero))


@pytest.mark.matrix
@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.fault(
    "a stop signal to one worker after the first step, in the middle of one, at an epoch's end, in the last forward of all",
    "the step is left, none is lost; the next launch does it again, to the same bits of adapter, optimizer, metrics, data order",
)
def test_stopped_at_any_place_of_its_steps_a_run_goes_on_to_the_same_bits(
    zero: int, recipe: Path, never_stopped: Callable[[int], Path], tmp_path: Path
) -> None:
    wanted, run = never_stopped(zero), tmp_path / "run"
    turn = next(entry["step"] for entry in metrics(wanted) if entry["epoch"] >= 1)
    assert 2 < turn < LAST - 1, "the epoch ends in this step"
    words = ("train", recipe, f"run.dir={run}", "--processes", "2", "--zero", str(zero))
    # (rank, step, micro-step) of the forward that it comes in: the step is given up after the backward
    for rank, step, micro in ((1, 2, 1), (0, turn, 2), (1, turn + 1, 1)):
        done = mistral_dist(*words, **faults.environment(stop_in_forward=[rank, step, micro]))
        assert done.returncode == 85, done.stdout + done.stderr
        assert_stopped(run, f"on request (SIGTERM) at step {step - 1} of {LAST}")
        assert f"left off at step {step}, micro-step {micro}" in (run / "log.txt").read_text()
    done = mistral_dist(*words, **faults.environment(stop_in_forward=[0, LAST, MICRO_STEPS]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"going on from checkpoint-(\d+)", (run / "log.txt").read_text()) == ["1", str(turn - 1), str(turn)]
    assert_same_run(run, wanted)


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


ASKED_AT_TORCH = """
import os, signal, sys

class Asked:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            print("asked", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Asked())
"""
"""Python reads it before the program: a process that sends itself the signal at its `import torch`."""


@pytest.mark.fault("a stop signal while a worker still imports its libraries", "stopped, exit code 85", zero=(0,))
def test_asked_before_torch_is_imported_a_worker_stops_and_says_so(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(ASKED_AT_TORCH)
    words = [sys.executable, "-m", "mistral_dist.train", str(recipe), f"run.dir={run}"]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert "asked" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 85, done.stdout + done.stderr
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
    limit = 100
    began = datetime.now(UTC)
    done = mistral_dist(
        "train", recipe, f"run.dir={run}", "train.epochs=1000", "train.steps=20000", f"train.max_seconds={limit}", "--processes=2"
    )
    assert done.returncode == 85, done.stdout + done.stderr
    saved = (datetime.fromisoformat(status(run)["updated"]) - began).total_seconds()
    print(f"train.max_seconds={limit}: saved after {saved:.0f} s, at step {status(run)['step']}")
    assert status(run)["step"] > 0
    # what it keeps for the last save is a guess, from the longest so far
    assert limit / 2 < saved < limit * 1.2
    assert_stopped(run, "by train.max_seconds")


@pytest.mark.parametrize(("processes", "zero"), [(1, 0), pytest.param(2, 2, marks=pytest.mark.matrix)])
@pytest.mark.fault("a stop signal to every process of a run at once, as schedulers send it", "saved and stopped, exit code 85")
def test_a_scheduler_signals_every_process(processes: int, zero: int, recipe: Path, tmp_path: Path) -> None:
    """The agent between launcher and workers would die of it, or kill them after 30 seconds."""
    run = tmp_path / "run"
    for number, until in ((signal.SIGTERM, 2), (signal.SIGUSR1, 7)):
        with training(recipe, run, until=until, processes=processes, zero=zero) as started:
            everyone = [started.pid, *(child.pid for child in psutil.Process(started.pid).children(recursive=True))]
            assert len(everyone) == 2 + processes
            for pid in everyone:
                kill(pid, number)
            assert started.wait(120) == 85
        assert_stopped(run, f"on request ({number.name})")
        assert status(run)["step"] >= until


# because of one of them


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.fault("a rank that hangs (SIGSTOP)", "named, stacks kept, all end within a minute; the same bits")
def test_a_hung_rank_is_named_and_killed(zero: int, recipe: Path, never_stopped: Callable[[int], Path], tmp_path: Path) -> None:
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
    assert_same_run(run, never_stopped(zero))
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def site(folder: Path, code: str) -> str:
    """A PYTHONPATH with which Python runs some code at its start, on rank 1 alone."""
    folder.mkdir()
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    (folder / "sitecustomize.py").write_text(f"import os, sys\nif os.environ.get('RANK') == '1':\n{body}")
    return os.pathsep.join([str(folder), str(ROOT)])


@pytest.mark.fault(
    "a rank with other code, another recipe or another version of a library", "refused at the start, with both values", zero=(0,)
)
def test_a_rank_with_other_code_recipe_and_version_is_refused(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "mistral_dist", other / "mistral_dist", ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "mistral_dist" / "loss.py", "a", encoding="utf-8") as stream:
        stream.write("\n# one machine was not updated\n")
    # which Python finds before the one that is installed
    (other / "datasets-0.1.dist-info").mkdir()
    (other / "datasets-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 0.1\n")
    path = site(tmp_path / "site", f"sys.path.insert(0, {str(other)!r})\nsys.argv.append('train.seed=7')")
    run = tmp_path / "run"
    # not in the clone, whose package would be found before any other
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    words = ("train", recipe, f"run.dir={run}", "--processes", "2", "--zero", "0")
    done = mistral_dist(*words, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 2, done.stdout + done.stderr
    message = status(run)["message"]
    found = re.search(
        r"rank 1 on \S+: datasets is 0\.1 \(on rank 0: ([\d.]+)\), "
        r"the code of mistral-dist is (\w{16}) \(on rank 0: (\w{16})\), train\.seed is 7 \(on rank 0: 0\)",
        message,
    )
    assert found is not None and found[1] == version("datasets") and found[2] != found[3], message
    assert message in " ".join((done.stdout + done.stderr).split())
    assert not (run / "metrics.jsonl").exists()
    assert_nobody_left(run)


@pytest.mark.matrix
@pytest.mark.fault("a machine with other data and another base", "refused at the start, with both fingerprints", zero=(0,))
def test_a_machine_with_other_data_and_another_base_is_refused(write_recipe: WriteRecipe, small_model: Path, tmp_path: Path) -> None:
    """One example more, and one bit of the weights; in folders of its own. Each of two nodes is a launcher here."""
    recipe = write_recipe(train={"steps": 3})
    data = [Recipe.load(recipe).data_dir, tmp_path / "data" / "other"]
    assert mistral_dist("prepare", recipe).returncode == 0
    rows = (tmp_path / "small.jsonl").read_text()
    (tmp_path / "small.jsonl").write_text(rows + json.dumps({"text": "Entry 300: one more.", "label": "numpy"}) + "\n")
    assert mistral_dist("prepare", recipe, f"data.dir={data[1]}").returncode == 0
    (tmp_path / "small.jsonl").write_text(rows)
    base = shutil.copytree(small_model, tmp_path / "base")
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))

    path = site(tmp_path / "site", f"sys.argv += ['data.dir={data[1]}', 'model.path={base}']")
    run = tmp_path / "run"
    words = ["train", str(recipe), f"run.dir={run}", "--processes", "1", "--zero", "0"]
    words += ["--nodes", "2", "--main-address", f"127.0.0.1:{free_port()}", "--node-rank"]
    other = subprocess.Popen(
        [*COMMAND, *words, "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        done = mistral_dist(*words, "0", MISTRAL_DIST_JOIN_SECONDS="120")
        assert other.wait(120) == done.returncode == 2, done.stdout + done.stderr
    finally:
        kill(other.pid)
        other.communicate()
    message = status(run)["message"]
    for folder in data:
        assert json.loads((folder / "manifest.json").read_text())["fingerprint"] in message
    found = re.search(r"rank 1 on \S+: .*the base test/small is (\w{16}) \(on rank 0: (\w{16})\)", message)
    assert found is not None, message
    assert found[1] != found[2] == fingerprint(Recipe.load(recipe).model)
    assert message in " ".join((done.stdout + done.stderr).split())
    assert not (run / "metrics.jsonl").exists()
    assert_nobody_left(run)


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.fault("a rank without memory (RLIMIT_AS)", "told with a remedy; the same bits after")
def test_a_rank_without_memory_says_so_and_the_next_launch_goes_on(
    zero: int, recipe: Path, never_stopped: Callable[[int], Path], tmp_path: Path
) -> None:
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
    done = mistral_dist("train", recipe, f"run.dir={run}", "--processes", "2", "--zero", str(zero), PYTHONPATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert_nobody_left(run)
    message = status(run)["message"]
    print(message)
    # by itself, with rank and phase; where there was no memory to say so in, its launcher does, from its last words or its signal
    by_itself = r"^rank 1 on \S+ ran out of memory in step \d+.*(forward|backward|update).*: [\d.]+ GiB.*Go on with train\."
    by_its_launcher = r"^(memory was refused to a worker|rank 1 \(process \d+\) (crashed|was killed)).*"
    assert re.search(by_itself, message) or re.search(by_its_launcher, message), message
    resume(recipe, run, zero=zero)
    assert_same_run(run, never_stopped(zero))


# because one never comes


def is_listening(port: int) -> bool:
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in psutil.net_connections("tcp"))


@pytest.mark.fault("a stop signal while machines wait for each other", "stopped at once, exit code 85", zero=(2,))
def test_asked_before_the_others_have_come_a_node_leaves_at_once(recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = tmp_path / "run"
    words = [*COMMAND, "train", str(recipe), f"run.dir={run}", "--nodes=2", "--node-rank=0", f"--main-address=127.0.0.1:{port}"]
    started = subprocess.Popen([*words, "--processes=1"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: is_listening(port), started)  # the agent, which waits for the other
        time.sleep(1)
        started.send_signal(signal.SIGINT)
        assert started.wait(30) == 85
    finally:
        kill(started.pid)
        told = started.communicate()[0]
    assert "stopped before its workers had begun" in told
    assert_nobody_left(run)


@pytest.mark.fault("a machine that does not come, an address where nobody answers", "told in bounded time", zero=(0,))
@pytest.mark.parametrize(
    ("rank", "words"),
    [(0, "only 1 of 2 nodes came within"), (1, "nobody answers at 127.0.0.1, port ")],
    ids=["a node is missing", "stale port"],
)
def test_a_machine_that_does_not_come_is_told_in_bounded_time(rank: int, words: str, recipe: Path, tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "two_machines.yaml"
    settings = f"num_machines: 2\nnum_processes: 2\nmachine_rank: {rank}\nmain_process_ip: 127.0.0.1\nmain_process_port: {port}\n"
    config.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nsame_network: true\nuse_cpu: false\n{settings}")
    run = tmp_path / "run"
    command = ("train", recipe, f"run.dir={run}", "--config-file", config)
    done = mistral_dist(*command, MISTRAL_DIST_JOIN_SECONDS="8")
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in status(run)["message"]
    assert not workers(run)


@pytest.mark.fault("nodes that were told different numbers of nodes", "told in bounded time, before a model is loaded", zero=(0,))
@pytest.mark.parametrize(
    ("counts", "code", "words"),
    [((2, 3), 2, r"rank 1 on \S+: --nodes is 3 \(on rank 0: 2\)"), ((3, 2), 1, r"only 2 of 3 nodes came within \d+ s")],
)
def test_nodes_that_count_each_other_differently(counts: tuple[int, int], code: int, words: str, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", recipe, f"run.dir={run}", "--processes", "1", "--zero", "0", "--main-address", f"127.0.0.1:{free_port()}"]
    with ThreadPoolExecutor(2) as both:
        nodes = [
            both.submit(mistral_dist, *command, "--nodes", str(count), "--node-rank", str(rank), MISTRAL_DIST_JOIN_SECONDS="15")
            for rank, count in enumerate(counts)
        ]
        ended = [node.result() for node in nodes]
    for done in ended:
        assert done.returncode == code, done.stdout + done.stderr
        assert re.search(words, " ".join((done.stdout + done.stderr).split())), done.stdout + done.stderr
    assert re.search(words, status(run)["message"])
    assert "loading the model" not in (run / "log.txt").read_text()
    assert_nobody_left(run)


@pytest.mark.fault("the port where the nodes meet is in use", "told at once, with the port", zero=(0,))
def test_a_port_that_is_in_use_is_told_at_once(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", recipe, f"run.dir={run}", "--processes", "1", "--zero", "0", "--nodes", "2", "--node-rank", "0"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        began = time.monotonic()
        done = mistral_dist(*words, "--main-address", f"127.0.0.1:{port}", MISTRAL_DIST_JOIN_SECONDS="100")
        seconds = time.monotonic() - began
    print(f"port in use: told after {seconds:.0f} s")
    assert done.returncode == 1, done.stdout + done.stderr
    assert seconds < 100, "it waits for nobody"
    told = (
        f"port {port} is in use on this machine; name another one on all nodes: --main-address HOST:PORT (in a SLURM job: submit it again)"
    )
    assert told in status(run)["message"]
    assert told in " ".join((done.stdout + done.stderr).split())
    assert "\n" not in status(run)["message"]
    assert not workers(run)
