"""How much slower a step is while a checkpoint is being written.

    python -m benchmarks.saving [--steps 40] [--rank 64]

The demo's model (SmolLM2-135M in NF4, LoRA on all linear layers, 234 MB of adapter and moments at rank 64) on all cores of this
machine. Steps take turns: one while the writer works, all through it or as long as it has something to do, and one without, once it has
ended. So what the machine does beside hits both. Prints the medians, how much of a step the writer was at work, and what the steps waited
for: gather and copy.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mistral_dist.checkpoint import Progress, Snapshot
from mistral_dist.config import Checkpoint, Recipe
from mistral_dist.demo import make_model
from mistral_dist.model import adapter_parameters, build_trainable, choose_attention
from mistral_dist.optim import build_optimizer
from mistral_dist.run import RunDirectory
from mistral_dist.runtime.engine import Runtime
from mistral_dist.runtime.process import quiet_libraries
from mistral_dist.saver import Saver

TOKENS = 256
LIMIT = 1.05


def main() -> None:
    """Print the figures; fail where a step is slower by more than 5 %."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=64)
    words = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(Path(folder), words.rank)
        runtime = Runtime(recipe)
        model = build_trainable(recipe, runtime.device, choose_attention(recipe.model, runtime.device))
        peft_config = model.peft_config["default"]
        runtime.prepare(model, build_optimizer(list(adapter_parameters(model).values()), recipe.optim, fused=False))
        run = RunDirectory(Path(folder) / "run")
        run.path.mkdir()
        saver = Saver(run, Checkpoint(save_total_limit=1), print)
        for _ in range(3):
            _step(runtime)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        clocks = []
        for number in range(1, words.steps + 1):
            is_writing = number % 2 == 1
            if is_writing:
                started = time.perf_counter()
                adapter, moments = runtime.gather_adapter(), runtime.gather_moments()
                snapshot = Snapshot(Progress(number), adapter, peft_config, moments, {})
                saver.start(snapshot, time.perf_counter() - started)
            started = time.perf_counter()
            _step(runtime)
            seconds[is_writing].append(time.perf_counter() - started)
            if is_writing:
                saver.finish()
                clocks.append(saver.take_clocks()["save"])
    _report(seconds, clocks, snapshot.bytes)


def _recipe(folder: Path, rank: int) -> Recipe:
    text = "version: 1\ntask: {kind: chat}\ndata: {sources: [{path: x.jsonl}]}\nmodel: {name: demo}\n"
    (folder / "r.yaml").write_text(text)
    return Recipe.load(folder / "r.yaml", [f"model.path={make_model()}", f"lora.r={rank}", "train.gradient_checkpointing=false"])


def _step(runtime: Runtime) -> None:
    ids = torch.randint(0, 30_000, (1, TOKENS), device=runtime.device)
    runtime.set_learning_rate(1e-5)
    with runtime.micro_step(1, 1, [TOKENS]):
        runtime.backward(runtime.model(input_ids=ids, labels=ids).loss)
    runtime.finish_step()


def _report(seconds: dict[bool, list[float]], clocks: list[dict[str, float]], size: int) -> None:
    median = {is_writing: statistics.median(of) for is_writing, of in seconds.items()}
    # neighbours are compared, so that a machine that slows down for a while does so on both sides
    ratio = statistics.median(a / b for a, b in zip(seconds[True], seconds[False], strict=False))
    gather, write = (statistics.median(each[name] for each in clocks) for name in ("gather_seconds", "write_seconds"))
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    print(f"checkpoint of {size / 1e6:,.0f} MB, {threads}, {len(seconds[True])} pairs of steps")
    print(f"step without a writer {median[False]:.3f} s, with one {median[True]:.3f} s, ratio {ratio:.3f}")
    print(f"gather and copy {gather:.3f} s, writing {write:.2f} s: at work in {min(1.0, write / median[True]):.0%} of a step")
    if ratio > LIMIT:
        raise SystemExit("a bar was missed")


if __name__ == "__main__":
    main()
