"""An example -> token ids and targets. The chat template lives here and nowhere else.

Training, evaluation and chat all go through `Encoder`, so that what is trained is what is asked. The targets of a
conversation are the assistant's turns, each with the token that ends it; of a plain text, every token but the first.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mistral_dist.config import Task
from mistral_dist.data.clean import Example, Message
from mistral_dist.errors import DataError, ModelError


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example, and the positions (ascending, never 0) of those that the loss counts."""

    ids: list[int]
    targets: list[int]

    def __post_init__(self) -> None:
        assert all(0 < position < len(self.ids) for position in self.targets)


@dataclass(frozen=True, slots=True)
class Candidates:
    """A classification prompt, and for each label the token ids that would answer it, stop token included."""

    prompt: list[int]
    answers: list[list[int]]


class Encoder:
    """Encodes the examples of one task with one tokenizer."""

    def __init__(self, tokenizer: Any, task: Task) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has no end token (eos), so nothing would teach the model to stop")
        if task.kind != "pretrain" and not tokenizer.chat_template:
            raise ModelError(f"{tokenizer.name_or_path}: no chat template; take the instruct model, or task.kind: pretrain")
        self.tokenizer = tokenizer
        self.task = task
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._keeps_system = task.kind == "pretrain" or self._template_keeps_system()

    @property
    def fingerprint(self) -> str:
        """Changes when anything changes that the ids depend on: tokenizer, template, task."""
        parts = [
            self.tokenizer.backend_tokenizer.to_str(),
            self.tokenizer.chat_template or "",
            json.dumps(self.task.model_dump(mode="json"), sort_keys=True),
        ]
        return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()[:16]

    def encode(self, example: Example) -> Encoded:
        """Token ids and targets. Raises DataError, with the example's place, where there is no target."""
        if self.task.kind == "pretrain":
            return self._encode_text(example)
        return self._encode_turns(self.conversation(example), example.place)

    def control_token_in(self, example: Example) -> str | None:
        """The first control token that stands in an example's text: it would end a turn or begin one, not be text."""
        for text in (example.text, *(message["content"] for message in example.messages)):
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

    def prompt(self, turns: Sequence[Message]) -> list[int]:
        """Token ids up to where the assistant begins to answer. Raises DataError for a control token in a turn."""
        token = self.control_token_in(Example("the conversation", messages=tuple(turns)))
        if token is not None:
            raise DataError(f"the conversation holds {token!r}, which the model reads as a control token; take it out")
        return self._render(self._with_system(list(turns)), "the conversation", answer_follows=True)

    def candidates(self, text: str) -> Candidates:
        """The prompt for a text, and each label as the answer to it."""
        question = self.question(text)
        prompt, answers = self.prompt(question), []
        for label in self.task.labels:
            encoded = self._encode_turns(self._with_system([*question, {"role": "assistant", "content": label}]), "task.labels")
            answers.append([encoded.ids[position] for position in encoded.targets])
        return Candidates(prompt, answers)

    def _with_system(self, turns: list[Message]) -> list[Message]:
        if self.task.system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.task.system}, *turns]
        if turns[0]["role"] != "system" or self._keeps_system or len(turns) < 2:
            return turns
        system, first, *rest = turns
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def _template_keeps_system(self) -> bool:
        """Whether a system turn stays where it is when an answer follows.

        It does not in templates that have no such turn, and in those that show it with the last turn only, as some of
        Mistral's; there the system's text goes into the first user turn.
        """
        asked = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
        try:
            before = self._render(asked, "a probe", answer_follows=True)
            through = self._render([*asked, {"role": "assistant", "content": "A"}], "a probe")
            return through[: len(before)] == before != self._render(asked[1:], "a probe", answer_follows=True)
        except DataError:
            return False

    def _encode_text(self, example: Example) -> Encoded:
        begin = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        end = [self.tokenizer.eos_token_id] if example.ends else []
        ids = [*begin, *self.tokenizer.encode(example.text, add_special_tokens=False), *end]
        if len(ids) < 2:
            raise DataError(f"{example.place}: no target token (the text is empty); remove the row")
        return Encoded(ids, list(range(1, len(ids))))

    def _encode_turns(self, turns: list[Message], place: str) -> Encoded:
        ids = self._render(turns, place)
        targets: list[int] = []
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                targets += self._answer_span(ids, turns, index, place)
        if not targets:
            raise DataError(f"{place}: no target token (no assistant turn); add an answer or remove the row")
        # what follows the last target (ChatML's line feed) is never attended to by a target
        return Encoded(ids[: targets[-1] + 1], targets)

    def _answer_span(self, ids: list[int], turns: list[Message], index: int, place: str) -> range:
        """Positions of one assistant turn in `ids`: from its first token through the token that ends it."""
        before = self._render(turns[:index], place, answer_follows=True)
        through = self._render(turns[: index + 1], place)
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise DataError(
                f"{place}: turn {index + 1} is tokenized differently with what follows it, so its targets cannot be told;"
                " the chat template must only append"
            )
        end = len(through) - 1
        while end >= len(before) and ids[end] != self.tokenizer.eos_token_id:
            end -= 1
        if end < len(before):
            name = self.tokenizer.name_or_path
            raise ModelError(
                f"{name}: the chat template ends no answer with {self.tokenizer.eos_token!r}; the model would never learn to stop"
            )
        return range(len(before), end + 1)

    def _render(self, turns: Sequence[Message], place: str, answer_follows: bool = False) -> list[int]:
        try:
            return list(
                self.tokenizer.apply_chat_template(list(turns), tokenize=True, return_dict=False, add_generation_prompt=answer_follows)
            )
        except Exception as error:  # a template raises what it likes: jinja's own errors, or raise_exception("...")
            roles = " ".join(turn["role"] for turn in turns)
            raise DataError(f"{place}: the chat template refuses these turns ({roles}): {error}") from error
