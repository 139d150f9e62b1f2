"""Exams taken: every row answered, by some rank, and kept as soon as it is; what a killed process had found is not asked again."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral_dist.answers import Which, as_model
from mistral_dist.exams.exam import Answers, Questions
from mistral_dist.files import write_text
from mistral_dist.runtime.engine import Runtime
from mistral_dist.unfinished import Unfinished


def take_all(
    model: Any, exams: Sequence[Questions], models: Sequence[Which], kept: Unfinished, runtime: Runtime, folder: Path
) -> dict[str, Answers]:
    """What base or tuned say to every row of every exam, on each rank; how far it is can be read in folder/progress.json."""
    rows = [(exam, which, row) for exam in exams for which in models for row in exam.rows]
    left = [(exam, which, row) for exam, which, row in rows if not all(_key(exam, which, index) in kept.before for index in row)]
    told = 0.0
    for n, (exam, which, row) in enumerate(left[runtime.rank :: runtime.world_size]):
        if runtime.is_main and time.monotonic() - told > 1:
            told, done = time.monotonic(), len(rows) - len(left) + n * runtime.world_size
            write_text(folder / "progress.json", json.dumps({"done": done, "total": len(rows)}))
        with as_model(model, which):
            found = exam.take(model, row)
        kept.add({_key(exam, which, index): value for index, value in zip(row, found, strict=True)})
    everything = dict(kept.before) | {key: value for found in runtime.gather(kept.found) for key, value in found.items()}
    return {
        exam.name: {which: {index: everything[_key(exam, which, index)] for row in exam.rows for index in sorted(row)} for which in models}
        for exam in exams
    }


def _key(exam: Questions, which: Which, index: int) -> str:
    return f"{exam.name}/{which}/{index}"
