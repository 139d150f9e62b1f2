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
        ("  x  \n\n\n\n\n y \t\n", "x\n\n\n y"),
        ("x\n\n\ny\n\nz", "x\n\n\ny\n\nz"),
        ("x\n \n\t\n \ny", "x\n\n\ny"),
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


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        (
            "<p>Try\nthis:</p><pre><code>\ndef f(x):\n    return x &lt; 1\n\n\n\tpass\n</code></pre>and\n  that",
            "Try this:\ndef f(x):\n    return x < 1\n\n\n\tpass\nand that",
        ),
        ("<pre>\n  a<br>    b<b>c\n d</b></pre>", "  a\n    bc\n d"),
        ("<div>x<pre>a\n<pre>  b\n\n  c</pre> d</pre></div>", "x\na\n  b\n\n  c\n d"),
        ("a<pre> \n </pre>b", "a\nb"),
        ("<pre>a&nbsp;&nbsp;b</pre>", "a  b"),
    ],
)
def test_preformatted_text_keeps_its_lines_and_indentation(page: str, shown: str) -> None:
    assert "\n".join(line.rstrip() for line in html_to_text(page).split("\n")) == shown


def test_control_characters_that_entities_bring_are_taken_out() -> None:
    text, changes = tidy(Example("f:1", "<p>a&#7;b e&#769; &#31; c&#1;d&#30;e</p>"), data(html=True))
    assert not any(character < " " and character != "\n" for character in text.text)
    assert text.text.startswith("ab é")
    assert changes == ["encoding", "html"]


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


def test_what_is_trained_tells_examples_apart_but_not_what_is_nearly_the_same() -> None:
    asked, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    context = {**answer, "train": False}
    first, second = (Example("a", messages=(asked, one, asked, other)) for one, other in ((answer, context), (context, answer)))
    whole = Example("a", messages=(asked, answer, asked, answer))
    assert len({first.id, second.id, whole.id}) == 3
    assert first.gist == second.gist == whole.gist
    assert Example("a", messages=(asked, {**answer, "train": True})).id == Example("a", messages=(asked, answer)).id
