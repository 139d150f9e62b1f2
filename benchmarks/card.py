"""What QLoRA of a Mistral-7B takes and gives on one NVIDIA GPU: tokens/s and memory, by attention, micro-batch and ZeRO stage.

    python -m benchmarks.card [--folder /tmp/mistral-dist-card] [--keep] [--length 2048] [--steps 6]

A base of real size with random weights (see real_size.py), the shipped recipes' LoRA (r 16, all linear layers), bfloat16. Each line is a
`mistral-dist train` of its own on full packs of plain text; its speed is the median over all but the first two steps. TFLOP/s
counts 4 per parameter and token (forward, and the gradient of the activations; frozen weights have no gradient of their own), not what
is recomputed, and not attention's. Needs 20 GB of disk; some five minutes. Writes build/gpu/card.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_size import make_base, make_recipe

GLOBAL_BATCH = 8
"""Packs a step."""
PARAMETERS = 7.11e9
"""In the linear layers, `lm_head` included."""
FLASH, SDPA = "model.attention=flash_attention_2", "model.attention=sdpa"
RUNS: list[tuple[str, int, tuple[str, ...]]] = [
    ("flash-attn", 0, (FLASH, "train.micro_batch_size=1")),
    ("flash-attn, 8 packs at a time", 0, (FLASH, "train.micro_batch_size=8")),
    ("flash-attn, ZeRO-3", 3, (FLASH, "train.micro_batch_size=1")),
    ("flash-attn, auto", 0, (FLASH, "train.micro_batch_size=auto")),
    ("SDPA", 0, (SDPA, "train.micro_batch_size=1")),
    ("flash-attn, ZeRO-2", 2, (FLASH, "train.micro_batch_size=1")),
    ("flash-attn, nothing recomputed", 0, (FLASH, "train.micro_batch_size=1", "train.gradient_checkpointing=false")),
]
"""What it is called, its ZeRO stage, its overrides."""


def measure(name: str, recipe: Path, zero: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Train once; a line of the table."""
    run = recipe.parent / "runs" / name.replace(" ", "-").replace(",", "")
    started = time.perf_counter()
    words = ["train", str(recipe), f"run.dir={run}", "checkpoint.save_steps=1000", *overrides, "--processes", "1", "--zero", str(zero)]
    done = subprocess.run([sys.executable, "-m", "mistral_dist.cli", *words], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        print(f"{name:<34}failed ({done.returncode}): {(done.stdout + done.stderr)[-600:]}", flush=True)
        return {"failed": (done.stdout + done.stderr)[-2000:]}
    entries = [entry for line in (run / "metrics.jsonl").read_text().splitlines() if "eval" not in (entry := json.loads(line))]
    speed = statistics.median(entry["tokens_per_second"] for entry in entries[2:])
    memory = max(entry["memory_bytes"] for entry in entries) / 2**30
    told = [line for line in (run / "log.txt").read_text().splitlines() if "micro_batch_size=auto:" in line]
    tflops = 4 * PARAMETERS * speed / 1e12
    rate = f"{speed:>8.0f} tokens/s {tflops:>6.0f} TFLOP/s"
    print(f"{name:<34}{rate} {memory:>7.2f} GiB {seconds:>6.0f} s in all {' '.join(told)}", flush=True)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return {"tokens_per_second": speed, "tflops": tflops, "peak_gib": memory, "seconds": seconds, "auto": told, "metrics": entries}


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mistral-dist-card"))
    parser.add_argument("--keep", action="store_true", help="leave the files")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a pack")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=32, help="fewer: a trial")
    parser.add_argument("--only", choices=["make"], help="one part")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    asked.folder.mkdir(parents=True, exist_ok=True)
    os.environ["MISTRAL_DIST_CACHE"] = str(asked.folder / "cache")
    found: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "length": asked.length}
    try:
        started = time.perf_counter()
        base = make_base(asked.folder, asked.layers, "cuda")
        print(f"{found['card']}, packs of {asked.length} tokens, {GLOBAL_BATCH} a step")
        print(f"{'writing the base':<34}{time.perf_counter() - started:>8.1f} s", flush=True)
        if asked.only == "make":
            return
        # two rows fill a pack, but for the tokens around them; a longer row would be halved, and its packs half full
        words, rows = asked.length // 2 - 16, 3 * GLOBAL_BATCH * asked.steps
        recipe = make_recipe(asked.folder, base, length=asked.length, rows=rows, words=words, steps=asked.steps, packs=GLOBAL_BATCH)
        for name, zero, overrides in RUNS:
            found[name] = measure(name, recipe, zero, overrides)
    finally:
        if not asked.keep:
            shutil.rmtree(asked.folder)
        file = Path("build/gpu/card.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
