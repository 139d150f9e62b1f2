"""The nouns of the data's way: a raw row, and the example that it holds.

Sources yield rows, rows.py reads examples out of them, and everything after that sees examples only.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""A turn: `role` (system, user, assistant, tool) and `content` (text, may be empty beside tool calls). An assistant's turn
may have `tool_calls` ([{"id", "type": "function", "function": {"name", "arguments": a JSON text}}]) and `train: false`,
which makes it context; a tool's turn has `tool_call_id` and, if given, `name`."""
CONTEXT = "\x1d"
"""Marks an answer that is context in the content of an example. No word, so that it hides no run of a benchmark's words."""


@dataclass(frozen=True, slots=True)
class Row:
    """One raw record and where it stands."""

    place: str
    """`file:line` for text formats, `file row N` elsewhere."""
    payload: bytes | dict[str, Any]
    """A line of JSON as it stands in the file, or columns, which may be null. CSV: cells beyond the header are under the key
    None, and those that a row lacks are null."""


class Rejected(Exception):
    """An example that is left out: it goes to quarantine with its reason, and the others go on."""

    def __init__(self, reason: str, because: str) -> None:
        """`reason`: one word to count by, e.g. too_short; `because`: what about it, and the remedy where there is one."""
        super().__init__(reason, because)  # both, so that it can cross to another process
        self.reason = reason
        self.because = because
        self.text = ""
        """The example's content, where it could be read."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.because}"


class BadRow(Rejected):
    """A row that cannot be read, or is no example of the task; too many of them stop `prepare`."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training item: a text (classification with its label, pretrain without) or a conversation."""

    place: str
    text: str = ""
    label: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    """Tools that the assistant may call, as in OpenAI's API: {"type": "function", "function": {...}}."""
    ends: bool = True
    """pretrain: whether the text ends its document; only then does the model learn to stop after it."""
    group: str = ""
    """What it belongs to: examples of a group stay in one split, also where they are of several sources."""
    source: int = 0
    """The source that it came from, by its place in the recipe."""

    @property
    def content(self) -> str:
        """Everything the example says but its label, and which answers are trained: what makes two examples the same."""
        if not self.messages:
            return self.text
        turns = [
            f"{turn['role']}\x1f{turn['content']}{canonical(turn.get('tool_calls'))}{'' if turn.get('train', True) else CONTEXT}"
            for turn in self.messages
        ]
        return "\x1e".join([*turns, canonical(self.tools)] if self.tools else turns)

    @property
    def gist(self) -> str:
        """What makes two examples nearly the same: what user, assistant and tools say. A long system turn that all rows have, or
        the description of their tools, would make all of them alike."""
        return self.text or "\n".join(turn["content"] for turn in self.messages if turn["role"] != "system")

    @property
    def id(self) -> str:
        """16 hex digits of SHA-256 of the content: stable across files, orders and machines."""
        return hashlib.sha256(self.content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def canonical(value: Any) -> str:
    """Nothing for nothing; else JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False) if value else ""


def to_record(example: Example) -> dict[str, Any]:
    """What a shard stores of an example; conversations as JSON text, since their turns differ in shape."""
    return {
        "place": example.place,
        "source": example.source,
        "text": example.text,
        "label": example.label,
        "messages": json.dumps(example.messages, ensure_ascii=False) if example.messages else "",
        "tools": json.dumps(example.tools, ensure_ascii=False) if example.tools else "",
        "ends": example.ends,
    }


def from_record(record: Mapping[str, Any]) -> Example:
    """The example that a record of a shard holds."""
    messages = tuple(json.loads(record["messages"])) if record["messages"] else ()
    tools = tuple(json.loads(record["tools"])) if record["tools"] else ()
    return Example(record["place"], record["text"], record["label"], messages, tools, record["ends"], source=record["source"])
