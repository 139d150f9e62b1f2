"""A run that is killed again and again, at random moments, on machines drawn at random, ends as if nothing had happened.

make chaos                      20 kills each, half an hour or more on 2 cores
make chaos SEED=7 KILLS=50      another draw
"""

import os
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path

import psutil
import pytest

from mistral_dist.config import Recipe
from tests.conftest import WriteRecipe
from tests.dist.test_resume import assert_same_run
from tests.dist.test_topologies import each_example_once_an_epoch
from tests.launch import kill, lines, losses, losses_so_far, mistral_dist, resume, train, training, wait_for, workers

SEED = int(os.environ.get("SEED", "0"))
KILLS = int(os.environ.get("KILLS", "6"))
SAVE_EVERY = 3
A_LIFE = 4
"""Steps past its checkpoint after which a process group is killed, at most; more than between two checkpoints, so that the run gets on."""
TOO_FAST = "the run came to its end before it was killed so often; this machine needs more steps"
BFLOAT16 = "model.dtype=bfloat16"
ROWS = 60
"""So few that even three kills see two epochs."""
STAGES: list[int | str] = [0, 1, 2, 3, "2+offload", "3+offload"]
Topologies = Iterator[tuple[int, int | str]]

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(300 + 120 * KILLS)]


def any_machines(rng: random.Random) -> Topologies:
    """1 to 4 processes; of the stages each once before one comes again."""
    while True:
        for zero in rng.sample(STAGES, len(STAGES)):
            yield rng.randint(1, 4), zero


def steps_for(kills: int) -> int:
    """A group makes a few more before the kill comes."""
    return (A_LIFE + 4) * kills + 6


STEPS = steps_for(KILLS)


def newest_checkpoint(run: Path) -> int:
    """Its step; 0 where there is none."""
    return max((int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("checkpoint-*")), default=0)


def kill_at_random(rng: random.Random, run: Path, started: "subprocess.Popen[str]") -> str:
    """SIGKILL to the launcher, to one worker or agent, or to all at once; return whom. Whoever is left ends by itself.

    What the launcher or a worker has started beside them is no worker: the run would go on without it.
    """
    whom = rng.choice(["the launcher", "a worker", "all"])
    ranks = sorted(process.pid for process in workers(run))
    assert ranks, TOO_FAST
    below = [child.pid for child in psutil.Process(started.pid).children(recursive=True)] if whom == "all" else []
    for pid in {"the launcher": [started.pid], "a worker": [rng.choice(ranks)], "all": [started.pid, *below]}[whom]:
        kill(pid)
    wait_for(lambda: started.poll() is not None)
    wait_for(lambda: not workers(run))
    return whom


def live_and_die(rng: random.Random, recipe: Path, run: Path, topologies: Topologies, *overrides: str, kills: int = KILLS) -> Counter[str]:
    """All the lives of a run but its last, each of which makes a step that was not made before; return what they met.

    No kill may cost more than what came since the newest checkpoint and, where that was still being written, since the one before.
    Told is the goodput: the steps of the run, of those that all its lives made.
    """
    met: Counter[str] = Counter()
    steps, costs = steps_for(kills), []
    for life, (processes, zero) in enumerate(islice(topologies, kills), 1):
        made = len(losses_so_far(run)) if (run / "metrics.jsonl").is_file() else 0
        saved = newest_checkpoint(run)
        # what is there from the life before is no sign of this one
        until = max(made + 1, saved + rng.randint(1, A_LIFE))
        assert until < steps, TOO_FAST
        began = time.monotonic()
        with training(recipe, run, *overrides, until=until, processes=processes, zero=zero) as started:
            if life == kills:  # so that there is something to go on from at last
                wait_for(lambda: any((run / "checkpoints").glob("checkpoint-*")), started)
            time.sleep(rng.uniform(0, 0.8))
            is_saving = any((run / "checkpoints").glob(".aside-*"))
            whom = kill_at_random(rng, run, started)
        reached = len(losses_so_far(run))
        assert not saved or re.findall(r"going on from checkpoint-(\d+)", (run / "log.txt").read_text())[-1] == str(saved)
        costs.append(reached - newest_checkpoint(run))
        # one that is due is not begun while another is written: the steps wait
        assert 0 <= costs[-1] <= 2 * SAVE_EVERY, f"from step {reached} back to {newest_checkpoint(run)}"
        met.update({f"{processes} x ZeRO-{zero}": 1, whom: 1, "inside a save": is_saving})
        print(
            f"{processes} x ZeRO-{zero}: {whom} killed after {time.monotonic() - began:.0f} s, from step {saved} on;"
            f" {costs[-1]} steps to do again",
            flush=True,
        )
    goodput = steps / (steps + sum(costs))
    print(f"goodput {goodput:.0%}: of {steps} steps {sum(costs)} were to be made again; at most {max(costs)} for a kill", flush=True)
    return met


@pytest.fixture
def recipe(write_recipe: WriteRecipe, texts: list[dict[str, str]]) -> Path:
    recipe = write_recipe(
        rows=texts[:ROWS],
        train={"steps": STEPS, "epochs": STEPS, "global_batch_size": 4, "gradient_checkpointing": False},
        checkpoint={"save_steps": SAVE_EVERY},
    )
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


@pytest.mark.fault(
    "killed at random moments, again and again, on other machines",
    "at most two checkpoint intervals done again; each example once an epoch; float32 losses within 1e-3",
    zero=(0, 1, 2, 3, "2+offload", "3+offload"),
)
def test_on_any_machines(recipe: Path, tmp_path: Path) -> None:
    """World sizes 1 to 4, every ZeRO stage: the same examples, each once an epoch; in float32 the same losses within rounding."""
    straight, run = train(recipe, tmp_path / "straight", processes=1, zero=0), tmp_path / "run"
    rng = random.Random(SEED)
    met = live_and_die(rng, recipe, run, any_machines(rng))
    resume(recipe, run)
    order = lines(run / "data_order.jsonl")
    assert order == lines(straight / "data_order.jsonl")
    each_example_once_an_epoch([id for entry in order for id in entry["ids"]], Recipe.load(recipe))
    assert [entry["step"] for entry in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    worst = max(abs(a - b) for a, b in zip(losses(run), losses(straight), strict=True))
    print(f"seed {SEED}, {KILLS} kills in {STEPS} steps ({dict(met)}): losses within {worst:.1e} of the run never killed")
    assert worst <= 1e-3


@pytest.mark.parametrize(("zero", "kills"), [(2, KILLS), (0, min(KILLS, 3)), (3, min(KILLS, 3))])
@pytest.mark.fault(
    "killed again and again, at random moments, on the same machines",
    "at most two checkpoint intervals done again; every bit equal, in bfloat16",
)
def test_on_the_same_machines(zero: int, kills: int, recipe: Path, tmp_path: Path) -> None:
    """Two processes in bfloat16: the same bits."""
    overrides = (BFLOAT16, f"train.steps={steps_for(kills)}")
    straight, run = train(recipe, tmp_path / "straight", *overrides, zero=zero), tmp_path / "run"
    met = live_and_die(random.Random(SEED + 1 + zero), recipe, run, repeat((2, zero)), *overrides, kills=kills)
    resume(recipe, run, *overrides, zero=zero)
    assert_same_run(run, straight, last=steps_for(kills))
    print(f"seed {SEED}, {kills} kills in {steps_for(kills)} steps ({dict(met)}): every bit equal")
