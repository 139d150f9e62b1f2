"""The columns of a row -> turns: the shapes of conversations that people have, and what a turn may hold.

    messages           {"messages": [{"role", "content", ...}], "tools": [...]}         OpenAI's, Hugging Face's, Mistral's
    sharegpt           {"conversations": [{"from": "human", "value": ...}, ...]}
    alpaca             {"instruction", "input", "output", "system", "history"}
    prompt_completion  {"prompt", "completion"}, each a text or a list of messages

A column that is null (Parquet has such, and so has a CSV row that is too short) counts as absent where it is optional. What
fits no shape is a BadRow, which says what was found.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mistral_dist.data.example import BadRow, Message

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


def shape_of(values: Values) -> str:
    """Which of the shapes of conversations a row has, told from its columns. Raises BadRow where it has none."""
    there = {column for column, value in values.items() if value is not None}
    if isinstance(values.get("messages"), list):
        return "messages"
    if isinstance(values.get("conversations"), list):
        return "sharegpt"
    if {"instruction", "output"} <= there:
        return "alpaca"
    if {"prompt", "completion"} <= there:
        return "prompt_completion"
    # of a wrong type, and nothing else fits: the shape says what it should be
    if "messages" in there:
        return "messages"
    if "conversations" in there:
        return "sharegpt"
    known = "messages; conversations; instruction and output; prompt and completion"
    raise BadRow("no_conversation", f"columns {column_names(values)}, none of: {known}; map yours with data.sources.columns")


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


def tools_of(values: Values) -> tuple[dict[str, Any], ...]:
    """The tools that a row offers. Raises BadRow for what is no list of objects."""
    tools = values.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = _loaded(tools, "the column 'tools'") or []
        except ValueError:
            tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("bad_tools", f"tools is a list of objects, or the JSON text of one; found {values['tools']!r:.80}")
    return tuple(tool if tool.get("function") is not None else {"type": "function", "function": tool} for tool in tools)


# cells


def text_cell(values: Values, column: str) -> str:
    """The text of a column that must be there. Raises BadRow of the reason no_<column> where it is not."""
    value = values.get(column)
    if isinstance(value, str):
        return value
    if value is None and column in values:
        raise BadRow(f"no_{column}", f"column {column!r} is empty (null); fill it or remove the row")
    remedy = f"columns found: {column_names(values)}; map yours with data.sources.columns: {{{column}: YOURS}}"
    wrong = f"column {column!r} must be a text, it is {value!r:.60}" if column in values else f"no column {column!r}"
    raise BadRow(f"no_{column}", f"{wrong}; {remedy}")


def column_names(values: Values) -> str:
    """The columns of a row, for messages; those that are null are marked."""
    return ", ".join(f"{name} (empty)" if value is None else str(name) for name, value in values.items()) or "none"


def refuse_surrogates(value: Any, where: str) -> None:
    """Raise BadRow for a text or a key, however deep, that cannot be written as UTF-8.

    Bytes that could not be read stand in a text as lone surrogates, and JSON can spell them; no tokenizer takes one.
    """
    waiting = [value]  # no recursion: a row may be nested as deep as JSON is read
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            if not part.isascii():
                _refuse_surrogate(part, where)
        elif isinstance(part, dict):
            waiting += part.keys()
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part


def _refuse_surrogate(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("not_utf8", f"{where}: character {error.start + 1} is no UTF-8; save the file as UTF-8") from None


def _optional_text(values: Values, column: str) -> str:
    """The text of a column that may be missing or null; blanks are no text."""
    value = values.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"bad_{column}", f"column {column!r} must be a text or empty, it is {value!r:.60}; mend it or remove it")
    return value if value.strip() else ""


def _system(values: Values) -> list[Message]:
    """The system turn that a column of its own holds, if any."""
    text = _optional_text(values, "system")
    return [{"role": "system", "content": text}] if text else []


def _listed(values: Values, column: str, like: str) -> list[Any]:
    """The turns of a column, at least one."""
    turns = values.get(column)
    if isinstance(turns, list) and turns:
        return turns
    found = "it is empty" if turns is None or turns == [] else f"it is {turns!r:.60}"
    raise BadRow(
        f"no_{column}", f"column {column!r} must be a list of turns, {found}; a row looks like {{{json.dumps(column)}: [{like}, ...]}}"
    )


# the shapes of conversations


def _of_messages(values: Values) -> list[Message]:
    turns = _system(values)
    return turns + _turns(values, "messages", len(turns))


def _turns(values: Values, column: str, before: int = 0) -> list[Message]:
    """The turns of a column; `before`: how many came before them, for their numbers."""
    turns = _listed(values, column, '{"role": "user", "content": ...}')
    return [_message(turn, number) for number, turn in enumerate(turns, before + 1)]


def _of_sharegpt(values: Values) -> list[Message]:
    turns = _system(values)
    for number, turn in enumerate(_listed(values, "conversations", '{"from": "human", "value": ...}'), 1):
        role = SHAREGPT.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise BadRow("bad_turn", f"turn {number} needs from ({', '.join(SHAREGPT)}) and value (text); found {turn!r:.80}")
        said: Message = {"role": role, "content": turn["value"], "train": turn.get("train"), "weight": turn.get("weight")}
        if turn["from"] == "function_call":
            said |= {"content": "", "tool_calls": _calls_of_text(turn["value"], number)}
        turns.append(_message(said, number))
    return turns


def _of_alpaca(values: Values) -> list[Message]:
    asked, given = text_cell(values, "instruction"), _optional_text(values, "input")
    turns = _system(values)
    history = values.get("history")
    for pair in [] if history is None else history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadRow("bad_history", f"history is a list of [question, answer]; found {pair!r:.80}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{asked}\n\n{given}" if given else asked
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": text_cell(values, "output")}]


def _of_prompt_completion(values: Values) -> list[Message]:
    """The answers in a prompt are context: the completion is what is to be learned."""
    turns = _system(values)
    if isinstance(values.get("prompt"), list):
        turns += [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in _turns(values, "prompt", len(turns))]
    else:
        turns.append({"role": "user", "content": text_cell(values, "prompt")})
    if isinstance(values.get("completion"), list):
        return turns + _turns(values, "completion", len(turns))
    return [*turns, {"role": "assistant", "content": text_cell(values, "completion")}]


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
            message["tool_calls"] = _calls(turn["tool_calls"], number)
        if _is_context(turn, number):
            message["train"] = False
    if turn["role"] == "tool":
        message |= {name: _name(turn[name], name, number) for name in ("tool_call_id", "name") if turn.get(name)}
    return message


def _content(turn: dict[str, Any], number: int) -> str:
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow("bad_turn", f"the content of turn {number} ({turn['role']}) must be a text; found {content!r:.80}")
    return content


def _is_context(turn: dict[str, Any], number: int) -> bool:
    """Whether the turn is context only: `train: false`, or `weight: 0` as OpenAI and Mistral write it."""
    train, weight = turn.get("train"), turn.get("weight")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    # 0 equals False, and True equals 1: the types decide
    if not (train is None or isinstance(train, bool)) or not (weight is None or (is_number and weight in (0, 1))):
        found = f"train={train!r:.40}, weight={weight!r:.40}"
        raise BadRow("bad_turn", f"turn {number}: train is true or false, weight 1 or 0 (or left out); found {found}")
    return train is False or weight == 0


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise BadRow("bad_tool_call", f"turn {number}: tool_calls is a list; found {calls!r:.80}")
    return [_call(call, number) for call in calls]


def _call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("bad_tool_call", f'turn {number}: a tool call looks like {{"function": {{"name", "arguments"}}}}; found {call!r:.80}')
    arguments = function.get("arguments")
    try:
        if isinstance(arguments, str):
            _loaded(arguments, f"turn {number}, the arguments of {function['name']}")
        else:
            arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):
        because = f"turn {number}: the arguments of {function['name']} are no JSON: {arguments!r:.80}"
        raise BadRow("bad_tool_call", because) from None
    named = {"id": _name(call["id"], "id", number)} if call.get("id") else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _calls_of_text(text: str, number: int) -> list[dict[str, Any]]:
    """ShareGPT writes calls as JSON: {"name", "arguments"}, or a list of them."""
    try:
        found = _loaded(text, f"turn {number}")
    except ValueError:
        raise BadRow("bad_tool_call", f"turn {number}: a function_call is JSON with name and arguments; found {text!r:.80}") from None
    return [{"function": call} for call in (found if isinstance(found, list) else [found])]


def _name(value: Any, what: str, number: int) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("bad_turn", f"turn {number}: {what} must be a text or a whole number; found {value!r:.80}")
    return str(value)


def _loaded(text: str, where: str) -> Any:
    """What a JSON text in a cell holds. Raises ValueError for no JSON, BadRow for a lone surrogate that it spells."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    refuse_surrogates(value, where)
    return value


def _article(role: str) -> str:
    return f"an {role}" if role[0] in "aeio" else f"a {role}"
