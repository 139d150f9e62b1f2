"""A raw row to an example: every shape that people have, and what is said of rows that hold none."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_dist.config import Source, Task
from mistral_dist.data.example import BadRow, Example, Message, Row
from mistral_dist.data.rows import benchmark_texts, read_example
from mistral_dist.data.shapes import FOLLOWS, in_order
from mistral_dist.errors import DataError

SPAM = Task(kind="classification", labels=("spam", "ham"))
CHAT = Task(kind="chat")
TEXT = Task(kind="pretrain")
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "1", "tool_call_id": "c1"}

DEEP = "[" * 100_000 + "]" * 100_000


def source(**fields: object) -> Source:
    return Source.model_validate({"path": "f.jsonl", **fields})


def read(values: dict[str, Any] | bytes, task: Task = CHAT, **fields: object) -> Example:
    return read_example(Row("f.jsonl:3", values), task, source(**fields))


def bad(values: dict[str, Any] | bytes, task: Task = CHAT, **fields: object) -> BadRow:
    with pytest.raises(BadRow) as caught:
        read(values, task, **fields)
    return caught.value


SYSTEM = {"role": "system", "content": "s"}
SHAPES: list[tuple[dict[str, Any], list[Message]]] = [
    ({"messages": [SYSTEM, U, A, U, A]}, [SYSTEM, U, A, U, A]),
    (
        {"messages": [U, {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        [U, {**A, "content": "ab"}],
    ),
    ({"messages": [U, {**A, "weight": 0}, U, {**A, "weight": 1}]}, [U, {**A, "train": False}, U, A]),
    ({"messages": [U, {**A, "train": False}, U, {**A, "train": True}]}, [U, {**A, "train": False}, U, A]),
    ({"messages": [U, {**A, "weight": 0.0}, U, {**A, "weight": 1.0}]}, [U, {**A, "train": False}, U, A]),
    ({"messages": [U, {**A, "train": None, "weight": None, "tool_calls": None}]}, [U, A]),
    ({"messages": [U, A, U]}, [U, A]),
    ({"system": "s", "messages": [U, A]}, [SYSTEM, U, A]),
    ({"system": None, "messages": [SYSTEM, U, A]}, [SYSTEM, U, A]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [U, A]),
    ({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [SYSTEM, U, A]),
    (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [U, {**CALLING, "tool_calls": [{"type": "function", "function": CALL["function"]}]}, {"role": "tool", "content": "1"}, A],
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}', "weight": 0},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a", "train": True},
            ]
        },
        [
            U,
            {**CALLING, "tool_calls": [{"type": "function", "function": CALL["function"]}], "train": False},
            {"role": "tool", "content": "1"},
            A,
        ],
    ),
    ({"instruction": "i", "input": "", "output": "a"}, [{**U, "content": "i"}, A]),
    ({"instruction": "i", "input": None, "output": "a", "system": None, "history": None, "tools": None}, [{**U, "content": "i"}, A]),
    ({"messages": None, "conversations": None, "instruction": "i", "output": "a"}, [{**U, "content": "i"}, A]),
    ({"instruction": None, "output": "x", "prompt": "q", "completion": "a"}, [U, A]),
    ({"instruction": "i", "input": "x", "output": "a"}, [{**U, "content": "i\n\nx"}, A]),
    ({"instruction": "i", "output": "a", "system": "s", "history": [["q", "a"]]}, [SYSTEM, U, A, {**U, "content": "i"}, A]),
    ({"prompt": "q", "completion": "a"}, [U, A]),
    ({"prompt": [SYSTEM, U], "completion": [A]}, [SYSTEM, U, A]),
    ({"prompt": "q", "completion": "a", "system": "s"}, [SYSTEM, U, A]),
    ({"prompt": [U, A, U, {**A, "train": True}, U], "completion": "a"}, [U, {**A, "train": False}, U, {**A, "train": False}, U, A]),
    ({"prompt": [U], "completion": [A, U, A]}, [U, A, U, A]),
    ({"messages": [U, CALLING, RESULT, A]}, [U, CALLING, RESULT, A]),
]


@pytest.mark.parametrize(("row", "turns"), SHAPES)
def test_every_shape_becomes_turns(row: dict[str, Any], turns: list[Message]) -> None:
    assert list(read(row).messages) == turns
    assert list(read(json.dumps(row).encode()).messages) == turns


def test_arguments_that_are_an_object_become_their_json() -> None:
    called = {"function": {"name": "f", "arguments": {"x": "ä"}}}
    example = read({"messages": [U, {"role": "assistant", "content": None, "tool_calls": [called]}, RESULT, A]})
    assert example.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": '{"x": "ä"}'}}]


def test_a_call_without_arguments_has_none() -> None:
    for function in ({"name": "f"}, {"name": "f", "arguments": None}):
        example = read({"messages": [U, {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}, RESULT, A]})
        assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize("written", [[{"name": "f"}], '[{"name": "f"}]', [{"type": "function", "function": {"name": "f"}}]])
def test_tools_are_wrapped_and_may_be_a_json_text(written: object) -> None:
    assert read({"messages": [U, A], "tools": written}).tools == ({"type": "function", "function": {"name": "f"}},)


def test_text_and_label() -> None:
    example = read({"text": "t", "label": "ham"}, SPAM)
    assert (example.text, example.label, example.place, example.messages) == ("t", "ham", "f.jsonl:3", ())
    assert read({"text": "t", "label": 1}, Task(kind="classification", labels=("0", "1"))).label == "1"
    assert read({"text": "t"}, TEXT).text == "t"


def test_columns_are_mapped() -> None:
    row = {"review": "t", "stars": "ham", "author": "x"}
    example = read(row, SPAM, columns={"text": "review", "label": "stars"}, group="author")
    assert (example.text, example.label, example.group) == ("t", "ham", "x")


@pytest.mark.parametrize(("value", "group"), [("x", "x"), (7, "7"), (0, "0"), (None, ""), ("", "")])
def test_a_group_is_its_value_whatever_the_source(value: object, group: str) -> None:
    row = Row("f:1", {"text": "t", "author": value})
    assert {read_example(row, TEXT, source(group="author"), index).group for index in (0, 2)} == {group}
    assert read({"text": "t"}, TEXT, group="author").group == ""


@pytest.mark.parametrize("value", [True, 1.5, ["x"], {"x": 1}])
def test_a_group_of_another_type_is_refused(value: object) -> None:
    found = bad({"text": "t", "author": value}, TEXT, group="author")
    assert found.reason == "bad_group"
    assert "'author'" in found.because and repr(value) in found.because


def test_a_shape_that_was_asked_for_is_taken() -> None:
    both = {"instruction": "i", "output": "o", "messages": [U, A]}
    assert read(both).messages[0]["content"] == "q"
    assert read(both, format="alpaca").messages[0]["content"] == "i"


@pytest.mark.parametrize(
    ("values", "task", "reason", "words"),
    [
        (b'{"text": "a', TEXT, "not_json", ["character"]),
        (b"[1, 2]", TEXT, "not_an_object", ["list"]),
        (b'{"text": "\xff"}', TEXT, "not_utf8", ["byte 11"]),
        (b'{"text": "\\ud800"}', TEXT, "not_utf8", ["character 1"]),
        (b"[" * 100_000, TEXT, "not_json", []),
        ({"text": "a\udcff"}, TEXT, "not_utf8", ["character 2"]),
        ({"text": "a", None: ["b"]}, TEXT, "wrong_cells", ["more cells"]),
        ({"text": None, "label": "ham"}, SPAM, "no_text", ["'text' is empty", "remove the row"]),
        ({"txt": "hi", "label": "ham"}, SPAM, "no_text", ["no column 'text'", "columns found: txt, label", "data.sources.columns"]),
        ({"label": "ham", "txt": None}, SPAM, "no_text", ["columns found: label, txt (empty)"]),
        ({"text": 3, "label": "ham"}, SPAM, "no_text", ["must be a text", "3"]),
        ({"text": "hi"}, SPAM, "no_label", ["no label", "spam, ham"]),
        ({"text": "hi", "label": None}, SPAM, "no_label", ["the label is empty"]),
        ({"text": "hi", "label": ""}, SPAM, "no_label", ["the label is empty"]),
        ({"text": "hi", "label": True}, SPAM, "bad_label", ["must be a text or a whole number", "it is True"]),
        ({"text": "hi", "label": 1.0}, SPAM, "bad_label", ["it is 1.0"]),
        ({"text": "hi", "label": ["ham"]}, SPAM, "bad_label", ["it is ['ham']"]),
        ({"text": "hi", "label": "egg"}, SPAM, "unknown_label", ["'egg'", "task.labels"]),
        ({"text": "hi"}, CHAT, "no_conversation", ["columns text", "prompt and completion"]),
        ({"instruction": "i", "output": None}, CHAT, "no_conversation", ["output (empty)"]),
        ({"messages": []}, CHAT, "no_messages", ["empty", '"role": "user"']),
        ({"messages": "hi"}, CHAT, "no_messages", ["list of turns", "'hi'"]),
        ({"conversations": 3}, CHAT, "no_conversations", ["list of turns", "3", '"from": "human"']),
        ({"messages": [{"role": "human", "content": "hi"}]}, CHAT, "bad_turn", ["turn 1", "human"]),
        ({"messages": [U, {"role": "assistant", "content": 3}]}, CHAT, "bad_turn", ["turn 2", "must be a text"]),
        ({"messages": [U, {**A, "weight": 0.5}]}, CHAT, "bad_turn", ["weight=0.5"]),
        ({"messages": [U, {**A, "weight": False}]}, CHAT, "bad_turn", ["weight=False"]),
        ({"messages": [U, {**A, "weight": [0]}]}, CHAT, "bad_turn", ["weight=[0]"]),
        ({"messages": [U, {**A, "train": 0}]}, CHAT, "bad_turn", ["turn 2", "train=0"]),
        ({"messages": [U, {**A, "train": "false"}]}, CHAT, "bad_turn", ["train='false'"]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": 0}]}, CHAT, "bad_turn", ["train=0"]),
        ({"prompt": [U, {**A, "train": 1}, U], "completion": "a"}, CHAT, "bad_turn", ["train=1"]),
        ({"prompt": [U, A, U], "completion": [3]}, CHAT, "bad_turn", ["turn 4"]),
        ({"messages": [U]}, CHAT, "no_answer", ["no answer to learn from"]),
        ({"messages": [U, {**A, "train": False}]}, CHAT, "no_target", ["switched off"]),
        ({"messages": [A, U, A]}, CHAT, "wrong_role_order", ["turn 1 is of the assistant at the beginning"]),
        ({"messages": [U, U, A]}, CHAT, "wrong_role_order", ["turn 2 is of the user after a user turn", "assistant is expected"]),
        ({"messages": [U, A, SYSTEM]}, CHAT, "wrong_role_order", ["turn 3"]),
        ({"messages": [U, CALLING, U, A]}, CHAT, "wrong_role_order", ["tool is expected"]),
        ({"messages": [U, {**A, "content": " \n"}]}, CHAT, "empty_turn", ["turn 2 (assistant)"]),
        ({"messages": [U, {**CALLING, "tool_calls": [{"name": "f"}]}]}, CHAT, "bad_tool_call", ["turn 2"]),
        ({"messages": [U, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, CHAT, "bad_tool_call", ["no JSON"]),
        ({"messages": [U, {**CALLING, "tool_calls": {"function": {"name": "f"}}}]}, CHAT, "bad_tool_call", ["is a list"]),
        ({"messages": [U, {**CALLING, "tool_calls": [{**CALL, "id": {"a": 1}}]}]}, CHAT, "bad_turn", ["id must be a text"]),
        ({"messages": [U, CALLING, {**RESULT, "name": ["f"]}, A]}, CHAT, "bad_turn", ["turn 3", "name must be a text"]),
        ({"messages": [U, A], "tools": "x"}, CHAT, "bad_tools", ["tools"]),
        ({"messages": [U, A], "tools": DEEP}, CHAT, "bad_tools", []),
        ({"messages": [U, A], "tools": {"name": "f"}}, CHAT, "bad_tools", ["list of objects"]),
        ({"messages": [U, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}]}, CHAT, "bad_tool_call", []),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": DEEP}]}, CHAT, "bad_tool_call", []),
        ({"instruction": "i", "output": "o", "input": {"a": 1}}, CHAT, "bad_input", ["'input'", "{'a': 1}"]),
        ({"instruction": "i", "output": "o", "input": 0}, CHAT, "bad_input", []),
        ({"instruction": "i", "output": "o", "system": ["s"]}, CHAT, "bad_system", ["'system'"]),
        ({"prompt": "i", "completion": "o", "system": 3}, CHAT, "bad_system", []),
        ({"system": False, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, CHAT, "bad_system", []),
        ({"instruction": "i", "output": "o", "history": 3}, CHAT, "bad_history", ["found 3"]),
        ({"instruction": "i", "output": "o", "history": "ab"}, CHAT, "bad_history", ["found 'ab'"]),
        ({"instruction": "i", "output": "o", "history": ["ab"]}, CHAT, "bad_history", ["found 'ab'"]),
        ({"conversations": [{"from": "alien", "value": "x"}]}, CHAT, "bad_turn", ["turn 1", "human"]),
        ({"prompt": "q", "completion": 1}, CHAT, "no_completion", ["'completion'"]),
    ],
)  # fmt: skip
def test_what_is_no_example_says_why(values: dict[str, Any] | bytes, task: Task, reason: str, words: list[str]) -> None:
    found = bad(values, task)
    assert found.reason == reason
    for word in words:
        assert word in found.because


def test_a_mapped_column_that_is_not_there_is_named_with_those_that_are() -> None:
    found = bad({"txt": "t"}, TEXT, columns={"text": "body"})
    assert found.reason == "no_column"
    assert "'body'" in found.because
    assert "there are txt" in found.because


def test_a_mapped_column_that_is_null_is_empty_not_missing() -> None:
    assert bad({"body": None}, TEXT, columns={"text": "body"}).reason == "no_text"
    example = read({"instruction": "i", "output": "o", "ctx": None}, CHAT, columns={"input": "ctx"})
    assert example.messages[0]["content"] == "i"


LONE = "a\ud800"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, A], "more": LONE},
        {"messages": [U, A], LONE: 1},
        {"messages": [U, A], "meta": {"deep": [{LONE: 1}]}},
        {"messages": [{**U, "content": LONE}, A]},
        {"messages": [U, A], "tools": [{"name": "f", "description": LONE}]},
        {"messages": [U, A], "tools": json.dumps([{"name": "f", "description": LONE}])},
        {"messages": [U, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": {"x": LONE}}}]}]},
        {"messages": [U, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": json.dumps({LONE: 1})}}]}]},
        {"messages": [U, CALLING, {**RESULT, "tool_call_id": LONE}, A]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps({"name": LONE})}]},
    ],
)
def test_a_lone_surrogate_is_no_utf8_wherever_it_stands(row: dict[str, Any]) -> None:
    for payload in (row, json.dumps(row).encode(), json.dumps(row).replace("ud800", "uDBFF").encode()):
        found = bad(payload)
        assert found.reason == "not_utf8"
        assert "character 2" in found.because
        found.because.encode()


def test_escapes_that_spell_no_lone_surrogate_are_text() -> None:
    assert read(b'{"text": "\\ud83d\\ude00 \\\\ud800"}', TEXT).text == "\U0001f600 \\ud800"


@given(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=8))
def test_an_order_is_right_or_its_first_fault_is_named(roles: list[str]) -> None:
    turns = [{"role": role, "content": "x"} for role in roles]
    before = ["", *roles]
    faults = [n for n, role in enumerate(roles, 1) if role not in FOLLOWS[before[n - 1]]]
    if faults:
        with pytest.raises(BadRow, match=f"turn {faults[0]} is of the {roles[faults[0] - 1]}"):
            in_order(turns)
    else:
        assert list(in_order(turns)) == turns


def test_a_benchmark_may_have_any_columns() -> None:
    row = Row("b:1", b'{"question": "q", "choices": ["x", "y"], "n": 1, "meta": {"source": "s"}}')
    assert benchmark_texts(row) == ["q", "x", "y", "s"]
    with pytest.raises(DataError, match=r"data.benchmarks: b:2: .*mend"):
        benchmark_texts(Row("b:2", b"{"))
    deep: dict[str, Any] = {"text": "x"}
    for _ in range(10_000):
        deep = {"more": deep}
    with pytest.raises(DataError, match=r"data.benchmarks: b:3: nested too deep"):
        benchmark_texts(Row("b:3", deep))
