"""Rows to examples: what is repaired, what is dropped and counted, what is refused."""

import pytest

from mistral_dist.config import Data, Task
from mistral_dist.data.clean import Audit, clean, read_example, repair
from mistral_dist.data.example import Example
from mistral_dist.data.sources import Row
from mistral_dist.errors import DataError

SPAM = Task(kind="classification", labels=("spam", "ham"))
CHAT = Task(kind="chat")
PLACE = "f.jsonl:3"


def data(**fields: object) -> Data:
    return Data.model_validate({"sources": [{"path": "x.jsonl"}], **fields})


def cleaned(rows: list[tuple[str, str]], **fields: object) -> tuple[list[Example], Audit]:
    audit = Audit()
    made = (Row(f"f:{n}", {"text": text, "label": label}) for n, (text, label) in enumerate(rows, 1))
    return clean(made, SPAM, data(**fields), audit), audit


@pytest.mark.parametrize(
    ("raw", "mended"),
    [
        ("schÃ¶n", "schön"),
        ("a\x00b", "ab"),
        ("e\u0301", "é"),
        ("  x  \n\n\n\n y \t\n", "x\n\n y"),
        ("“quoted”", "“quoted”"),
        ("plain", "plain"),
        ("write &lt; for less-than", "write &lt; for less-than"),
        ("你好，世界！", "你好，世界！"),
        ("a ﬁle", "a ﬁle"),
    ],
)
def test_repair(raw: str, mended: str) -> None:
    assert repair(raw) == mended


def test_repair_changes_nothing_the_second_time() -> None:
    once = repair("schÃ¶n  \n\n\n\x00 fine")
    assert repair(once) == once


def test_counts_add_up_and_every_drop_has_a_reason() -> None:
    rows = [("buy now", "spam"), ("buy  now", "spam"), ("buy now", "spam"), ("", "ham"), ("hello", "ham"), ("hello", "spam")]
    kept, audit = cleaned(rows, near_duplicates=None)
    assert [example.text for example in kept] == ["buy now", "buy  now"]
    assert audit.dropped == {"duplicate": 1, "too_short": 1, "conflicting_labels": 2}
    assert audit.rows == len(kept) + sum(audit.dropped.values())
    assert [(entry["place"], entry["reason"]) for entry in audit.quarantine] == [
        ("f:4", "too_short"),
        ("f:5", "conflicting_labels"),
        ("f:6", "conflicting_labels"),
        ("f:3", "duplicate"),
    ]


def test_near_duplicates_go_and_the_first_stays() -> None:
    long = "the quick brown fox jumps over the lazy dog and runs away from all the other animals in the wide green wood today"
    rows = [(long, "ham"), (long + " again", "ham"), ("something else entirely, with no word in common", "ham")]
    kept, audit = cleaned(rows, near_duplicates=0.7)
    assert [example.place for example in kept] == ["f:1", "f:3"]
    assert audit.quarantine[0]["because"] == "like f:1"
    assert len(cleaned(rows, near_duplicates=None)[0]) == 3


def test_an_id_is_of_the_content_alone() -> None:
    assert Example("a:1", "text", "x").id == Example("b:2", "text", "y").id != Example("a:1", "text2", "x").id


@pytest.mark.parametrize(
    ("task", "values", "words"),
    [
        (SPAM, {"txt": "hi", "label": "ham"}, ["'text'", "columns found: txt, label", "data.sources.columns"]),
        (SPAM, {"text": 3, "label": "ham"}, ["'text'", "must be a text", "3"]),
        (SPAM, {"text": "hi", "label": None}, ["no label", "spam, ham"]),
        (SPAM, {"text": "hi", "label": "egg"}, ["'egg'", "task.labels"]),
        (CHAT, {"messages": []}, ["no messages"]),
        (CHAT, {"messages": [{"role": "human", "content": "hi"}]}, ["role", "human"]),
        (Task(kind="instruct"), {"prompt": "hi"}, ["'completion'"]),
    ],
)
def test_a_row_that_is_no_example_is_refused_with_its_place(task: Task, values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_example(Row(PLACE, values), task)
    for word in [PLACE, *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("answer", [[], [{"role": "assistant", "content": " \x00 \n"}]])
def test_a_conversation_without_an_answer_is_refused(answer: list[dict[str, str]]) -> None:
    rows = [Row(PLACE, {"messages": [{"role": "user", "content": "hi"}, *answer]})]
    with pytest.raises(DataError, match=r"f.jsonl:3: no answer to learn from"):
        clean(rows, CHAT, data(), Audit())


def test_the_same_place_read_twice_is_a_duplicate() -> None:
    audit = Audit()
    twice = [Row("f:1", {"text": "the very same", "label": "ham"})] * 2
    assert len(clean(twice, SPAM, data(near_duplicates=None), audit)) == 1
    assert audit.dropped == {"duplicate": 1}


def test_instruct_rows_become_conversations() -> None:
    example = read_example(Row(PLACE, {"prompt": "p", "completion": "c"}), Task(kind="instruct"))
    assert example.messages == ({"role": "user", "content": "p"}, {"role": "assistant", "content": "c"})


def test_numeric_labels_are_read_as_text() -> None:
    assert read_example(Row(PLACE, {"text": "t", "label": 1}), Task(kind="classification", labels=("0", "1"))).label == "1"
