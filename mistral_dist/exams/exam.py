"""What all exams have in common.

An exam plans rows of examples, the same on every rank whatever the number of ranks: so each example is always computed beside the
same others, to the same bits. A model answers a row (`take`), with a JSON value for each example; from the answers of base and tuned
to all rows comes what test.json and the files beside it say (`mark`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mistral_dist.answers import Which
from mistral_dist.data.example import from_record
from mistral_dist.data.pack import best_fit
from mistral_dist.errors import TrainingError

Records = Sequence[Mapping[str, Any]]
Answers = Mapping[Which, Mapping[int, Any]]
"""What base and tuned said, by the record's index."""
Lines = list[dict[str, Any]]
WORST = 50
"""Examples in worst.jsonl."""
SHOWN = 500
"""Characters of them."""


@dataclass(frozen=True)
class Marked:
    """What an exam has shown."""

    base: dict[str, Any]
    tuned: dict[str, Any]
    difference: dict[str, Any]
    """tuned against base, on the same examples."""
    about: dict[str, Any] = field(default_factory=dict)
    """What is neither's: the labels, the number of targets."""
    predictions: Lines = field(default_factory=list)
    """What each model says; the same for any number of ranks."""
    scores: Lines = field(default_factory=list)
    """The numbers behind that."""
    worst: Lines = field(default_factory=list)
    """Where the tuned model is furthest off, with the rows that the examples came from."""


class Questions(Protocol):
    """One kind of question about many examples."""

    name: str
    rows: list[list[int]]
    """Indices of examples that are answered together."""

    def take(self, model: Any, row: Sequence[int]) -> list[Any]:
        """What the model says of each example of a row."""


class Exam(Questions, Protocol):
    """Questions whose right answers are known."""

    def mark(self, answers: Answers) -> Marked:
        """What all answers are worth."""


def document_of(id: str) -> str:
    """Of which document an example is a piece: those of a long text, or of an unrolled conversation, share it (data/fit.py)."""
    return id.partition("-")[0]


def refuse_nonfinite(answers: Answers, records: Records) -> None:
    """Raise TrainingError where a model gave no number, which every comparison would take for an answer like any other."""
    for which, found in answers.items():
        bad = [index for index, numbers in found.items() if not np.isfinite(numbers).all()]
        if bad:
            first = f"the first is that from {records[bad[0]]['place']}"
            raise TrainingError(f"the {which} model gives no finite likelihood for {len(bad):,} of {len(found):,} test examples; {first}")


def rows_of(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of about `capacity` tokens; an example longer than that has a row of its own."""
    return best_fit([min(length, capacity) for length in lengths], capacity)


def by_length(prompts: Mapping[int, Sequence[int]], size: int) -> list[list[int]]:
    """Rows of `size` prompts of like length, the longest first: what does not fit into memory fails at once."""
    order = sorted(prompts, key=lambda index: (-len(prompts[index]), index))
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def shown(record: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """A line of worst.jsonl: where the example stands in its source, what about it, and what it says."""
    content = from_record(record).gist
    return {
        "id": record["id"],
        "place": record["place"],
        **facts,
        "text": content if len(content) <= SHOWN else f"{content[:SHOWN]} ...",
    }
