"""A raw row -> the example that it holds: JSON, columns, and the shapes of rows that people have.

    messages           {"messages": [{"role", "content", ...}], "tools": [...]}         OpenAI's, Hugging Face's, Mistral's
    sharegpt           {"conversations": [{"from": "human", "value": ...}, ...]}
    alpaca             {"instruction", "input", "output", "system", "history"}
    prompt_completion  {"prompt", "completion"}, each a text or a list of messages
    text_label         {"text", "label"}                                                classification
    text               {"text"}                                                         pretrain

A row that holds none is a BadRow: counted, kept in quarantine with its place, and the others go on.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from mistral_dist.config import Source, Task
from mistral_dist.data.example import BadRow, Example, Message, Row
from mistral_dist.errors import DataError

Values = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""ShareGPT's `from` -> role."""
FOLLOWS: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant with tool calls": ("tool",),
    "tool": ("tool", "assistant"),
}
"""Who may speak after whom; "" is the beginning. All of Mistral's formats ask for this order."""


def read_example(row: Row, task: Task, source: Source, index: int = 0) -> Example:
    """The example that a row of source number `index` holds. Raises BadRow with what is wrong and the remedy."""
    values = _renamed(columns(row), source)
    group = f"{index}:{_text(values, source.group)}" if source.group else ""
    if task.kind == "classification":
        return Example(row.place, text=_text(values, "text"), label=_label(values, task), group=group, source=index)
    if task.kind == "pretrain":
        return Example(row.place, text=_text(values, "text"), group=group, source=index)
    name = source.format if source.format != "auto" else shape_of(values)
    messages = answered(in_order(SHAPES[name](values)))
    return Example(row.place, messages=messages, tools=_tools(values), group=group, source=index)


def benchmark_texts(row: Row) -> list[str]:
    """Every text in a row of a benchmark, whatever its columns are called. Raises DataError where the row cannot be read."""
    try:
        return list(_strings(columns(row)))
    except BadRow as error:
        raise DataError(f"data.benchmarks: {row.place}: {error.because}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for part in value.values() for text in _strings(part))
    elif isinstance(value, list):
        yield from (text for part in value for text in _strings(part))


def columns(row: Row) -> Values:
    """The columns of a row. Raises BadRow for a line that is no JSON object, and for what is no UTF-8."""
    if isinstance(row.payload, bytes):
        return _parsed(row.payload)
    if None in row.payload or None in row.payload.values():
        # csv.DictReader marks superfluous cells with the key None and missing ones with the value None
        if None in row.payload:
            raise BadRow("wrong_cells", "more cells than the header has; quote cells that hold the separator")
        return {name: value for name, value in row.payload.items() if value is not None}
    return row.payload


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
            raise BadRow("no_column", f"no column {theirs!r}, which data.sources.columns names; there are {_names(values)}")
    return {**values, **{ours: values[theirs] for ours, theirs in source.columns.items()}}


def shape_of(values: Values) -> str:
    """Which of the shapes of conversations a row has, told from its columns. Raises BadRow where it has none."""
    if isinstance(values.get("messages"), list):
        return "messages"
    if isinstance(values.get("conversations"), list):
        return "sharegpt"
    if "instruction" in values and "output" in values:
        return "alpaca"
    if "prompt" in values and "completion" in values:
        return "prompt_completion"
    known = "messages; conversations; instruction and output; prompt and completion"
    raise BadRow("no_conversation", f"columns {_names(values)}, none of: {known}; map yours with data.sources.columns")


def in_order(turns: Iterable[Message]) -> tuple[Message, ...]:
    """The turns, if each follows one that it may follow. Raises BadRow naming the first that does not."""
    before = ""
    turns = tuple(turns)
    for number, turn in enumerate(turns, 1):
        if turn["role"] not in FOLLOWS[before]:
            after = f"after {_article(before)} turn" if before else "at the beginning"
            allowed = " or ".join(FOLLOWS[before])
            raise BadRow("wrong_role_order", f"turn {number} is of the {turn['role']} {after}, where {allowed} is expected")
        if not turn["content"].strip() and not turn.get("tool_calls") and turn["role"] != "tool":
            raise BadRow("empty_turn", f"turn {number} ({turn['role']}) is empty; fill it or remove the row")
        before = "assistant with tool calls" if turn.get("tool_calls") else turn["role"]
    return turns


def answered(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns up to the last answer. Raises BadRow where there is none to learn from."""
    last = max((number for number, turn in enumerate(turns, 1) if turn["role"] == "assistant"), default=0)
    if not last:
        raise BadRow("no_answer", "no answer to learn from (no assistant turn); add one or remove the row")
    if not any(turn["role"] == "assistant" and turn.get("train", True) for turn in turns):
        raise BadRow("no_target", "every answer is switched off (train: false); nothing to learn from")
    return tuple(turns[:last])


# the shapes of conversations


def _of_messages(values: Values) -> list[Message]:
    turns = values.get("messages")
    if not isinstance(turns, list) or not turns:
        raise BadRow("no_messages", 'no messages; a row looks like {"messages": [{"role": "user", "content": ...}, ...]}')
    return [_message(turn, number) for number, turn in enumerate(turns, 1)]


def _of_sharegpt(values: Values) -> list[Message]:
    turns: list[Message] = []
    for number, turn in enumerate(values.get("conversations") or [], 1):
        role = SHAREGPT.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise BadRow("bad_turn", f"turn {number} needs from ({', '.join(SHAREGPT)}) and value (text); found {turn!r:.80}")
        if turn["from"] == "function_call":
            turns.append(_message({"role": role, "content": "", "tool_calls": _calls_of_text(turn["value"], number)}, number))
        else:
            flags = {name: turn[name] for name in ("train", "weight") if name in turn}
            turns.append(_message({"role": role, "content": turn["value"], **flags}, number))
    system = values.get("system")
    return [{"role": "system", "content": system}, *turns] if isinstance(system, str) and system.strip() else turns


def _of_alpaca(values: Values) -> list[Message]:
    asked, given = _text(values, "instruction"), values.get("input") or ""
    history = values.get("history") or []
    turns: list[Message] = []
    if isinstance(values.get("system"), str) and values["system"].strip():
        turns.append({"role": "system", "content": values["system"]})
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadRow("bad_turn", f"history is a list of [question, answer]; found {pair!r:.80}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{asked}\n\n{given}" if given else asked
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": _text(values, "output")}]


def _of_prompt_completion(values: Values) -> list[Message]:
    turns: list[Message] = []
    if isinstance(values.get("system"), str) and values["system"].strip():
        turns.append({"role": "system", "content": values["system"]})
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(values.get(column), list):
            turns += _of_messages({"messages": values[column]})
        else:
            turns.append({"role": role, "content": _text(values, column)})
    return turns


SHAPES: dict[str, Callable[[Values], list[Message]]] = {
    "messages": _of_messages,
    "sharegpt": _of_sharegpt,
    "alpaca": _of_alpaca,
    "prompt_completion": _of_prompt_completion,
}


# a turn


def _message(turn: Any, number: int) -> Message:
    """A turn with just the keys that we know; content as one text."""
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise BadRow("bad_turn", f"turn {number} needs a role ({', '.join(ROLES)}) and a content (text); found {turn!r:.80}")
    message: Message = {"role": turn["role"], "content": _content(turn, number)}
    if turn["role"] == "assistant":
        if turn.get("tool_calls"):
            message["tool_calls"] = [_call(call, number) for call in _listed(turn["tool_calls"], number)]
        if _switched_off(turn, number):
            message["train"] = False
    if turn["role"] == "tool":
        message |= {name: str(turn[name]) for name in ("tool_call_id", "name") if turn.get(name)}
    return message


def _content(turn: dict[str, Any], number: int) -> str:
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow("bad_turn", f"the content of turn {number} ({turn['role']}) must be a text; found {content!r:.80}")
    return _unicode(content, f"turn {number}")


def _switched_off(turn: dict[str, Any], number: int) -> bool:
    """Whether the turn is context only: `train: false`, or `weight: 0` as OpenAI and Mistral write it."""
    train, weight = turn.get("train"), turn.get("weight")
    if train not in (None, True, False) or weight not in (None, 0, 1):
        found = f"train={train!r}, weight={weight!r}"
        raise BadRow("bad_turn", f"turn {number}: train is true or false, weight 1 or 0 (or left out); found {found}")
    return train is False or (weight is not None and weight == 0)


def _call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("bad_tool_call", f'turn {number}: a tool call looks like {{"function": {{"name", "arguments"}}}}; found {call!r:.80}')
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not _is_json(arguments):
        raise BadRow("bad_tool_call", f"turn {number}: the arguments of {function['name']} are no JSON: {arguments!r:.80}")
    named = {"id": str(call["id"])} if call.get("id") else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _calls_of_text(text: str, number: int) -> list[dict[str, Any]]:
    """ShareGPT writes calls as JSON: {"name", "arguments"}, or a list of them."""
    try:
        found = json.loads(text)
    except ValueError:
        raise BadRow("bad_tool_call", f"turn {number}: a function_call is JSON with name and arguments; found {text!r:.80}") from None
    return [{"function": call} for call in (found if isinstance(found, list) else [found])]


def _tools(values: Values) -> tuple[dict[str, Any], ...]:
    tools = values.get("tools") or []
    if isinstance(tools, str):
        tools = json.loads(tools) if _is_json(tools) else None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("bad_tools", f"tools is a list of objects, or the JSON text of one; found {values['tools']!r:.80}")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _listed(value: Any, number: int) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow("bad_tool_call", f"turn {number}: tool_calls is a list; found {value!r:.80}")
    return value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


# a cell


def _text(values: Values, column: str) -> str:
    value = values.get(column)
    if not isinstance(value, str):
        remedy = f"columns found: {_names(values)}; map yours with data.sources.columns: {{{column}: YOURS}}"
        raise BadRow(f"no_{column}", f"column {column!r} must be a text, it is {value!r:.60}; {remedy}")
    return _unicode(value, f"column {column!r}")


def _label(values: Values, task: Task) -> str:
    value = values.get("label")
    label = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    if not label:
        raise BadRow("no_label", f"no label, so nothing to learn from; give it one of {', '.join(task.labels)} or remove the row")
    if label not in task.labels:
        raise BadRow("unknown_label", f"label {label!r} is not one of {', '.join(task.labels)}; add it to task.labels or mend the row")
    return label


def _unicode(text: str, where: str) -> str:
    """The text, if it can be written as UTF-8: bytes that could not be read stand in it as lone surrogates."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("not_utf8", f"{where}: character {error.start + 1} is no UTF-8; save the file as UTF-8") from None
    return text


def _names(values: Values) -> str:
    return ", ".join(map(str, values)) or "none"


def _article(role: str) -> str:
    return f"an {role}" if role[0] in "aeio" else f"a {role}"
