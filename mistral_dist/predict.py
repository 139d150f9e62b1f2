"""A file of texts or conversations -> what the tuned model answers: one JSON line for each row, in their order.

Classification: the likeliest label and the probability of each; else the written answer. A row that cannot be asked is answered with what
is wrong with it. On all ranks; a killed prediction goes on where it was. Started by `mistral-dist predict`, or directly:

    accelerate launch --config_file configs/accelerate/data_parallel.yaml -m mistral_dist.predict RUN FILE OUT
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mistral_dist.answers import MODELS
from mistral_dist.config import Recipe, Source, digest
from mistral_dist.data import sources
from mistral_dist.data.clean import tidy
from mistral_dist.data.encode import Encoder, load_encoder
from mistral_dist.data.example import Example, Rejected
from mistral_dist.data.rows import read_question
from mistral_dist.errors import FINISHED, DataError, MistralDistError
from mistral_dist.evaluate import recipe_of, refuse_another_base, work_of
from mistral_dist.exams.exam import Questions
from mistral_dist.exams.labels import Labels, probabilities
from mistral_dist.exams.sitting import take_all
from mistral_dist.exams.written import Writer
from mistral_dist.files import write_text
from mistral_dist.model import load_tuned
from mistral_dist.run import RunDirectory
from mistral_dist.runtime.engine import Runtime
from mistral_dist.unfinished import Unfinished

TUNED = MODELS[1:]


@dataclass(frozen=True)
class Unasked:
    """A row that cannot be asked."""

    place: str
    because: str
    """With the place."""


def predict(recipe: Recipe, runtime: Runtime, run: RunDirectory, file: str, out: Path) -> None:
    """Answer every row of a file, and write them to `out`. Raises DataError for a file that cannot be read, or asks nothing."""
    refuse_another_base(recipe.model, run)
    rows, folder = questions(recipe, file), unfinished_of(out)
    encoder = load_encoder(recipe)
    asked, prompts = _prompts(rows, encoder, recipe.data.max_length)
    if not asked and isinstance(rows[0], Unasked):
        raise DataError(f"{rows[0].because}; no row of {file} can be asked")
    texts = [{"text": row.text} if isinstance(row, Example) else {"text": ""} for row in rows]
    classifies = recipe.task.kind == "classification"
    exam: Questions = (
        Labels(recipe, runtime, encoder, [texts[n] for n in asked]) if classifies else Writer(recipe, runtime, encoder, prompts)
    )
    what = digest({"rows": [row.content if isinstance(row, Example) else row.because for row in rows]})
    kept = Unfinished.of(folder, work_of(recipe, run, what), runtime)
    model = load_tuned(recipe.asked_model, run.adapter, runtime.device, "sdpa")
    found = take_all(model, [exam], TUNED, kept, runtime, folder)[exam.name]["tuned"]
    if runtime.is_main:
        known = {index: found[n] for n, index in enumerate(asked)} if classifies else found
        lines = [_line(row, known.get(index), recipe) for index, row in enumerate(rows)]
        write_text(out, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))
        kept.discard()


def questions(recipe: Recipe, file: str) -> list[Example | Unasked]:
    """What a file asks, row by row; columns are named as in the recipe's first source. Raises DataError where it cannot be read."""
    like = recipe.data.sources[0]
    source = Source(path=file, columns=like.columns, format=like.format)
    found: list[Example | Unasked] = []
    for row in sources.read(source):
        try:
            found.append(tidy(read_question(row, recipe.task, source), recipe.data)[0])
        except Rejected as bad:
            found.append(Unasked(row.place, f"{row.place}: {bad.because}"))
    if not found:
        raise DataError(f"{file}: no rows")
    return found


def unfinished_of(out: Path) -> Path:
    """Where what was found so far is kept."""
    return out.with_name(f".{out.name}-unfinished")


def _prompts(rows: list[Example | Unasked], encoder: Encoder, max_length: int) -> tuple[list[int], dict[int, list[int]]]:
    """The indices of the rows that can be asked, and their prompts; what cannot is put in the row's place."""
    prompts: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if isinstance(row, Example):
            turns = (
                encoder.question(row.text)
                if encoder.task.kind == "classification"
                else row.messages or ({"role": "user", "content": row.text},)
            )
            try:
                prompt = encoder.prompt(turns, row.tools)
            except DataError as error:
                rows[index] = Unasked(row.place, f"{row.place}: {error}")
                continue
            if len(prompt) > max_length:
                longest = f"data.max_length is {max_length:,}, the longest that was trained on"
                rows[index] = Unasked(row.place, f"{row.place}: {len(prompt):,} tokens, {longest}; shorten it")
            else:
                prompts[index] = prompt
    return list(prompts), prompts


def _line(row: Example | Unasked, answer: Any, recipe: Recipe) -> Mapping[str, Any]:
    if isinstance(row, Unasked):
        return {"place": row.place, "error": row.because}
    asked: dict[str, Any] = {"place": row.place, **({"messages": row.messages} if row.messages else {"text": row.text})}
    if recipe.task.kind != "classification":
        return {**asked, "answer": answer[0], "ended": answer[1]}
    if not np.isfinite(answer).all():
        return {**asked, "error": f"{row.place}: the model gives no finite likelihood"}
    likely = probabilities(answer)
    named = dict(zip(recipe.task.labels, (round(float(one), 6) for one in likely), strict=True))
    return {**asked, "label": recipe.task.labels[int(np.argmax(likely))], "probabilities": named}


def main(words: list[str]) -> int:
    """One worker: `RUN FILE OUT [section.field=value ...]`; return the exit code."""
    run, file, out = RunDirectory(Path(words[0])), words[1], Path(words[2])
    try:
        recipe = recipe_of(run, words[3:])
        runtime = Runtime()
        predict(recipe, runtime, run, file, out)
        runtime.close()
        return FINISHED
    except MistralDistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        write_text(unfinished_of(out) / "failure.json", json.dumps({"message": str(error), "exit_code": error.exit_code}))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
