"""What going on after a kill costs at step 100 and at step 100,000: the pieces that could grow with the run.

    python -m benchmarks.resume

A run directory as a run leaves it: one line of metrics and one of data order for each step, 40 of them beyond the checkpoint.
`begin` looks at the lease and the recipe, `find` verifies the newest checkpoint (small tensors: hashing depends on the
adapter, not on the step), `cut` cuts the lines back, `seek` is the first step's examples from a plan that is already there, in
a run as long. What depends on the data alone (the plan itself, see benchmarks/plan.py) or on the model (loading) is left out: it
is the same at any step. Each figure is the median of 21.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch

from benchmarks.plan import BATCH, Blank
from mistral_dist import checkpoint
from mistral_dist.checkpoint import Progress, Snapshot
from mistral_dist.config import Checkpoint, Recipe
from mistral_dist.data.cursor import Cursor
from mistral_dist.data.stream import Plan, Stream
from mistral_dist.run import Lease, RunDirectory

STEPS = (100, 100_000)
BEYOND = 40
TIMES = 21
LIMIT = 1.1
RECIPE = "version: 1\ntask: {kind: chat}\ndata: {sources: [{path: x.jsonl}]}\nmodel: {name: org/model}\n"


def main() -> None:
    """Print the table; fail where the sum grows by more than a tenth."""
    found: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepared = {step: _Case(Path(folder) / str(step), step) for step in STEPS}
        samples: dict[int, list[dict[str, float]]] = {step: [] for step in STEPS}
        for _ in range(TIMES):
            for step, case in prepared.items():  # in turns: what the machine does beside hits both
                samples[step].append(case.measure())
    for step, taken in samples.items():
        found[step] = {piece: statistics.median(each[piece] for each in taken) for piece in taken[0]}
    print(f"{'milliseconds':<14}" + "".join(f"{f'step {step:,}':>16}" for step in STEPS) + f"{'ratio':>8}")
    few, many = (found[step] for step in STEPS)
    few["sum"], many["sum"] = sum(few.values()), sum(many.values())
    for piece in few:
        print(f"{piece:<14}{few[piece] * 1e3:>16.2f}{many[piece] * 1e3:>16.2f}{many[piece] / few[piece]:>8.2f}")
    if many["sum"] / few["sum"] > LIMIT:
        raise SystemExit("a bar was missed")


class _Case:
    """A run that was killed `BEYOND` steps after the checkpoint of `step`."""

    def __init__(self, path: Path, step: int) -> None:
        self.step = step
        path.mkdir(parents=True)
        (path / "recipe.yaml").write_text(RECIPE)
        self.recipe = Recipe.load(path / "recipe.yaml", [f"run.dir={path / 'run'}"])
        self.run = RunDirectory(path / "run")
        self.run.path.mkdir()
        name = "base_model.model.layers.0.q_proj.lora_A.default.weight"
        tensors = {f"{name}.{moment}": torch.ones(16, 4096) for moment in ("exp_avg", "exp_avg_sq")}
        adapter = {name: torch.ones(16, 4096)}
        snapshot = Snapshot(Progress(step, Cursor(step * BATCH)), adapter, peft.LoraConfig(r=16, target_modules=["q_proj"]), tensors, {})
        checkpoint.save(self.run.checkpoints, snapshot, Checkpoint())
        self.add(1, step)
        # a run as long, its examples one to a pack
        lengths = np.full((step + BEYOND) * BATCH, 100, np.int32)
        plan = Plan(lengths, capacity=128, seed=0, epochs=1, global_batch_size=BATCH)
        self.stream = Stream(plan, Blank(lengths), (lengths, np.ones_like(lengths)), rank=0, world_size=1, micro_batch_size=1)

    def add(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.run.append(
                "metrics.jsonl", {"step": step, "loss": 1.234567890123, "learning_rate": 1e-4, "tokens": 60_000, "seconds": 4.2}
            )
            self.run.append("data_order.jsonl", {"step": step, "ids": [f"{step:016x}-{n}" for n in range(BATCH)]})
        self.run.sync()

    def measure(self) -> dict[str, float]:
        """Seconds of each piece, once; then the lines are there again."""
        self.add(self.step + 1, self.step + BEYOND)
        run = RunDirectory(self.run.path)
        seconds = {}
        with Lease(run):
            seconds["begin"] = _timed(lambda: run.begin(self.recipe))
            seconds["find"] = _timed(lambda: checkpoint.latest_good(run.checkpoints))
            seconds["cut"] = _timed(lambda: run.cut_back(self.step))
            cursor = Cursor(self.step * BATCH)
            seconds["seek"] = _timed(lambda: next(self.stream.from_cursor(cursor)))
        with open(run.path / "metrics.jsonl", "rb") as lines:
            lines.seek(-400, 2)
            assert json.loads(lines.read().splitlines()[-1])["step"] == self.step
        return seconds


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
