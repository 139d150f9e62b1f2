"""Texts repaired, HTML made readable, and what is too short or too long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_dist.config import Data
from mistral_dist.data.clean import html_to_text, repair, tidy
from mistral_dist.data.example import Example, Rejected


def data(**fields: object) -> Data:
    return Data.model_validate({"sources": [{"path": "x.jsonl"}], **fields})


@pytest.mark.parametrize(
    ("raw", "mended"),
    [
        ("schÃ¶n", "schön"),
        ("a\x00b", "ab"),
        ("e\u0301", "é"),
        ("  x  \n\n\n\n y \t\n", "x\n\n y"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("“quoted”", "“quoted”"),
        ("plain", "plain"),
        ("write &lt; for less-than", "write &lt; for less-than"),
        ("你好，世界！", "你好，世界！"),
        ("a ﬁle", "a ﬁle"),
    ],
)
def test_repair(raw: str, mended: str) -> None:
    assert repair(raw) == mended


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_repair_changes_nothing_the_second_time(text: str) -> None:
    assert repair(repair(text)) == repair(text)


def test_html_is_what_a_reader_sees() -> None:
    page = (
        "<html><head><title>T</title><style>p {}</style></head><body><h1>Head</h1><p>One <b>bold</b>\n word &amp; more.</p>"
        "<ul><li>first</li><li>second</li></ul><script>evil()</script>line<br>break</body></html>"
    )
    assert html_to_text(page) == "Head\nOne bold word & more.\nfirst\nsecond\nline\nbreak"
    assert html_to_text("no markup, 1 < 2") == "no markup, 1 < 2"


def test_what_was_changed_is_told() -> None:
    assert tidy(Example("f:1", "schÃ¶n "), data())[1] == ["encoding", "white_space"]
    assert tidy(Example("f:1", "<p>x</p>"), data(html=True)) == (Example("f:1", "x"), ["html"])
    assert tidy(Example("f:1", "<p>x</p>"), data()) == (Example("f:1", "<p>x</p>"), [])


def test_turns_are_repaired_and_keep_what_else_they_have() -> None:
    turn = {"role": "assistant", "content": " a ", "train": False}
    assert tidy(Example("f:1", messages=(turn,)), data())[0].messages == ({**turn, "content": "a"},)


@pytest.mark.parametrize(
    ("example", "fields", "reason"),
    [
        (Example("f:1", " \x00 "), {}, "too_short"),
        (Example("f:1", "four"), {"min_characters": 5}, "too_short"),
        (Example("f:1", "x" * 10_000_000), {}, "too_many_characters"),
        (Example("f:1", "sixsix"), {"max_characters": 5}, "too_many_characters"),
        (
            Example("f:1", messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "\x00"})),
            {},
            "empty_turn",
        ),
    ],
)
def test_what_is_left_out(example: Example, fields: dict[str, object], reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        tidy(example, data(**fields))
    assert caught.value.reason == reason


def test_an_id_is_of_the_content_alone() -> None:
    assert Example("a:1", "text", "x").id == Example("b:2", "text", "y", source=3).id != Example("a:1", "text2", "x").id
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    other = {**called, "tool_calls": [{"function": {"name": "g", "arguments": "{}"}}]}
    assert Example("a", messages=(called,)).id != Example("a", messages=(other,)).id
    assert Example("a", messages=(called,), tools=({"name": "f"},)).id != Example("a", messages=(called,)).id
