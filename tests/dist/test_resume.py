"""Resume is continuation: killed, stopped, damaged, moved to other ranks, a run ends as if nothing had happened."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch import kill, lines, losses, metrics, mistral_dist, run_dir, status, train, training, wait_for, workers

WriteRecipe = Callable[..., Path]
FILES = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")
STATE = ("adapter/adapter_model.safetensors", "optimizer.safetensors")


@pytest.fixture
def recipe(write_recipe: WriteRecipe) -> Path:
    """20 steps in bfloat16, a checkpoint every fifth."""
    recipe = write_recipe(model={"dtype": "bfloat16"}, train={"epochs": 2, "steps": 20, "global_batch_size": 4})
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


@pytest.fixture
def never_killed(recipe: Path, tmp_path: Path) -> Path:
    return train(recipe, f"run.dir={tmp_path / 'runs' / 'never-killed'}")


def assert_same_run(run: Path, wanted: Path) -> None:
    """Bit-equal adapter, optimizer, metrics and data order."""
    for file in FILES:
        assert (run / file).read_bytes() == (wanted / file).read_bytes(), file
    for file in STATE:
        assert (run / "checkpoints/checkpoint-20" / file).read_bytes() == (wanted / "checkpoints/checkpoint-20" / file).read_bytes(), file
    assert metrics(run) == metrics(wanted)
    assert lines(run / "data_order.jsonl") == lines(wanted / "data_order.jsonl")


def assert_nobody_left(run: Path) -> None:
    wait_for(lambda: not workers(run))


def test_killed_by_force_it_goes_on_to_the_same_bits(recipe: Path, never_killed: Path) -> None:
    run = run_dir(recipe)
    # the launcher and everything under it, in the middle of the second stretch between checkpoints
    with training(recipe, until=8) as started:
        everyone = psutil.Process(started.pid).children(recursive=True)
        for process in [started.pid, *(child.pid for child in everyone)]:
            kill(process)
    assert_nobody_left(run)
    assert status(run)["state"] == "running"

    # the launcher alone: its workers die with it, and write nothing more
    with training(recipe, until=12) as started:
        assert lines(run / "metrics.jsonl")[0]["step"] == 1
        kill(started.pid)
        assert_nobody_left(run)

    # a single worker: the others and the launcher end by themselves, and say so
    with training(recipe, until=17) as started:
        kill(next(child.pid for child in psutil.Process(started.pid).children(recursive=True) if child.ppid() != started.pid))
        assert started.wait(60) == 1
        assert_nobody_left(run)
    assert status(run)["state"] == "failed"

    train(recipe)
    assert "going on from checkpoint-15" in (run / "log.txt").read_text()
    assert_same_run(run, never_killed)

    done = mistral_dist("train", recipe)
    assert done.returncode == 0
    assert "finished at step 20 of 20; nothing to do" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal_saves_and_the_next_launch_goes_on(recipe: Path, never_killed: Path, number: signal.Signals) -> None:
    run = run_dir(recipe)
    with training(recipe, until=7) as started:
        os.kill(started.pid, number)
        os.kill(started.pid, number)
        assert started.wait(120) == 85
    assert_nobody_left(run)
    stopped = status(run)
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 85)
    assert stopped["checkpoint"] == f"checkpoint-{stopped['step']}"
    assert stopped["step"] not in (5, 10), "the signal should have made a checkpoint of its own"
    train(recipe)
    assert_same_run(run, never_killed)


def test_a_signal_to_one_worker_stops_all(recipe: Path) -> None:
    run = run_dir(recipe)
    with training(recipe, until=3) as started:
        agents = psutil.Process(started.pid).children()
        worker = agents[0].children()[-1]
        worker.send_signal(signal.SIGTERM)
        assert started.wait(120) == 85
    assert status(run)["state"] == "stopped"
    assert_nobody_left(run)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(recipe: Path, never_killed: Path) -> None:
    run = run_dir(recipe)
    with training(recipe, until=12) as started:
        kill(started.pid)
        assert_nobody_left(run)
    file = run / "checkpoints/checkpoint-10/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    train(recipe)
    log = (run / "log.txt").read_text()
    assert "checkpoint-10 is damaged (optimizer.safetensors has another checksum); passed over" in log
    assert "going on from checkpoint-5" in log
    assert_same_run(run, never_killed)


def test_a_run_moves_between_topologies(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """ZeRO-3 x 3 -> one process -> ZeRO-1 x 2 -> ZeRO-2 x 3 -> ZeRO-3 x 2: same data, same losses within rounding."""
    recipe = write_recipe(train={"epochs": 4, "steps": 25, "global_batch_size": 4, "gradient_checkpointing": False})
    assert mistral_dist("prepare", recipe).returncode == 0
    straight = train(recipe, f"run.dir={tmp_path / 'runs' / 'straight'}", processes=1, zero=0)
    moving = run_dir(recipe)
    for step, (processes, zero) in zip((6, 11, 16, 21), [(3, 3), (1, 0), (2, 1), (3, 2)], strict=True):
        with training(recipe, until=step, processes=processes, zero=zero) as started:
            os.kill(started.pid, signal.SIGTERM)
            assert started.wait(120) == 85
    train(recipe, processes=2, zero=3)
    assert lines(moving / "data_order.jsonl") == lines(straight / "data_order.jsonl")
    worst = max(abs(a - b) for a, b in zip(losses(moving), losses(straight), strict=True))
    print(f"losses through five topologies within {worst:.1e} of one process")
    assert worst <= 1e-4


def test_a_second_start_names_the_holder(recipe: Path) -> None:
    with training(recipe, until=1):
        second = mistral_dist("train", recipe)
        assert second.returncode == 2
        assert "in use by process" in second.stderr
        assert "run.dir=" in second.stderr
        assert "Traceback" not in second.stderr
    assert status(run_dir(recipe))["state"] == "running", "the refused start must not touch the status"
