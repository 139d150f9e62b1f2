"""Examples as the model sees them: every token's text, and which tokens the loss counts; in the terminal or as a page.

Nothing is summed up or cut away: control tokens stand where they are, and white space that a reader would miss (at the edges
of a part, doubled, or anything but a blank) has a sign of its own.
"""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from rich.text import Text

from mistral_dist.config import Recipe
from mistral_dist.data import sources
from mistral_dist.data.cleaner import Cleaner
from mistral_dist.data.encode import Encoded, Encoder
from mistral_dist.data.example import BadRow, Example, Rejected, from_record
from mistral_dist.data.prepared import open_prepared, read_manifest
from mistral_dist.data.split import TRAIN
from mistral_dist.errors import DataError

SIGNS = {"\n": "↵\n", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\u3000": "□", "\u200b": "⟨ZWSP⟩", "\u200d": "\u200d", "\ufeff": "⟨BOM⟩"}
"""What is shown for white space that looks like a blank or like nothing. A zero-width joiner stays: it makes emoji."""
HIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u2028-\u202e\u2066-\u2069]")
"""Control and direction characters: they would change how the rest is shown."""
TARGET, SPECIAL, CONTEXT = "bold green", "magenta", "default"


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens of one kind, as text."""

    text: str
    target: bool
    """Whether the loss counts them."""
    special: bool
    """Whether they are control tokens."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An example, ready to be shown."""

    title: str
    spans: tuple[Span, ...]


def pages_of(recipe: Recipe, encoder: Encoder, count: int, split: str = "train") -> list[Shown]:
    """The first examples of a split of the prepared data; where there are none yet, what the first rows would become.

    Of a stream, what the first rows become, always. Raises DataError where the split is empty or not made yet, and where the
    data were prepared with another recipe.
    """
    if (recipe.data.streaming and split == TRAIN) or read_manifest(recipe.data_dir) is None:
        return _of_rows(recipe, encoder, count, split)
    return [shown(example, encoder, split) for example in examples_of(recipe, encoder, count, split)]


def examples_of(recipe: Recipe, encoder: Encoder, count: int, split: str) -> list[Example]:
    """The first examples of a split of the prepared data. Raises DataError, naming the command, where there are none."""
    records = open_prepared(recipe, encoder).split(split)
    if not len(records):
        raise DataError(f"{recipe.data_dir}: its {split} split is empty; choose another with --split")
    return [from_record(records[n]) for n in range(min(count, len(records)))]


def _of_rows(recipe: Recipe, encoder: Encoder, count: int, split: str) -> list[Shown]:
    """The first rows of each source, read and cleaned as `prepare` does it; of those that are divided later, for train."""
    own = [(index, source) for index, source in enumerate(recipe.data.sources) if (source.into or TRAIN) == split]
    if not own:
        raise DataError(f"{recipe.data_dir}: not prepared yet, and no source has `into: {split}`; run `mistral-dist prepare` first")
    cleaner = Cleaner.of(recipe, encoder)
    each = -(-count // len(own))
    rows = [(index, row) for index, source in own for row in islice(sources.read(source), each)]
    state = "streamed" if recipe.data.streaming else "not prepared yet"
    pages: list[Shown] = []
    for (_, row), found in zip(rows, cleaner.documents(rows), strict=True):
        if isinstance(found, Rejected):
            pages.append(Shown(f"{row.place} · left out: {found}", ()))
        else:
            pages += [shown(piece.example, encoder, state) for piece in found.pieces]
    return pages[:count]


def shown(example: Example, encoder: Encoder, split: str) -> Shown:
    """An example's spans under a line that says where it stands and how much of it is learned."""
    try:
        encoded = encoder.encode(example)
    except BadRow as bad:
        return Shown(f"{example.place} · {split} · not trained on: {bad}", ())
    title = f"{example.place} · {split} · {len(encoded.ids)} tokens, {len(encoded.targets)} targets"
    return Shown(title, spans_of(encoded, encoder))


def spans_of(encoded: Encoded, encoder: Encoder) -> tuple[Span, ...]:
    """The tokens as text, in runs of one kind: within a run bytes are joined first, since a character may be several tokens."""
    targets, special = set(encoded.targets.tolist()), encoder.special_ids
    kinds = [(place in targets, id in special, encoder.bytes_of(id)) for place, id in enumerate(encoded.ids.tolist())]
    runs = groupby(kinds, key=lambda kind: kind[:2])
    return tuple(Span(b"".join(part for *_, part in run).decode(errors="replace"), *kind) for kind, run in runs)


def visible(text: str) -> str:
    """The text with signs for white space and control characters that would not be seen."""
    text = re.sub(r"^ | (?=\s)|(?<=\s) | $", "·", text)
    text = HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
    return "".join(SIGNS.get(letter, letter) for letter in text)


def as_text(spans: Iterable[Span]) -> str:
    """Plain text: ⟦what the loss counts⟧ stands in brackets that no text is likely to have."""
    runs = ((target, "".join(visible(span.text) for span in run)) for target, run in groupby(spans, key=lambda span: span.target))
    return "".join(f"⟦{text}⟧" if target else text for target, text in runs)


def as_plain(pages: Sequence[Shown]) -> str:
    """Where there are no colours: what the loss counts stands in brackets."""
    return "\n\n".join(f"== {page.title} ==\n{as_text(page.spans)}".rstrip() for page in pages) + "\n\n⟦learned⟧"


def as_terminal(pages: Sequence[Shown]) -> Text:
    """Coloured text: targets green, control tokens magenta (targets among them underlined)."""
    made = Text()
    for page in pages:
        made.append(page.title + "\n", style="bold reverse")
        for span in page.spans:
            style = (
                f"{SPECIAL} underline" if span.special and span.target else SPECIAL if span.special else TARGET if span.target else CONTEXT
            )
            made.append(visible(span.text), style=style)
        made.append("\n\n")
    made.append("learned", style=TARGET)
    made.append(" · ")
    made.append("control token", style=SPECIAL)
    made.append(" · ")
    made.append("learned control token", style=f"{SPECIAL} underline")
    return made


def as_html(pages: Sequence[Shown], name: str) -> str:
    """One page of its own: no script, no network, light or dark as the reader's screen is, for narrow screens too."""
    articles = "\n".join(_article(page) for page in pages)
    title = html.escape(f"{name}: as the model sees it")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p><mark>learned</mark> <b>control token</b> <mark><b>learned control token</b></mark> context</p>
{articles}
</body>
</html>
"""


def _article(page: Shown) -> str:
    body = "".join(_span(span) for span in page.spans)
    text = f'<pre dir="auto">{body}</pre>\n' if body else ""
    return f"<article>\n<h2>{html.escape(page.title)}</h2>\n{text}</article>"


def _span(span: Span) -> str:
    text = html.escape(visible(span.text))
    text = f"<b>{text}</b>" if span.special else text
    return f"<mark>{text}</mark>" if span.target else text


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1f; --line: #d5d5dc; --learned: #d9f2dc; --on: #0b4a1a; --control: #7a1f8f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16161a; --ink: #e6e6ea; --line: #3a3a44; --learned: #153d20; --on: #b8f0c4; --control: #e39bf5; }
}
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; overflow-wrap: anywhere; }
h2 { font-size: .875rem; overflow-wrap: anywhere; margin: 0; padding: .5rem .75rem; }
article { border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0; }
pre { margin: 0; padding: .75rem; border-top: 1px solid var(--line); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .875rem/1.6 ui-monospace, monospace; }
mark { background: var(--learned); color: var(--on); border-radius: .15rem; }
b { color: var(--control); font-weight: 600; }
"""
