"""What a preview shows: whole characters, every control token, white space that can be seen; in every format, to the letter.

The golden files are what each format makes of each example: ⟦targets⟧ in brackets. To write them anew, after having read
why they changed: MISTRAL_DIST_GOLDEN=write pytest tests/unit/test_preview.py
"""

import html.parser
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from mistral_dist.config import Recipe, Task
from mistral_dist.data.encode import Encoder, load_encoder
from mistral_dist.data.example import BadRow, Example
from mistral_dist.data.mistral_format import MistralFormat
from mistral_dist.data.prepare import prepare
from mistral_dist.errors import DataError
from mistral_dist.preview import Shown, Span, as_html, as_terminal, as_text, examples_of, pages_of, shown, spans_of, visible
from tests.unit.test_mistral_format import CALLED, DATA, FILES, ODD, RESULT, SYSTEM, WEATHER, FakeTokenizer, assistant, user

GOLDEN = Path(__file__).parent.parent / "golden"
CLASSES = Task(kind="classification", labels=("good", "very bad"), prompt="{labels}? {text}", system="Judge.")
CHAT = Task(kind="chat")
EXAMPLES: dict[str, tuple[Task, Example]] = {
    "multi-turn": (CHAT, Example("f:1", messages=(user("Hello"), assistant("Hi."), user("Bye"), assistant("Ciao, 再见")))),
    "system": (CHAT, Example("f:2", messages=(SYSTEM, user("Hello"), assistant("Hi."), user("Bye"), assistant("Ciao")))),
    "tools": (
        CHAT,
        Example("f:3", messages=(user("Sky?"), CALLED, RESULT, assistant("Green."), user("Ta"), assistant("!")), tools=(WEATHER,)),
    ),
    "per-turn off": (CHAT, Example("f:4", messages=(user("One"), assistant("not this", train=False), user("Two"), assistant("this")))),
    "instruct": (Task(kind="instruct", system="Be kind."), Example("f:5", messages=(user("Say it"), assistant("It")))),
    "classification": (CLASSES, Example("f:6", text="A {labels} film", label="very bad")),
    "unicode": (CHAT, Example("f:7", messages=(user("é e\u0301 👩‍👩‍👧 数"), assistant("😀 ŵ 👍🏽 ﷽ \u202eabc")))),
    "white space": (CHAT, Example("f:8", messages=(user(ODD), assistant(ODD.strip() + "\n\n\tx \u3000y")))),
    "pretrain": (Task(kind="pretrain"), Example("f:9", text=" Two  blanks,\nthen 😀.\n")),
}


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_model, mistral_format=False)


def encoder_of(name: str, task: Task, tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, task) if name == "smollm2" else Encoder(FakeTokenizer, task, MistralFormat(DATA / FILES[name]))


@pytest.mark.parametrize("name", ["smollm2", "v1", "v3", "tekken"])
def test_each_format_makes_of_each_example_what_the_golden_file_says(name: str, tokenizer: Any) -> None:
    parts = []
    for title, (task, example) in EXAMPLES.items():
        if task.kind == "pretrain" and name != "smollm2":
            continue  # plain text is the Hugging Face tokenizer's, whatever the format of conversations
        encoder = encoder_of(name, task, tokenizer)
        try:
            pieces = [as_text(spans_of(encoder.encode(piece), encoder)) for piece in encoder.unrolled(example)]
        except BadRow as bad:
            pieces = [f"({bad})"]
        parts += [f"== {title}{f', part {number}' if len(pieces) > 1 else ''} ==\n{piece}\n" for number, piece in enumerate(pieces, 1)]
    made, file = "\n".join(parts), GOLDEN / f"{name}.txt"
    if os.environ.get("MISTRAL_DIST_GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(made, encoding="utf-8")
    assert made == file.read_text(encoding="utf-8")


def test_the_spans_together_are_the_whole_text(tokenizer: Any) -> None:
    turns = EXAMPLES["unicode"][1].messages
    encoder = Encoder(tokenizer, CHAT)
    spans = spans_of(encoder.encode(EXAMPLES["unicode"][1]), encoder)
    whole = tokenizer.apply_chat_template(list(turns), tokenize=False)
    assert "".join(span.text for span in spans) == whole.rstrip("\n")
    assert "".join(span.text for span in spans if span.target) == turns[1]["content"] + "<|im_end|>"
    assert {span.text for span in spans if span.special} == {"<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize("version", ["v1", "v3", "tekken"])
def test_a_character_of_several_tokens_is_shown_whole(version: str) -> None:
    encoder = Encoder(FakeTokenizer, CHAT, MistralFormat(DATA / FILES[version]))
    encoded = encoder.encode(EXAMPLES["unicode"][1])
    said = "".join(span.text for span in spans_of(encoded, encoder) if span.target)
    assert said.strip() == EXAMPLES["unicode"][1].messages[1]["content"] + "</s>"
    alone = [encoder.bytes_of(id) for id in encoded.ids.tolist()]
    assert any("�" in part.decode(errors="replace") for part in alone), "no token here is a part of a character"


def test_white_space_that_a_reader_would_miss_has_a_sign() -> None:
    assert visible("a b") == "a b"
    assert visible(" a  b \n\tc ") == "·a··b·↵\n⇥c·"
    assert visible("a\u00a0b\u202ec\x00") == "a⍽b⟨U+202E⟩c⟨U+0000⟩"


def test_a_text_in_brackets_is_what_is_learned() -> None:
    spans = [Span("<s>", False, True), Span("ask", False, False), Span("said", True, False), Span("</s>", True, True)]
    assert as_text(spans) == "<s>ask⟦said</s>⟧"


def test_the_terminal_colours_what_is_learned_and_keeps_markup_as_text() -> None:
    page = Shown("f:1", (Span("[red]ask[/red]", False, False), Span("said", True, False), Span("</s>", True, True)))
    text = as_terminal([page])
    assert "[red]ask[/red]said</s>" in text.plain
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["said"] == "bold green"
    assert styles["</s>"] == "magenta underline"


class Page(html.parser.HTMLParser):
    """What stands inside of which element."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: dict[str, list[str]] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.links += [name for name, _ in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        for tag in set(self.open):
            self.found.setdefault(tag, []).append(text)


def test_the_page_is_whole_safe_and_needs_nothing() -> None:
    page = Shown("a&b.jsonl:1", (Span("<script>alert(1)</script>", False, False), Span("<b>said", True, False), Span("</s>", True, True)))
    made = as_html([page], "x<y>.yaml")
    read = Page()
    read.feed(made)
    assert read.open == []
    assert read.links == []
    assert "url(" not in made
    assert "script" not in read.found
    assert "".join(read.found["pre"]) == "<script>alert(1)</script><b>said</s>"
    assert "".join(read.found["h2"]) == "a&b.jsonl:1"
    assert "x<y>.yaml" in "".join(read.found["h1"])
    assert "prefers-color-scheme: dark" in made
    assert 'name="viewport"' in made
    assert "overflow-wrap: anywhere" in made


def test_an_example_that_is_not_trained_on_says_why(tokenizer: Any) -> None:
    page = shown(Example("f:1", messages=(user("a"),)), Encoder(tokenizer, CHAT), "train")
    assert page.title.startswith("f:1 · train · not trained on: no_target")
    assert page.spans == ()


def test_prepared_examples_are_shown_with_their_place(write_recipe: Any) -> None:
    recipe = Recipe.load(write_recipe())
    encoder = load_encoder(recipe)
    prepared = prepare(recipe, encoder)
    (first, second) = examples_of(recipe, encoder, 2, "test")
    record = prepared.split("test")[0]
    page = shown(first, encoder, "test")
    assert page.title == f"{record['place']} · test · {record['tokens']} tokens, {record['targets']} targets"
    assert second.place == prepared.split("test")[1]["place"]
    assert len(examples_of(recipe, encoder, 10_000, "train")) == len(prepared.split("train"))
    assert pages_of(recipe, encoder, 2, "test") == [page, shown(second, encoder, "test")]


def test_rows_that_are_not_prepared_are_shown_as_they_would_be(write_recipe: Any, texts: list[dict[str, str]]) -> None:
    recipe = Recipe.load(write_recipe(rows=[texts[0], {"text": "x", "label": "what"}, texts[1]]))
    first, second, third = pages_of(recipe, load_encoder(recipe), 5)
    assert "small.jsonl:1 · not prepared yet · " in first.title
    assert any(span.target and span.text.startswith(texts[0]["label"]) for span in first.spans)
    assert "small.jsonl:2 · left out: unknown_label: label 'what' is not one of numpy" in second.title
    assert "small.jsonl:3 · not prepared yet" in third.title
    assert len(pages_of(recipe, load_encoder(recipe), 2)) == 2
    with pytest.raises(DataError, match="no source has `into: test`; run `mistral-dist prepare` first"):
        pages_of(recipe, load_encoder(recipe), 2, "test")


def test_rows_of_a_split_of_ones_own_and_of_a_stream_are_shown(write_recipe: Any, tmp_path: Path, texts: list[dict[str, str]]) -> None:
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts[:9]))
    sources = [{"path": str(tmp_path / "small.jsonl")}, {"path": str(tmp_path / "own.jsonl"), "into": "test"}]
    recipe = Recipe.load(write_recipe(rows=texts[9:], data={"sources": sources, "streaming": True}, train={"steps": 2}))
    encoder = load_encoder(recipe)
    assert "own.jsonl:1 · " in pages_of(recipe, encoder, 1, "test")[0].title
    prepare(recipe, encoder)
    assert "small.jsonl:1 · streamed · " in pages_of(recipe, encoder, 1, "train")[0].title
    assert "own.jsonl:" in pages_of(recipe, encoder, 1, "test")[0].title


def test_the_command_shows_and_writes(write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from mistral_dist.cli import app

    file = write_recipe()
    recipe = Recipe.load(file)
    prepare(recipe, load_encoder(recipe))
    monkeypatch.setenv("COLUMNS", "200")
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["preview", str(file), "--examples", "2", "--split", "test", "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert page.read_text().count("<article>") == 2
    done = CliRunner().invoke(app, ["preview", str(file), "--examples", "3"])
    assert done.exit_code == 0, done.output
    assert len(re.findall(r"· train · \d+ tokens, \d+ targets", done.output)) == 3
    assert json.loads((recipe.data_dir / "manifest.json").read_text())["examples"]["train"] > 3
