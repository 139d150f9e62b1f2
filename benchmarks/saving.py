"""How much slower steps are while a checkpoint is being written.

    python -m benchmarks.saving [--saves 6] [--rank 64]

The demo's model (SmolLM2-135M in NF4, LoRA on all linear layers, 234 MB of adapter and moments at rank 64) on all cores of this
machine. As in a training, steps go on while the writer works; the step in which it ends is not counted. Then as many steps are made
without it, and so on by turns: each stretch beside a writer is compared with the mean of those before and after it, so that a machine
that changes its speed does so on both sides. Prints the median of these ratios, and what the steps waited for: gather and copy.
"""

import argparse
import itertools
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
    parser.add_argument("--saves", type=int, default=6)
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
        _steps(runtime, 3)
        without, beside, clocks = [_steps(runtime, 10)], [], []
        for number in range(1, words.saves + 1):
            started = time.perf_counter()
            adapter, moments = runtime.gather_adapter(), runtime.gather_moments()
            snapshot = Snapshot(Progress(number), adapter, peft_config, moments, {})
            saver.start(snapshot, time.perf_counter() - started)
            seconds = []
            while saver.is_writing():
                seconds += _steps(runtime, 1)
            saver.finish()
            clocks.append(saver.take_clocks()["save"])
            beside.append(seconds[:-1] or seconds)
            without.append(_steps(runtime, len(beside[-1])))
            print(f"save {number}: {len(seconds)} steps beside it, {statistics.mean(beside[-1]):.3f} s each", flush=True)
    _report(beside, without, clocks, snapshot.bytes)


def _recipe(folder: Path, rank: int) -> Recipe:
    text = "version: 1\ntask: {kind: chat}\ndata: {sources: [{path: x.jsonl}]}\nmodel: {name: demo}\n"
    (folder / "r.yaml").write_text(text)
    return Recipe.load(folder / "r.yaml", [f"model.path={make_model()}", f"lora.r={rank}", "train.gradient_checkpointing=false"])


def _steps(runtime: Runtime, number: int) -> list[float]:
    """Seconds of each step."""
    found = []
    for _ in range(number):
        started = time.perf_counter()
        ids = torch.randint(0, 30_000, (1, TOKENS), device=runtime.device)
        runtime.set_learning_rate(1e-5)
        with runtime.micro_step(1, 1, [TOKENS]):
            runtime.backward(runtime.model(input_ids=ids, labels=ids).loss)
        runtime.finish_step()
        found.append(time.perf_counter() - started)
    return found


def _report(beside: list[list[float]], without: list[list[float]], clocks: list[dict[str, float]], size: int) -> None:
    alone = [statistics.mean([*before, *after]) for before, after in itertools.pairwise(without)]
    ratios = [statistics.mean(seconds) / other for seconds, other in zip(beside, alone, strict=True)]
    ratio = statistics.median(ratios)
    gather, write = (statistics.median(each[name] for each in clocks) for name in ("gather_seconds", "write_seconds"))
    print(f"checkpoint of {size / 1e6:,.0f} MB, {torch.get_num_threads()} threads on {os.cpu_count()} cores, {sum(map(len, beside))} steps")
    print(f"a step beside the writer takes {ratio:.3f} times as long ({', '.join(f'{one:.3f}' for one in sorted(ratios))})")
    print(f"gather and copy {gather:.3f} s, writing {write:.1f} s, in which {statistics.median(map(len, beside)):.0f} steps are made")
    if ratio > LIMIT:
        raise SystemExit("a bar was missed")


if __name__ == "__main__":
    main()
