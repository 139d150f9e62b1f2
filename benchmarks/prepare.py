"""How fast `prepare` is, and how much memory it takes: made-up short rows, one in five nearly a copy of another.

    python benchmarks/prepare.py [--rows 1000000] [--workers 1]

Prints rows per second and core, the peak of resident memory over all processes, and what was found. The rows are built
from a fixed seed; the tokenizer is the demo's, with a system turn of the task's own, as in the demo's recipe.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from mistral_dist.config import Recipe
from mistral_dist.demo import make_model
from mistral_dist.runtime.process import quiet_libraries

WORDS = 30_000
COPIES = 0.2
"""Share of the rows that are an earlier one and a word more."""


PROCESSES = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def _cpu_seconds() -> float:
    """What this process and its children have used; other processes of the machine do not count."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, PROCESSES))


def write_rows(file: Path, count: int) -> None:
    """Sentences of 8 to 32 words that are drawn as words are in a language: the n-th most common with frequency 1/n."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 10))) for _ in range(WORDS)]
    weights = [1 / (n + 1) for n in range(WORDS)]
    pool = rng.choices(words, weights, k=2_000_000)
    recent: list[list[str]] = []
    with open(file, "w", encoding="utf-8") as stream:
        for _ in range(count):
            if recent and rng.random() < COPIES:
                text = [*rng.choice(recent), rng.choice(words)]
            else:
                start = rng.randrange(len(pool) - 32)
                text = pool[start : start + rng.randint(8, 32)]
                recent.append(text)
                recent = recent[-10_000:]
            stream.write(json.dumps({"text": " ".join(text), "label": rng.choice(("yes", "no"))}) + "\n")


def main() -> None:
    """Write the rows, prepare them, say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--near-duplicates", default="0.8")
    choice = parser.parse_args()
    quiet_libraries()
    from mistral_dist.data.encode import load_encoder
    from mistral_dist.data.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, choice.rows)
        recipe_file = Path(folder) / "bench.yaml"
        recipe_file.write_text(
            json.dumps(
                {
                    "version": 1,
                    "task": {"kind": "classification", "labels": ["yes", "no"], "prompt": "{text}", "system": "Judge."},
                    "data": {"sources": [{"path": str(file)}], "dir": f"{folder}/data", "workers": choice.workers, "max_length": 512},
                    "model": {"name": "demo", "path": str(make_model())},
                }
            )
        )
        recipe = Recipe.load(recipe_file, [f"data.near_duplicates={choice.near_duplicates}"])
        encoder = load_encoder(recipe)
        started, before = time.perf_counter(), _cpu_seconds()
        prepared = prepare(recipe, encoder)
        seconds, busy = time.perf_counter() - started, _cpu_seconds() - before
        manifest = prepared.manifest
    own, others = (resource.getrusage(who).ru_maxrss / 2**20 for who in PROCESSES)
    print(f"{choice.rows:,} rows, {choice.workers} worker(s): {seconds:.1f} s, {choice.rows / seconds:,.0f} rows/s")
    print(f"{busy:.1f} s of one core (user and system, all processes): {choice.rows / busy:,.0f} rows/s/core")
    print(f"peak memory: {own:.2f} GiB, and {others:.2f} GiB in each worker")
    print(f"left out {manifest['dropped']}, leakage {manifest['leakage']}")


if __name__ == "__main__":
    main()
