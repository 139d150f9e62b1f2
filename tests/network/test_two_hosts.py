"""launch/multi_node.sh on two hosts that share nothing but a cable and a file system: the same bits as on one; and when the cable is cut.

Each host has one CPU process; ZeRO-2 shards over the two.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import faults
from tests.conftest import WriteRecipe
from tests.dist.test_resume import assert_nobody_left, assert_same_run
from tests.launch import LIMIT, ROOT, kill, lines, losses_so_far, mistral_dist, status, train, wait_for, workers
from tests.network.hosts import Cable, connected, missing

STEPS = 20
STALL = 8
SLOWLY = faults.environment(slow={"0": 0.2, "1": 0.2})
"""Each forward takes so long that there is time for what happens to the cable."""


@pytest.fixture(scope="module")
def recipe(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps of 2 micro-steps on two ranks, in bfloat16, a checkpoint every fifth, prepared."""
    why = missing()
    if why is not None:
        pytest.skip(why)
    write = recipe_writer(tmp_path_factory.mktemp("network"))
    recipe = write(model={"dtype": "bfloat16"}, train={"epochs": 4, "steps": STEPS, "global_batch_size": 4})
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


@pytest.fixture(scope="module")
def on_one_machine(recipe: Path) -> Path:
    return train(recipe, recipe.parent / "on-one-machine")


@contextmanager
def launched(cable: Cable, recipe: Path, run: Path, main: str) -> "Iterator[list[subprocess.Popen[str]]]":
    """launch/multi_node.sh on each host; whatever still lives is killed at the end."""
    environment = {**os.environ, **SLOWLY, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [ROOT / "launch/multi_node.sh", recipe, f"run.dir={run}", f"train.stall_seconds={STALL}", "--processes", "1"]
    started = []
    try:
        for rank, host in enumerate(cable.hosts):
            command = host.words(*words, "--nodes", "2", "--node-rank", str(rank), "--main-address", main)
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        yield started
    finally:
        for process in [*(launcher.pid for launcher in started), *(worker.pid for worker in workers(run))]:
            kill(process)
        for launcher in started:
            launcher.communicate()


def said(started: "list[subprocess.Popen[str]]") -> list[str]:
    """All that each node has said, once it has ended."""
    return [" ".join(launcher.communicate(timeout=LIMIT)[0].split()) for launcher in started]


def assert_finished(cable: Cable, recipe: Path, run: Path, wanted: Path, main: str) -> None:
    with launched(cable, recipe, run, main) as started:
        told = said(started)
        assert [launcher.returncode for launcher in started] == [0, 0], told
    assert_nobody_left(run)
    assert status(run)["state"] == "finished"
    assert [entry["step"] for entry in lines(run / "data_order.jsonl")] == list(range(1, STEPS + 1)), "each step once"
    assert_same_run(run, wanted)


def test_two_hosts_make_the_same_bits_as_one(recipe: Path, on_one_machine: Path, tmp_path: Path) -> None:
    """They meet by the name of the first, which on that host itself is 127.0.1.1."""
    run = tmp_path / "run"
    with connected(tmp_path, as_debian=True) as cable:
        assert_finished(cable, recipe, run, on_one_machine, cable.hosts[0].name)
    assert status(run)["launches"] == 1


def lose_all(cable: Cable) -> None:
    cable.lose(*cable.hosts)


def lose_one_way(cable: Cable) -> None:
    cable.lose(cable.hosts[0])


def unplug(cable: Cable) -> None:
    cable.unplug(cable.hosts[1])


@pytest.mark.parametrize("cut", [lose_all, *(pytest.param(cut, marks=pytest.mark.matrix) for cut in (lose_one_way, unplug))])
def test_a_cable_that_is_cut_ends_both_sides_and_mended_they_go_on(
    cut: Callable[[Cable], None], recipe: Path, on_one_machine: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with connected(tmp_path) as cable:
        first, second = cable.hosts
        with launched(cable, recipe, run, first.address) as started:
            wait_for(lambda: (run / "metrics.jsonl").is_file() and len(losses_so_far(run)) >= 7, started[0])
            cut(cable)
            began = time.monotonic()
            seconds: list[float] = []
            for launcher in started:
                launcher.wait(STALL + 60)
                seconds.append(time.monotonic() - began)
            told = said(started)
            assert_nobody_left(run)
        print(f"{cut.__name__}: node 0 had ended after {seconds[0]:.0f} s, both after {seconds[1]:.0f} s")
        print(*(words[-900:] for words in told), sep="\n")
        assert [launcher.returncode for launcher in started] == [1, 1], told
        silent = rf"rank 1 \(process \d+ on {second.name}\) has given no sign of life for \d+ s; last seen at step \d+"
        lost = rf"node 0 at {first.address} does not answer any more, for \d+ s: .*; rank 1 on {second.name} is at step \d+"
        # lost one way, the second host's last words arrive: what it noted, and then that it hung up, may come before the first one's limit
        first_said = f"{silent}|{lost}" if cut is lose_one_way else silent
        for words, wanted in zip(told, (first_said, lost), strict=True):
            (error,) = re.findall(r"error: .*", words)
            assert re.search(wanted, error), error
        ended = status(run)
        assert (ended["state"], ended["exit_code"]) == ("failed", 1)
        for rank in (0, 1):
            assert "Thread" in (run / "stacks" / f"rank-{rank}.txt").read_text()

        cable.mend()
        assert_finished(cable, recipe, run, on_one_machine, first.address)
    assert status(run)["launches"] == 2
    assert re.search(r"going on from checkpoint-[5-9]", (run / "log.txt").read_text())
