"""Examples -> pieces that fit into a pack, each with its lengths; what cannot fit is left out, shortened or refused.

An example is one piece as a rule. A text (pretrain) longer than a pack is cut into several, which put together are the
text; a conversation whose format moves its earlier turns is unrolled into one piece for each answer it reaches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mistral_dist.config import Data
from mistral_dist.data.encode import MOVED, Encoded, Encoder
from mistral_dist.data.example import Example, Message, Rejected
from mistral_dist.errors import DataError

SPARE = 4
"""Tokens left free when a text is cut: alone, a part may have a token more than it had inside the text."""


@dataclass(frozen=True, slots=True)
class Piece:
    """An example that fits, with its token ids and targets."""

    id: str
    """The document's, with a number where there are several."""
    example: Example
    encoded: Encoded
    shortened: bool = False


def fit(examples: Sequence[Example], encoder: Encoder, data: Data) -> list[list[Piece] | Rejected]:
    """The pieces of each example, or why it has none. Encoded together, which is some three times as fast as one by one.

    Raises DataError for the first that is too long where the recipe says `data.overlong: error`.
    """
    found = zip(examples, encoder.encode_batch(examples), strict=True)
    return [_fitted(example, encoded, encoder, data) for example, encoded in found]


def _fitted(example: Example, encoded: Encoded | Rejected, encoder: Encoder, data: Data) -> list[Piece] | Rejected:
    try:
        token = encoder.control_token_in(example)
        if token is not None:
            raise Rejected("control_token", f"holds {token!r}, which would end a turn or begin one")
        parts = _parts(example, encoded, encoder, data)
    except Rejected as reason:
        return reason
    # the id is of what was read, also where less is left of it: it decides the split
    name = example.id
    if len(parts) == 1:
        return [replace(parts[0], id=name)]
    return [replace(part, id=f"{name}-{number}") for number, part in enumerate(parts, 1)]


def _parts(example: Example, encoded: Encoded | Rejected, encoder: Encoder, data: Data) -> list[Piece]:
    if isinstance(encoded, Rejected):
        if encoded.reason != MOVED:
            raise encoded
        return [piece for part in encoder.unrolled(example) for piece in _parts(part, encoder.encode(part), encoder, data)]
    if len(encoded.ids) <= data.max_length:
        return [Piece("", example, encoded)]
    if encoder.task.kind == "pretrain":
        return list(_cut_up(example, data.max_length, encoder))
    return [_too_long(example, len(encoded.ids), encoder, data)]


def _too_long(example: Example, tokens: int, encoder: Encoder, data: Data) -> Piece:
    if data.overlong == "error":
        remedy = "raise it, shorten the example, or set data.overlong=drop"
        raise DataError(f"{example.place}: {tokens:,} tokens, but data.max_length is {data.max_length:,}; {remedy}")
    shorter = _shortened(example, encoder, data.max_length) if data.overlong == "shorten" else None
    if shorter is None:
        raise Rejected("too_long", f"{tokens:,} tokens, data.max_length is {data.max_length:,}")
    return shorter


# shorten


def _shortened(example: Example, encoder: Encoder, capacity: int) -> Piece | None:
    """The example without its oldest exchanges, then without the end of its question; None where the answer alone is too long."""
    while True:
        encoded = encoder.encode(example)
        excess = len(encoded.ids) - capacity
        if excess <= 0:
            return Piece("", example, encoded, shortened=True)
        newer = _without_oldest_exchange(example.messages)
        if newer is not None and any(turn["role"] == "assistant" and turn.get("train", True) for turn in newer):
            example = replace(example, messages=newer)
            continue
        shorter = _without_end_of_question(example, excess, encoder)
        if shorter is None:
            return None
        example = shorter


def _without_oldest_exchange(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """The turns from the second user turn on, after the system's; None where there is no second."""
    asked = [n for n, turn in enumerate(messages) if turn["role"] == "user"]
    if len(asked) < 2:
        return None
    return (*(turn for turn in messages[:1] if turn["role"] == "system"), *messages[asked[1] :])


def _without_end_of_question(example: Example, excess: int, encoder: Encoder) -> Example | None:
    """The text, or the first user turn, without its last `excess` tokens; None where nothing would be left of it."""
    place = next((n for n, turn in enumerate(example.messages) if turn["role"] == "user"), None)
    question = example.text if place is None else str(example.messages[place]["content"])
    starts = _starts(question, encoder)
    if len(starts) <= excess:
        return None
    kept = question[: starts[len(starts) - excess]].rstrip()
    if not kept or kept == question:
        return None
    if place is None:
        return replace(example, text=kept)
    turns = list(example.messages)
    turns[place] = {**turns[place], "content": kept}
    return replace(example, messages=tuple(turns))


# cut into pieces


def _cut_up(example: Example, capacity: int, encoder: Encoder) -> Iterator[Piece]:
    """Pieces of a text, cut between characters; put together they are the text."""
    texts = list(_cut(example, example.text, capacity, encoder))
    for number, text in enumerate(texts, 1):
        piece = replace(example, place=f"{example.place} part {number}", text=text, ends=number == len(texts))
        yield Piece("", piece, encoder.encode(piece))


def _cut(example: Example, text: str, capacity: int, encoder: Encoder) -> Iterator[str]:
    """Parts of a text of at most `capacity` tokens each, begin and end included, and of about the same length."""
    if len(encoder.encode(replace(example, text=text)).ids) <= capacity:
        yield text
        return
    starts = _starts(text, encoder)
    # one character may be several tokens with the same offset: only where the offset moves is a place to cut
    places = [start for before, start in pairwise(starts) if start > before]
    if not places:
        raise Rejected("too_long", f"data.max_length={capacity} does not hold a single character of it; raise it")
    parts = -(-len(starts) // max(1, capacity - SPARE))
    edges = sorted({0, *(places[len(places) * part // parts] for part in range(1, parts)), len(text)})
    for begin, end in pairwise(edges):
        yield from _cut(example, text[begin:end], capacity, encoder)


def _starts(text: str, encoder: Encoder) -> list[int]:
    """Where each token of a text begins, in characters."""
    spans = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [begin for begin, _ in spans]
