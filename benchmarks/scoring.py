"""Scoring labels: all labels of an example in one row that computes its prompt once, against each label in a forward of its own.

    python -m benchmarks.scoring RUN [--examples 60] [evaluate.dtype=float32]

RUN is a finished classification run, for instance runs/demo. The two ways take turns in one process, example by example of the test
split, so that both see the same machine. Writes what it prints to build/scoring.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from mistral_dist.answers import label_row, label_scores, losses
from mistral_dist.data.encode import Candidates, Encoded
from mistral_dist.data.pack import best_fit
from mistral_dist.evaluate import held_out, recipe_of
from mistral_dist.model import load_tuned
from mistral_dist.run import RunDirectory


def one_by_one(model: torch.nn.Module, example: Candidates, device: torch.device) -> list[float]:
    """The log-probability of each label, each in a forward of its own."""
    begin = len(example.prompt)
    rows = [Encoded([*example.prompt, *answer], list(range(begin, begin + len(answer)))) for answer in example.answers]
    return [-float(losses(model, [row], device)[0]) for row in rows]


def main() -> None:
    """Print the ratio, and how far the scores are apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("overrides", nargs="*", metavar="evaluate.FIELD=VALUE")
    asked = parser.parse_intermixed_args()
    run = RunDirectory(asked.run)
    recipe = recipe_of(run, asked.overrides)
    records, _, encoder = held_out(recipe, run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_tuned(recipe.asked_model, run.adapter, device, "sdpa")
    examples = [encoder.candidates(record["text"]) for record in records[: asked.examples]]
    lengths = [len(one.prompt) + sum(len(answer) - 1 for answer in one.answers) for one in examples]
    capacity = max(recipe.evaluate.max_tokens, *lengths)
    alone: dict[int, list[float]] = {}
    together: dict[int, list[float]] = {}
    seconds = {"alone": 0.0, "together": 0.0}
    for row in best_fit(lengths, capacity):
        started = time.perf_counter()
        scores = label_scores(model, label_row([examples[n] for n in row]), len(row), len(recipe.task.labels), device)
        seconds["together"] += time.perf_counter() - started
        together |= dict(zip(row, scores.tolist(), strict=True))
        started = time.perf_counter()
        alone |= {n: one_by_one(model, examples[n], device) for n in row}
        seconds["alone"] += time.perf_counter() - started
    apart = np.abs(np.array([together[n] for n in sorted(alone)]) - np.array([alone[n] for n in sorted(alone)]))
    same = sum(np.argmax(together[n]) == np.argmax(alone[n]) for n in alone)
    found = {
        "examples": len(examples),
        "labels": len(recipe.task.labels),
        "dtype": recipe.asked_model.dtype,
        "examples_per_second": {name: round(len(examples) / spent, 2) for name, spent in seconds.items()},
        "ratio": round(seconds["alone"] / seconds["together"], 2),
        "scores_apart_at_most": float(apart.max()),
        "same_predictions": int(same),
    }
    print(json.dumps(found, indent=2))
    file = Path("build/scoring.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
