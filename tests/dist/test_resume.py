"""Resume is continuation: killed, stopped, damaged, moved to other ranks, a run ends as if nothing had happened."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.conftest import WriteRecipe
from tests.launch import STAGES, kill, lines, losses, metrics, mistral_dist, resume, status, train, training, wait_for, workers

ADAPTER, OPTIMIZER = "adapter/adapter_model.safetensors", "optimizer.safetensors"


@pytest.fixture(scope="module")
def recipe(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps in bfloat16, a checkpoint every fifth, prepared."""
    write = recipe_writer(tmp_path_factory.mktemp("resume"))
    recipe = write(model={"dtype": "bfloat16"}, train={"epochs": 2, "steps": 20, "global_batch_size": 4})
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


@pytest.fixture(scope="module")
def never_killed(recipe: Path) -> Callable[[int], Path]:
    """By ZeRO stage: the run that nothing happens to, made when it is first asked for."""
    return cache(lambda zero: train(recipe, recipe.parent / f"never-killed-{zero}", zero=zero))


def assert_same_run(run: Path, wanted: Path, last: int = 20) -> None:
    """Bit-equal adapter, optimizer, metrics and data order."""
    checkpoint = f"checkpoints/checkpoint-{last}"
    for file in (ADAPTER, "adapter/adapter_config.json", f"{checkpoint}/{ADAPTER}", f"{checkpoint}/optimizer.safetensors"):
        assert (run / file).read_bytes() == (wanted / file).read_bytes(), file
    assert metrics(run) == metrics(wanted)
    assert lines(run / "data_order.jsonl") == lines(wanted / "data_order.jsonl")


def assert_nobody_left(run: Path) -> None:
    wait_for(lambda: not workers(run))


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.fault("SIGKILL: all processes; the launcher; one worker", "all end; the same command goes on to the same bits")
def test_killed_by_force_it_goes_on_to_the_same_bits(zero: int, recipe: Path, never_killed: Callable[[int], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    # the launcher and everything under it, in the middle of the second stretch between checkpoints
    with training(recipe, run, until=8, zero=zero) as started:
        everyone = psutil.Process(started.pid).children(recursive=True)
        assert len(everyone) >= 3, "an agent and two workers"
        for process in [started.pid, *(child.pid for child in everyone)]:
            kill(process)
    assert_nobody_left(run)
    assert status(run)["state"] == "running"

    # the launcher alone: its workers die with it, and write nothing more
    with training(recipe, run, until=12, zero=zero) as started:
        kill(started.pid)
        assert_nobody_left(run)

    # a single worker: the others and the launcher end by themselves, and say so
    with training(recipe, run, until=17, zero=zero) as started:
        worker = psutil.Process(started.pid).children()[0].children()[-1].pid
        kill(worker)
        assert started.wait(60) == 1
        assert_nobody_left(run)
    assert status(run)["state"] == "failed"
    assert f"(process {worker}) was killed (signal 9); where nobody did that, memory was full" in status(run)["message"]

    train(recipe, run, zero=zero)
    assert "going on from checkpoint-15" in (run / "log.txt").read_text()
    assert_same_run(run, never_killed(zero))

    done = mistral_dist("train", recipe, f"run.dir={run}")
    assert done.returncode == 0
    assert "finished at step 20 of 20; nothing to do" in done.stdout


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.fault("a damaged checkpoint", "named, and the one before is used, to the same bits")
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    zero: int, recipe: Path, never_killed: Callable[[int], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with training(recipe, run, until=12, zero=zero) as started:
        kill(started.pid)
        assert_nobody_left(run)
    newest = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    train(recipe, run, zero=zero)
    log = (run / "log.txt").read_text()
    assert f"{newest.name} is damaged (optimizer.safetensors has another checksum); passed over" in log
    assert f"going on from checkpoint-{int(newest.name.split('-')[1]) - 5}" in log
    assert_same_run(run, never_killed(zero))


@pytest.mark.fault("another base or tokenizer", "refused, with both fingerprints; the same one from elsewhere goes on", zero=(0,))
def test_another_base_is_refused_and_the_same_one_elsewhere_is_not(write_recipe: WriteRecipe, small_model: Path, tmp_path: Path) -> None:
    recipe, run = write_recipe(train={"steps": 12, "global_batch_size": 4}), tmp_path / "run"
    with training(recipe, run, until=2, processes=1, zero=0) as started:
        os.kill(started.pid, signal.SIGTERM)
        assert started.wait(120) == 85
    saved = status(run)["checkpoint"]
    other = shutil.copytree(small_model, tmp_path / "other")
    weights, tokenizer = other / "model.safetensors", other / "tokenizer.json"
    again = ("train", recipe, f"run.dir={run}", f"model.path={other}", "--processes", "1")

    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    began = len((run / "log.txt").read_text())
    assert mistral_dist(*again).returncode == 2
    words = rf"began with other files of the base test/small than those in {other}: fingerprint \w{{16}} then, \w{{16}} now; put them back "
    assert re.search(words, status(run)["message"]), status(run)["message"]
    assert "loading the model" not in (run / "log.txt").read_text()[began:]
    weights.write_bytes(whole)

    content = json.loads(tokenizer.read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 10**6, "content": "<|another|>"})
    tokenizer.write_text(json.dumps(content))
    done = mistral_dist(*again)
    assert done.returncode == 2 and "tokenizer" in done.stdout + done.stderr, done.stdout + done.stderr
    shutil.copy(small_model / "tokenizer.json", tokenizer)

    done = mistral_dist(*again)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on from {saved}" in (run / "log.txt").read_text()


MACHINES: list[tuple[int, int | str]] = [(2, 1), (2, 3), (2, 1), (4, 2), (3, "2+offload"), (2, "3+offload"), (1, 0)]
"""(processes, ZeRO stage) of each launch but the last, which is ZeRO-3 on two."""


@pytest.mark.parametrize(
    "machines", [pytest.param(MACHINES[1:4], id="a short way"), pytest.param(MACHINES, id="a long way", marks=pytest.mark.matrix)]
)
@pytest.mark.fault(
    "other machines after each stop",
    "the same data; losses, adapter and optimizer the same within rounding",
    zero=(0, 1, 2, 3, "2+offload", "3+offload"),
)
def test_a_run_moves_between_topologies(machines: list[tuple[int, int | str]], write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """From each kind of sharding to another, and from 2 ranks to 4, 3, 1, with each gradient clipped: as one process in one go."""
    steps = 5 * (len(machines) + 1)  # three on each, and some that are made before a signal has come
    recipe = write_recipe(
        train={"epochs": 4, "steps": steps, "global_batch_size": 4, "gradient_checkpointing": False}, optim={"max_grad_norm": 0.01}
    )
    assert mistral_dist("prepare", recipe).returncode == 0
    straight = train(recipe, tmp_path / "straight", processes=1, zero=0)
    moving = tmp_path / "moving"
    for processes, zero in machines:
        step = 3 + (status(moving)["step"] if moving.exists() else 0)
        with training(recipe, moving, until=step, processes=processes, zero=zero) as started:
            os.kill(started.pid, signal.SIGTERM)
            assert started.wait(120) == 85
    resume(recipe, moving, processes=2, zero=3)
    assert lines(moving / "data_order.jsonl") == lines(straight / "data_order.jsonl")
    worst = max(abs(a / b - 1) for a, b in zip(losses(moving), losses(straight), strict=True))
    print(f"losses through {len(machines) + 1} topologies within {worst:.1e} of one process, relative")
    assert worst <= 1e-6
    # the norm of the difference by that of the tensor; seen: 1.5e-6, 6e-6 and, of squares, 1e-5
    for file, kinds, within in ((ADAPTER, ("lora_A.weight", "lora_B.weight"), 1e-5), (OPTIMIZER, ("exp_avg", "exp_avg_sq"), 1e-4)):
        moved, wanted = (load_file(run / "checkpoints" / f"checkpoint-{steps}" / file) for run in (moving, straight))
        assert moved.keys() == wanted.keys()
        apart = {name: float((moved[name] - tensor).norm() / tensor.norm()) for name, tensor in wanted.items()}
        for kind in kinds:
            print(f"{kind}: within {max(found for name, found in apart.items() if name.endswith(kind)):.1e}")
        assert max(apart.values()) <= within
