"""A raw row -> the example that it holds: JSON decoded, columns named, and label, group and texts taken out of them.

    text_label         {"text", "label"}        classification
    text               {"text"}                 pretrain
    a conversation     one of shapes.py         chat, instruct

A row that holds none is a BadRow: counted, kept in quarantine with its place, and the others go on.
"""

import json
from collections.abc import Iterator
from typing import Any

from mistral_dist.config import Source, Task
from mistral_dist.data.example import BadRow, Example, Row
from mistral_dist.data.shapes import (
    SHAPES,
    Values,
    answered,
    column_names,
    in_order,
    refuse_surrogates,
    shape_of,
    text_cell,
    tools_of,
)
from mistral_dist.errors import DataError

NO_ANSWER = "?"
"""Stands for the answer that is asked for, where a shape has a column for it."""


def read_example(row: Row, task: Task, source: Source, index: int = 0) -> Example:
    """The example that a row of source number `index` holds. Raises BadRow with what is wrong and the remedy."""
    values = _renamed(columns(row), source)
    group = _group(values, source.group) if source.group else ""
    if task.kind == "classification":
        return Example(row.place, text=text_cell(values, "text"), label=_label(values, task), group=group, source=index)
    if task.kind == "pretrain":
        return Example(row.place, text=text_cell(values, "text"), group=group, source=index)
    name = source.format if source.format != "auto" else shape_of(values)
    messages = answered(in_order(SHAPES[name](values)))
    return Example(row.place, messages=messages, tools=tools_of(values), group=group, source=index)


def read_question(row: Row, task: Task, source: Source) -> Example:
    """As `read_example`, of a row whose answer is missing, or is not wanted: a text, or a conversation up to where it is answered.

    Raises BadRow with what is wrong and the remedy.
    """
    found = columns(row)
    values = {**found, **{ours: found[theirs] for ours, theirs in source.columns.items() if theirs in found}}
    if task.kind in ("classification", "pretrain"):
        return Example(row.place, text=text_cell(values, "text"))
    for asked, answer in (("prompt", "completion"), ("instruction", "output")):
        if values.get(asked) is not None and values.get(answer) is None:
            values[answer] = NO_ANSWER
    turns = in_order(SHAPES[source.format if source.format != "auto" else shape_of(values)](values))
    asking = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    if not asking or asking[-1]["role"] not in ("user", "tool"):
        raise BadRow("no_question", "nothing to answer: the conversation has no turn of the user; add one or remove the row")
    return Example(row.place, messages=asking, tools=tools_of(values))


def benchmark_texts(row: Row) -> list[str]:
    """Every text in a row of a benchmark, whatever its columns are called. Raises DataError where the row cannot be read."""
    try:
        return list(_strings(columns(row)))
    except BadRow as error:
        raise DataError(f"data.benchmarks: {row.place}: {error.because}") from None
    except RecursionError:
        raise DataError(f"data.benchmarks: {row.place}: nested too deep; mend or remove the row") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for part in value.values() for text in _strings(part))
    elif isinstance(value, list):
        yield from (text for part in value for text in _strings(part))


def columns(row: Row) -> Values:
    """The columns of a row, all of whose texts and keys can be written as UTF-8; a column may be null.

    Raises BadRow for a line that is no JSON object, for what is no UTF-8, and for cells beyond the header.
    """
    if isinstance(row.payload, bytes):
        values = _parsed(row.payload)
        # the line is UTF-8, so only an escape can spell a lone surrogate
        if b"\\ud" not in row.payload and b"\\uD" not in row.payload:
            return values
    else:
        values = row.payload
        if None in values:
            # csv.DictReader marks superfluous cells so
            raise BadRow("wrong_cells", "more cells than the header has; quote cells that hold the separator")
    for name, value in values.items():
        refuse_surrogates(name, "the name of a column")
        refuse_surrogates(value, f"column {name!r}")
    return values


def _parsed(line: bytes) -> Values:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", f"{error.reason} at byte {error.start + 1} of the line; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRow("not_json", f"{error.msg} at character {error.pos + 1}; mend or remove the line") from None
    except (RecursionError, ValueError) as error:
        raise BadRow("not_json", f"{' '.join(str(error).split())[:100]}; mend or remove the line") from None
    if not isinstance(values, dict):
        raise BadRow("not_an_object", f"a row is an object {{...}}, this is a {type(values).__name__}; mend or remove the line")
    return values


def _renamed(values: Values, source: Source) -> Values:
    for theirs in source.columns.values():
        if theirs not in values:
            raise BadRow("no_column", f"no column {theirs!r}, which data.sources.columns names; there are {column_names(values)}")
    return {**values, **{ours: values[theirs] for ours, theirs in source.columns.items()}}


def _group(values: Values, column: str) -> str:
    """What the row belongs to; a row without a value belongs to nothing. The same value in two sources is the same group."""
    value = values.get(column)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        remedy = "mend it, or take another column as data.sources.group"
        raise BadRow("bad_group", f"the group, column {column!r}, must be a text or a whole number, it is {value!r:.60}; {remedy}")
    return str(value)


def _label(values: Values, task: Task) -> str:
    value, labels = values.get("label"), ", ".join(task.labels)
    if value is None or value == "":
        found = "the label is empty" if "label" in values else "no label"
        raise BadRow("no_label", f"{found}, so nothing to learn from; give it one of {labels} or remove the row")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("bad_label", f"the label must be a text or a whole number, it is {value!r:.60}; give it one of {labels}")
    if str(value) not in task.labels:
        raise BadRow("unknown_label", f"label {str(value)!r} is not one of {labels}; add it to task.labels or mend the row")
    return str(value)
