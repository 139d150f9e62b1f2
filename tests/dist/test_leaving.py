"""Leaving together: on request, in time, and when a rank is hung; nothing is lost and nobody is left."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import WriteRecipe
from tests.dist.test_resume import assert_nobody_left, assert_same_run
from tests.launch import kill, losses_so_far, mistral_dist, status, train, training, wait_for, workers


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


def test_a_hung_rank_is_named_and_killed(recipe: Path, never_stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for until, rank in ((7, 1), (12, 0)):
        with training(recipe, run, "train.stall_seconds=8", until=until) as started:
            pid = workers_of(started.pid)[rank].pid
            stopped = time.monotonic()
            kill(pid, signal.SIGSTOP)
            assert started.wait(60) == 1
            print(f"rank {rank} was stopped, all had ended {time.monotonic() - stopped:.0f} s later")
            assert_nobody_left(run)
        ended = status(run)
        assert (ended["state"], ended["exit_code"]) == ("failed", 1)
        assert f"rank {rank} (process {pid} on {os.uname().nodename})" in ended["message"]
        assert re.search(r"no sign of life for \d+ s; last seen at step \d+", ended["message"])
        assert "Thread" in (run / "stacks" / f"rank-{1 - rank}.txt").read_text()
    train(recipe, run, "train.stall_seconds=8")
    assert_same_run(run, never_stopped)
    assert not (run / "stacks" / "rank-0.txt").exists()
