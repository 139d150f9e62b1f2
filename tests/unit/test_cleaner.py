"""The whole way of a row: whatever it holds, it becomes a document or a reason, and the others go on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mistral_dist.config import Recipe
from mistral_dist.data import cleaner as module
from mistral_dist.data.audit import Audit
from mistral_dist.data.cleaner import Cleaner, Document
from mistral_dist.data.duplicates import Benchmark
from mistral_dist.data.encode import Encoder
from mistral_dist.data.example import BadRow, Example, Rejected, Row
from mistral_dist.errors import DataError
from mistral_dist.hub import load_tokenizer

TASKS: dict[str, dict[str, object]] = {
    "classification": {"kind": "classification", "labels": ["x", "1"]},
    "chat": {"kind": "chat"},
    "pretrain": {"kind": "pretrain"},
}


def recipe(folder: Path, model: Path, kind: str, **data: object) -> Recipe:
    content = {
        "version": 1,
        "task": TASKS[kind],
        "data": {"sources": [{"path": "a.jsonl", "group": "group"}, {"path": "b.jsonl"}], "max_length": 64, **data},
        "model": {"name": "test/small", "path": str(model)},
        "train": {"steps": 3},
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return Recipe.load(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def cleaners(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cleaner]:
    made = {}
    for kind in TASKS:
        loaded = recipe(tmp_path_factory.mktemp(kind), small_model, kind, html=kind == "pretrain")
        made[kind] = Cleaner(loaded, Encoder(load_tokenizer(loaded.model), loaded.task), Benchmark([]))
    return made


# any row

WORDS = (
    *("text", "label", "group", "messages", "conversations", "instruction", "input", "output", "system", "history", "prompt"),
    *("completion", "tools", "role", "content", "from", "value", "train", "weight", "tool_calls", "tool_call_id", "name"),
    *("function", "arguments", "id"),
)
SAID = ("user", "assistant", "tool", "human", "gpt", "function_call", "x", "1", "", "<pre>&#1;", "\ud800", '{"name": "f"}', '"\\ud800"')
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(SAID)
KEYS = st.sampled_from(WORDS) | st.text(max_size=3)


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(values, max_size=3) | st.dictionaries(KEYS, values, max_size=4)


ANY = st.recursive(LEAVES, some, max_leaves=8)
CALLS = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": ANY, "arguments": ANY})}, optional={"id": ANY}), max_size=2
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.sampled_from(["q", "a"]) | ANY},
    optional={"train": ANY, "weight": ANY, "tool_calls": CALLS | ANY, "name": ANY},
)
ASKED = st.fixed_dictionaries({"role": st.just("user"), "content": st.text(min_size=1, max_size=8)}, optional={"name": ANY})
ANSWER = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.text(min_size=1, max_size=8)},
    optional={"train": st.booleans(), "weight": st.sampled_from([0, 1.0]), "tool_calls": st.none() | CALLS, "name": ANY},
)
EXCHANGES = st.lists(st.tuples(ASKED, ANSWER), min_size=1, max_size=2).map(lambda pairs: [turn for pair in pairs for turn in pair])
TOOLS = st.lists(st.dictionaries(KEYS, ANY, max_size=3), max_size=2)
ROWS = (
    st.fixed_dictionaries({"messages": EXCHANGES}, optional={"tools": TOOLS, "group": st.integers()})
    | st.dictionaries(KEYS, ANY, max_size=5)
    | st.fixed_dictionaries({"messages": st.lists(TURN | ANY, max_size=4)}, optional={"tools": ANY, "group": ANY})
    | st.fixed_dictionaries({"prompt": st.lists(TURN, max_size=3) | ANY, "completion": ANY}, optional={"system": ANY})
    | st.fixed_dictionaries({"instruction": ANY, "output": ANY}, optional={"input": ANY, "system": ANY, "history": ANY})
    | st.fixed_dictionaries({"text": st.text() | ANY, "label": st.sampled_from(["x", 1]) | ANY}, optional={"group": ANY})
)


def payloads(values: Any) -> "list[bytes | dict[str, Any]]":
    """As a line of JSON, and, where it is an object, as columns."""
    return [json.dumps(values).encode(), *([values] if isinstance(values, dict) else [])]


@pytest.mark.parametrize("kind", TASKS)
@given(values=st.lists(ROWS | ANY, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_row_becomes_a_document_or_a_reason(cleaners: dict[str, Cleaner], kind: str, values: list[Any]) -> None:
    rows = [(n % 2, Row(f"f:{n}", payload)) for n, payload in enumerate(payload for one in values for payload in payloads(one))]
    found = cleaners[kind].documents(rows)
    assert len(found) == len(rows)
    for one in found:
        if isinstance(one, Rejected):
            one.because.encode()
            assert "\n" not in one.reason
        else:
            json.dumps(one.example.content, ensure_ascii=False).encode()
            assert one.pieces


@pytest.mark.parametrize("depth", [100, 400, 800, 900, 950, 1000, 10_000])
@pytest.mark.parametrize("kind", TASKS)
def test_a_row_may_be_nested_however_deep(cleaners: dict[str, Cleaner], kind: str, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    said = (
        '"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": %s}], "text": "t", "label": "x"'
    )
    calls = f'[{{"function": {{"name": "f", "arguments": {{"a": {deep}}}}}}}]'
    lines = [
        f'{{{said % "null"}, "tools": [{{"name": "f", "a": {deep}}}]}}',
        f"{{{said % calls}}}",
        f'{{"text": {deep}, "messages": {deep}}}',
    ]
    found = cleaners[kind].documents([(1, Row(f"b:{n}", line.encode())) for n, line in enumerate(lines)])
    assert len(found) == len(lines)


# the last net


def texts(*said: str) -> list[tuple[int, Row]]:
    return [(1, Row(f"b.jsonl:{n}", {"text": text})) for n, text in enumerate(said, 1)]


def outcome(found: Sequence[Document | Rejected]) -> list[str]:
    return [one.reason if isinstance(one, Rejected) else one.example.text for one in found]


@pytest.mark.parametrize("step", ["tidy", "fit"])
def test_what_nobody_foresaw_in_a_row_stops_no_other(cleaners: dict[str, Cleaner], step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: Any = getattr(module, step)

    def fails(given: Any, *others: Any) -> Any:
        for example in [given] if isinstance(given, Example) else given:
            if example.text == "two":
                raise ValueError("a\nsurprise \udcff")
        return done(given, *others)

    monkeypatch.setattr(module, step, fails)
    found = cleaners["pretrain"].documents(texts("one", "two", "three"))
    assert outcome(found) == ["one", "unreadable", "three"]
    bad = found[1]
    assert isinstance(bad, BadRow)
    assert bad.because == "ValueError: a surprise \\udcff"
    assert bad.text == "two"


def test_a_value_that_is_no_json_is_unreadable(cleaners: dict[str, Cleaner]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (found,) = cleaners["chat"].documents([(1, Row("b:1", {"messages": turns, "tools": [{"name": "f", "since": {1, 2}}]}))])
    assert isinstance(found, BadRow)
    assert (found.reason, found.because.partition(":")[0]) == ("unreadable", "TypeError")


def test_what_the_recipe_wants_to_stop_at_stops(cleaners: dict[str, Cleaner], small_model: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, small_model, "classification", overlong="error")
    strict = Cleaner(loaded, cleaners["classification"].encoder, Benchmark([]))
    with pytest.raises(DataError, match=r"b.jsonl:1: .* tokens"):
        strict.documents([(1, Row("b.jsonl:1", {"text": "long " * 100, "label": "x"}))])


def test_a_cleaner_reads_the_benchmarks_of_its_recipe(cleaners: dict[str, Cleaner], small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.jsonl").write_text('{"question": "What is the answer to all of this?"}\n')
    loaded = recipe(tmp_path, small_model, "pretrain", benchmarks=[{"path": str(tmp_path / "bench.jsonl")}])
    found = Cleaner.of(loaded, cleaners["pretrain"].encoder).documents(texts("What is the answer to all of this?", "another"))
    assert outcome(found) == ["in_benchmark", "another"]


def test_a_quarantine_takes_names_that_are_no_utf8(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "quarantine.jsonl")
    entry = {"place": "caf\udce9.jsonl:1", "source": 0, "reason": "not_json", "because": "x", "text": "", "bad": True}
    audit.drop(entry)
    audit.close()
    assert json.loads((tmp_path / "quarantine.jsonl").read_bytes()) == entry
