"""Examples -> examples worth training on: text repaired, HTML turned to text, what is too short or too long left out.

Each example by itself; what takes two to see (duplicates, contamination, conflicting labels) is in duplicates.py.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace

import ftfy

from mistral_dist.config import Data
from mistral_dist.data.example import Example, Rejected

REPAIR = ftfy.TextFixerConfig(
    uncurl_quotes=False, unescape_html=False, fix_latin_ligatures=False, fix_character_width=False, normalization="NFC"
)
"""Mend mojibake and control characters. Quotes, ligatures, full-width letters and `&lt;` may be what the author meant."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
BLOCKS = "address,article,blockquote,br,dd,div,dl,dt,figcaption,footer,h1,h2,h3,h4,h5,h6,header,hr,li,main,nav,ol,p,pre,section,table,tr,ul"
"""HTML elements that begin a line of their own."""
BREAK = "\x1e"
"""Marks where a line ends. Control characters were taken out before; one that an entity spells (`&#30;`) ends a line, too."""
KEPT = str.maketrans("\n \t\xa0", "\x01\x02\x03\x02")
"""White space of preformatted text -> marks that outlive the joining of blanks."""
SHOWN = str.maketrans("\x01\x02\x03", "\n \t")
"""The marks -> what they stand for."""


def tidy(example: Example, data: Data) -> tuple[Example, list[str]]:
    """The example with its texts repaired, and what was changed. Raises Rejected where too little or too much is left."""
    _refuse_too_long(example, data.max_characters)
    changes: list[str] = []
    mend = _mender(data.html, changes)
    messages = tuple({**turn, "content": mend(turn["content"])} for turn in example.messages)
    mended = replace(example, text=mend(example.text), messages=messages)
    size = characters(mended)
    if size < max(1, data.min_characters):
        raise Rejected("too_short", f"{size} characters, data.min_characters is {max(1, data.min_characters)}")
    _refuse_emptied(mended)
    return mended, sorted(set(changes))


def characters(example: Example) -> int:
    """The length of an example's texts, in characters."""
    return len(example.text) + sum(len(turn["content"]) for turn in example.messages)


def repair(text: str) -> str:
    """Mend encoding, Unicode and white space: NFC, no control characters, no trailing blanks, two empty lines at most."""
    return repair_white_space(repair_encoding(text))


def repair_encoding(text: str) -> str:
    """Mojibake, control characters and decomposed letters mended."""
    if text.isascii() and not CONTROL.search(text):
        return text  # most texts, and there is nothing that could be wrong: 20 us saved
    text = ftfy.fix_text(text.replace("\x00", ""), REPAIR)
    return unicodedata.normalize("NFC", text)


def repair_white_space(text: str) -> str:
    """No blanks at the ends of lines, two empty lines at most (code has two between functions), none at beginning and end."""
    if "\n" in text:
        text = "\n".join(line.rstrip() for line in text.split("\n"))
        if "\n\n\n\n" in text:
            text = re.sub(r"\n{4,}", "\n\n\n", text)
    return text.strip()


def html_to_text(text: str) -> str:
    """What a reader of an HTML page sees: a line for each block; preformatted text with its own lines and indentation."""
    from selectolax.lexbor import LexborHTMLParser

    page = LexborHTMLParser(text)
    for node in page.css("script,style,template,noscript,head>title"):
        node.decompose()
    for node in page.css(BLOCKS):
        node.insert_before(BREAK)
        node.insert_after(BREAK)
    for node in reversed(page.css("pre")):  # one within another comes first, since its text is replaced
        node.replace_with((node.text() or "").strip("\n").translate(KEPT))
    body = page.body
    shown = body.text() if body is not None else ""
    lines = (" ".join(line.split()) for line in shown.split(BREAK))
    return "\n".join(line for line in (line.translate(SHOWN).removesuffix("\n") for line in lines) if line.strip())


def _mender(html: bool, changes: list[str]) -> Callable[[str], str]:
    """A function that mends a text and notes what it changed."""
    steps = [("encoding", repair_encoding), ("white_space", repair_white_space)]
    if html:
        steps[1:1] = [("html", html_to_text), ("encoding", repair_encoding)]  # entities bring control characters back

    def mend(text: str) -> str:
        for name, step in steps:
            mended = step(text)
            if mended != text:
                changes.append(name)
                text = mended
        return text

    return mend


def _refuse_too_long(example: Example, most: int) -> None:
    size = characters(example)
    if size > most:
        raise Rejected("too_many_characters", f"{size:,} characters, data.max_characters is {most:,}")


def _refuse_emptied(example: Example) -> None:
    """A turn may have been nothing but blanks or markup."""
    for number, turn in enumerate(example.messages, 1):
        if not turn["content"] and not turn.get("tool_calls") and turn["role"] != "tool":
            raise Rejected("empty_turn", f"nothing is left of turn {number} ({turn['role']})")
