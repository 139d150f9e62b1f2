"""An example -> token ids and targets.

Training, evaluation and chat all go through `Encoder`, so that what is trained is what is asked. The targets of a
conversation are the assistant's turns, each with the token that ends it; of a plain text, every token but the first. How a
conversation becomes tokens is the business of its format: the tokenizer's chat template, or Mistral's own library.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mistral_dist.config import Model, Recipe, Task
from mistral_dist.data.chat_format import ChatFormat, Conversation, Rendered, TemplateFormat, as_served
from mistral_dist.data.example import BadRow, Example, Message, canonical
from mistral_dist.data.mistral_format import MistralFormat, tokenizer_file
from mistral_dist.data.pieces import Pieces
from mistral_dist.errors import DataError, ModelError
from mistral_dist.hub import load_tokenizer, local_path

MOVED = "answer_moved"
"""The reason of a BadRow that `Encoder.unrolled` mends: the format moves things, so no single row of ids serves all answers."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Token ids of one example, and the positions (ascending, never 0) of those that the loss counts."""

    ids: np.ndarray
    """int32 [tokens]"""
    targets: np.ndarray
    """int64 [targets]"""
    weight: float
    """How much each of its targets counts in the loss."""

    def __init__(self, ids: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray, weight: float = 1.0) -> None:
        object.__setattr__(self, "ids", np.asarray(ids, dtype=np.int32))
        object.__setattr__(self, "targets", np.asarray(targets, dtype=np.int64))
        object.__setattr__(self, "weight", weight)
        found = self.targets
        assert not found.size or (found[0] > 0 and found[-1] < self.ids.size and (found[1:] > found[:-1]).all())


@dataclass(frozen=True, slots=True)
class Candidates:
    """A classification prompt, and for each label the token ids that would answer it, stop token included."""

    prompt: list[int]
    answers: list[list[int]]


class Encoder:
    """Encodes the examples of one task with one tokenizer."""

    def __init__(self, tokenizer: Any, task: Task, chat_format: ChatFormat | None = None) -> None:
        """Without a format: the tokenizer's own template. Raises ModelError for a tokenizer that cannot teach to answer."""
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has no end token (eos), so nothing would teach the model to stop")
        self.tokenizer = tokenizer
        self.task = task
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a tokenizer.json may bring either along
        self._backend.no_padding()
        self._format = chat_format or (None if task.kind == "pretrain" else TemplateFormat(tokenizer))
        self._pieces = self._format or Pieces(tokenizer)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self._format.control_tokens) if self._format else set()
        self._control = re.compile("|".join(map(re.escape, sorted(special, key=lambda token: (-len(token), token)))) or r"(?!)")

    @property
    def mistral_file(self) -> Path | None:
        """Mistral's own tokenizer, where conversations are encoded with it."""
        return self._format.file if isinstance(self._format, MistralFormat) else None

    @property
    def calls_tools(self) -> bool:
        """Whether conversations are encoded with a tokenizer of Mistral's own that has tokens for tool calls."""
        return isinstance(self._format, MistralFormat) and self._format.knows_tools

    @property
    def keeps_system(self) -> bool:
        """Whether a client sends a system turn as one; else its text stands before the first user turn, and a blank line between."""
        return not isinstance(self._format, TemplateFormat) or self._format.keeps_system

    @property
    def begins_with(self) -> str:
        """Of a plain text: the token that training put before it, where the tokenizer by itself would not; else nothing."""
        begin = self._begin()
        added = self.task.kind != "pretrain" or self.tokenizer.encode("a")[: len(begin)] == begin
        return "" if added else str(self.tokenizer.bos_token)

    @property
    def fingerprint(self) -> str:
        """Changes when anything changes that the ids depend on: tokenizer, format, task."""
        parts = [
            self._backend.to_str(),
            self._format.identity if self._format else "",
            json.dumps(self.task.model_dump(mode="json", exclude={"class_weights"}), sort_keys=True),
        ]
        return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()[:16]

    def encode(self, example: Example) -> Encoded:
        """Token ids and targets. Raises BadRow for an example that cannot be trained on."""
        (encoded,) = self.encode_batch([example])
        if isinstance(encoded, BadRow):
            raise encoded
        return encoded

    def encode_batch(self, examples: Sequence[Example]) -> list[Encoded | BadRow]:
        """Each example's token ids and targets, or why it has none; many at once take a fraction of the time of each alone."""
        if self._format is None:
            return self._encode_texts(examples)
        conversations = [self._asking(example) for example in examples]
        rendered = self._format.render(conversations)
        return [
            _encoded(one, conversation.asked, len(conversation.turns) - 1)
            for one, conversation in zip(rendered, conversations, strict=True)
        ]

    def unrolled(self, example: Example) -> list[Example]:
        """The example itself, or, where the format moves things, several, in which each answer is a target exactly once.

        Some formats show the system's text or the tools with the last question only: of a long conversation, only the last
        answer then stands behind the prompt that a server would have shown. Each such answer gets a conversation that ends
        with it; in it, answers that another one trains are context (`train: false`). Raises BadRow where even that fails.
        To save time, call this only for the examples that `encode_batch` returns a BadRow of the reason MOVED for.
        """
        if self.task.kind in ("pretrain", "classification"):
            return [example]
        wanted = _answers(example.messages)
        if not wanted or wanted == [len(example.messages) - 1]:
            return [example]
        pieces: list[Example] = []
        source = example
        while wanted:
            reached = self._reached(replace(source, messages=_trained(source.messages, wanted)))
            if reached == wanted and source is example:
                return [example]
            if not reached and len(source.messages) == wanted[-1] + 1:
                raise _unreachable(wanted[-1])
            if reached:
                pieces.append(replace(source, messages=_trained(source.messages, reached)))
                wanted = [turn for turn in wanted if turn not in reached]
            source = replace(example, messages=example.messages[: wanted[-1] + 1]) if wanted else source
        return pieces[::-1]

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of control tokens."""
        if self._format is not None:
            return self._format.special_ids
        return frozenset(id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    def bytes_of(self, id: int) -> bytes:
        """What a token writes, in UTF-8; of a control token, its name. A character may be several tokens."""
        return self._pieces.bytes_of(id)

    def control_token_in(self, example: Example) -> str | None:
        """The first control token that stands in an example's text: it would end a turn or begin one, not be text."""
        for text in _texts(example):
            found = self._control.search(text)
            if found:
                return found[0]
        return None

    def conversation(self, example: Example) -> list[Message]:
        """The turns that the model sees: the example's own, or the classification prompt and its label."""
        if self.task.kind == "classification":
            turns = [*self.question(example.text), {"role": "assistant", "content": example.label}]
        else:
            turns = list(example.messages)
        return self._with_system(turns)

    def question(self, text: str) -> list[Message]:
        """The classification prompt for a text."""
        # str.replace, not str.format: prompts and texts may hold braces
        prompt = self.task.prompt.replace("{labels}", ", ".join(self.task.labels)).replace("{text}", text)
        return [{"role": "user", "content": prompt}]

    def prompt(self, turns: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Token ids up to where the assistant begins to answer (pretrain: up to where the last turn's text goes on).

        Raises DataError for a control token in a turn, or for turns that the format refuses.
        """
        token = self.control_token_in(Example("the conversation", messages=tuple(turns), tools=tuple(tools)))
        if token is not None:
            raise DataError(f"the conversation holds {token!r}, which the model reads as a control token; take it out")
        if self._format is None:
            return [*self._begin(), *self.tokenizer.encode(turns[-1]["content"], add_special_tokens=False)]
        try:
            return self._format.prompt(Conversation(self._with_system(list(turns)), tools))
        except BadRow as bad:
            raise DataError(f"the conversation: {bad.because}") from bad

    def candidates(self, text: str) -> Candidates:
        """The prompt for a text, and each label as the answer to it."""
        prompt, answers = self.prompt(self.question(text)), []
        for label, encoded in zip(
            self.task.labels, self.encode_batch([Example("", text=text, label=label) for label in self.task.labels]), strict=True
        ):
            if isinstance(encoded, BadRow):
                raise DataError(f"task.labels: {label}: {encoded.because}")
            answers.append(encoded.ids[encoded.targets].tolist())
        return Candidates(prompt, answers)

    def _with_system(self, turns: list[Message]) -> list[Message]:
        if self.task.system is not None and turns[0]["role"] != "system":
            return [{"role": "system", "content": self.task.system}, *turns]
        return turns

    def _asking(self, example: Example) -> Conversation:
        turns = self.conversation(example)
        return Conversation(turns, example.tools, _answers(turns))

    def _reached(self, example: Example) -> list[int]:
        """The answers of an example that its own ids can train, as its turns. Raises BadRow."""
        conversation = self._asking(example)
        assert self._format is not None
        (rendered,) = self._format.render([conversation])
        if isinstance(rendered, BadRow):
            raise rendered
        added = len(conversation.turns) - len(example.messages)
        return [turn - added for turn in conversation.asked if turn in rendered.answers]

    def _begin(self) -> list[int]:
        return [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []

    def _encode_texts(self, examples: Sequence[Example]) -> list[Encoded | BadRow]:
        begin, end = self._begin(), [self.tokenizer.eos_token_id]
        found: list[Encoded | BadRow] = []
        texts = self._backend.encode_batch([example.text for example in examples], add_special_tokens=False)
        for example, text in zip(examples, texts, strict=True):
            ids = [*begin, *text.ids, *(end if example.ends else [])]
            no_target = BadRow("no_target", "no target token (the text is empty); remove the row")
            found.append(Encoded(ids, np.arange(1, len(ids))) if len(ids) > 1 else no_target)
        return found


def load_encoder(recipe: Recipe) -> Encoder:
    """The encoder of a recipe, from the base's files on this machine. Raises ModelError, with the remedy."""
    tokenizer = load_tokenizer(recipe.model)
    file = None if recipe.task.kind == "pretrain" else _mistral_file(recipe.model)
    if file is None:
        return Encoder(tokenizer, recipe.task)
    chat_format = MistralFormat(file)
    chat_format.refuse_other_vocabulary(tokenizer)
    return Encoder(tokenizer, recipe.task, chat_format)


def _mistral_file(model: Model) -> Path | None:
    """The file that Mistral's own format needs, or None where the recipe or the base wants the template."""
    if model.chat_format == "template":
        return None
    folder = local_path(model)
    # a fine-tune keeps a bare tokenizer.model, whatever turns it was taught; only Mistral's own are known to keep to the format
    plain = model.chat_format == "mistral" or model.name.startswith("mistralai/Mistral-7B-")
    file = tokenizer_file(folder, plain=plain)
    if file is None and model.chat_format == "mistral":
        wanted = "tekken.json, tokenizer.model.v3 or tokenizer.model"
        raise ModelError(f"{folder}: model.chat_format=mistral needs {wanted}; run `mistral-dist fetch` again, or take template")
    return file


def _encoded(rendered: Rendered | BadRow, asked: Sequence[int], last: int) -> Encoded | BadRow:
    """Ids through the last target: what follows it (ChatML's line feed) is never attended to by a target."""
    if isinstance(rendered, BadRow):
        return rendered
    if not asked:
        return BadRow("no_target", "no target token (no assistant turn to learn from); add an answer or remove the row")
    if len(rendered.answers) < len(asked):
        lost = next(turn for turn in asked if turn not in rendered.answers)
        alone = len(asked) == 1 and lost == last
        return _unreachable(lost) if alone else BadRow(MOVED, f"turn {lost + 1}: what follows it changes the prompt before it; unroll")
    spans = [rendered.answers[turn] for turn in asked]
    targets = np.arange(*spans[0]) if len(spans) == 1 else np.concatenate([np.arange(*span) for span in spans])
    ids = np.asarray(rendered.ids, dtype=np.int32)
    return Encoded(ids[: spans[-1][1]], targets)


def _unreachable(turn: int) -> BadRow:
    because = f"turn {turn + 1}: the prompt that a server would show before this answer does not begin the conversation through it"
    return BadRow("tokenized_differently", because)


def _answers(turns: Sequence[Message]) -> list[int]:
    """The turns that are to be learned."""
    return [place for place, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("train", True)]


def _trained(turns: Sequence[Message], wanted: Iterable[int]) -> tuple[Message, ...]:
    """The turns with all answers but the wanted ones as context."""
    chosen = set(wanted)
    return tuple(
        {**turn, "train": False} if turn["role"] == "assistant" and turn.get("train", True) and place not in chosen else turn
        for place, turn in enumerate(turns)
    )


def _texts(example: Example) -> Iterator[str]:
    """Everything in an example that its author wrote."""
    yield example.text
    for turn in example.messages:
        yield turn["content"]
        if len(turn) > 2:
            # the arguments as they will be written: JSON may hide a control token behind \\u003c
            yield from (canonical(as_served(turn).get("tool_calls")), turn.get("tool_call_id") or "", turn.get("name") or "")
    yield canonical(example.tools)
