"""Rows -> examples: read the columns, repair the text, drop what cannot teach; every drop is counted and kept.

What comes out is a list of `Example`, in the order of the sources, and an `Audit` whose counts add up:
rows read = examples kept + rows dropped, by reason.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ftfy
import rensa

from mistral_dist.config import Data, Task
from mistral_dist.data.example import Example, Message
from mistral_dist.data.sources import Row
from mistral_dist.errors import DataError

ROLES = ("system", "user", "assistant")

REPAIR = ftfy.TextFixerConfig(
    uncurl_quotes=False, unescape_html=False, fix_latin_ligatures=False, fix_character_width=False, normalization="NFC"
)
"""Mend mojibake and control characters. Quotes, ligatures, full-width letters and `&lt;` may be what the author meant."""

PERMUTATIONS = 128
"""Hash functions of a MinHash: the standard error of its Jaccard estimate is 1/sqrt(128) = 0.09 at most."""
BANDS = 32
"""Bands of 4 rows: two texts of similarity 0.8 share one with probability 1 - (1 - 0.8^4)^32 > 0.9999."""
SHINGLE = 5
"""Words in a shingle."""


@dataclass
class Audit:
    """What happened to each row."""

    rows: int = 0
    repaired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantine: list[dict[str, str]] = field(default_factory=list)

    def drop(self, example: Example, reason: str, because: str = "") -> None:
        """Count a dropped example and keep its place, the reason, and what it collided with."""
        self.dropped[reason] += 1
        self.quarantine.append({"place": example.place, "reason": reason, "because": because, "text": example.content[:500]})


def clean(rows: Iterable[Row], task: Task, data: Data, audit: Audit) -> list[Example]:
    """The examples worth training on, in order. Raises DataError for a row that is no example of the task."""
    examples = _repaired(rows, task, audit)
    examples = _long_enough(examples, data.min_characters, audit)
    kept = _without_conflicts(list(examples), audit)
    kept = list(_without_duplicates(kept, audit))
    if data.near_duplicates is not None:
        kept = list(_without_near_duplicates(kept, data.near_duplicates, audit))
    return kept


def read_example(row: Row, task: Task) -> Example:
    """The example that a row holds. Raises DataError with place and remedy where it holds none."""
    if task.kind in ("chat", "instruct"):
        return Example(row.place, messages=_conversation(row, task))
    text = _string(row, "text")
    return Example(row.place, text=text, label=_label(row, task) if task.kind == "classification" else "")


def repair(text: str) -> str:
    """Mend encoding, Unicode and white space: NFC, no control characters, no trailing blanks, one blank line at most."""
    text = ftfy.fix_text(text.replace("\x00", ""), REPAIR)
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[^\S\n]+(?=\n|$)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _repaired(rows: Iterable[Row], task: Task, audit: Audit) -> Iterator[Example]:
    for row in rows:
        audit.rows += 1
        example = read_example(row, task)
        messages = tuple({**message, "content": repair(message["content"])} for message in example.messages)
        mended = replace(example, text=repair(example.text), messages=messages)
        _refuse_unanswered(mended)
        audit.repaired += mended.content != example.content
        yield mended


def _long_enough(examples: Iterable[Example], least: int, audit: Audit) -> Iterator[Example]:
    for example in examples:
        if len(example.text) + sum(len(message["content"]) for message in example.messages) < max(1, least):
            audit.drop(example, "too_short", f"fewer than {max(1, least)} characters")
        else:
            yield example


def _without_conflicts(examples: list[Example], audit: Audit) -> list[Example]:
    """Drop texts that stand under more than one label: which one is right cannot be known here."""
    labels: dict[str, set[str]] = {}
    for example in examples:
        labels.setdefault(example.id, set()).add(example.label)
    kept = []
    for example in examples:
        if len(labels[example.id]) > 1:
            audit.drop(example, "conflicting_labels", ", ".join(sorted(labels[example.id])))
        else:
            kept.append(example)
    return kept


def _without_duplicates(examples: Iterable[Example], audit: Audit) -> Iterator[Example]:
    first: dict[str, str] = {}
    for example in examples:
        if example.id in first:
            audit.drop(example, "duplicate", f"same as {first[example.id]}")
        else:
            first[example.id] = example.place
            yield example


def _without_near_duplicates(examples: Iterable[Example], threshold: float, audit: Audit) -> Iterator[Example]:
    """Of texts whose estimated Jaccard similarity reaches the threshold, the first stays (MinHash with LSH, Broder 1997)."""
    index = rensa.RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
    kept: list[tuple[Example, Any]] = []
    for example in examples:
        sketch = rensa.RMinHash(num_perm=PERMUTATIONS, seed=0)
        sketch.update(shingles(example.content))
        twins = [n for n in sorted(index.query(sketch)) if sketch.jaccard(kept[n][1]) >= threshold]
        if twins:
            audit.drop(example, "near_duplicate", f"like {kept[twins[0]][0].place}")
            continue
        index.insert(len(kept), sketch)
        kept.append((example, sketch))
        yield example


def _refuse_unanswered(example: Example) -> None:
    answers = [message["content"] for message in example.messages if message["role"] == "assistant"]
    if example.messages and not any(answers):
        raise DataError(f"{example.place}: no answer to learn from (no assistant turn with content); add one or remove the row")


def shingles(text: str) -> list[str]:
    """The runs of 5 words of a text, in lower case; a shorter text is one shingle."""
    words = text.lower().split()
    return [" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]


def _string(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        found = ", ".join(row.values) or "none"
        remedy = f"columns found: {found}; map yours with data.sources.columns: {{{column}: YOURS}}"
        raise DataError(f"{row.place}: column {column!r} must be a text, it is {value!r:.60}; {remedy}")
    return value


def _label(row: Row, task: Task) -> str:
    value = row.values.get("label")
    label = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    if not label:
        raise DataError(f"{row.place}: no label, so nothing to learn from; give it one of {', '.join(task.labels)} or remove the row")
    if label not in task.labels:
        raise DataError(f"{row.place}: label {label!r} is not one of {', '.join(task.labels)}; add it to task.labels or mend the row")
    return label


def _conversation(row: Row, task: Task) -> tuple[Message, ...]:
    if task.kind == "instruct" and "messages" not in row.values:
        turns = [{"role": "user", "content": _string(row, "prompt")}, {"role": "assistant", "content": _string(row, "completion")}]
    else:
        turns = row.values.get("messages")  # type: ignore[assignment]
    if not isinstance(turns, list) or not turns:
        raise DataError(f'{row.place}: no messages; a row looks like {{"messages": [{{"role": "user", "content": ...}}, ...]}}')
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise DataError(f"{row.place}: each message has a role ({', '.join(ROLES)}) and a content (text); found {turn!r:.80}")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
