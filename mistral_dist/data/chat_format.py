"""A conversation -> token ids, and where in them each answer stands. Two ways: this one, by the tokenizer's chat template,
and mistral_format.py, by Mistral's own library.

The rule of both: an answer may be trained on only where the prompt that a server would show the model before it stands,
token by token, before it in the ids. A format that moves things (the system's text to the last user turn, say) makes that
impossible for all answers at once; such an answer is left out of `answers`, and the Encoder unrolls the conversation.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from mistral_dist.data.example import BadRow, Message
from mistral_dist.data.pieces import Pieces
from mistral_dist.errors import ModelError

ANCHOR = 32
"""How far before an answer a special token is looked for. ChatML's stands 3 tokens before it."""
REMEMBERED = 1000
"""Beginnings of answers whose ids are kept; a template writes one or two."""

Anchor = tuple[int, int, int]
"""A special token of a conversation: its place in the ids, its begin and end in the text."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is to become tokens."""

    turns: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()
    asked: Sequence[int] = ()
    """The turns, ascending, whose places in the ids are asked for; all are the assistant's."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of a conversation, and [begin, end) of each answer that was asked for and that a server's prompt leads to."""

    ids: list[int]
    answers: dict[int, tuple[int, int]]


class ChatFormat(Protocol):
    """How a conversation becomes tokens."""

    @property
    def control_tokens(self) -> Sequence[str]:
        """Texts that a model reads as control tokens."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of those."""

    @property
    def identity(self) -> str:
        """Changes when the ids may change."""

    def bytes_of(self, id: int) -> bytes:
        """What a token writes: a part of a text in UTF-8, perhaps of one character; of a control token, its name."""

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the assistant begins to answer. Raises BadRow."""

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | BadRow]:
        """Ids and answers of each conversation, or why it has none."""


class TemplateFormat:
    """The tokenizer's own jinja template, as transformers' `apply_chat_template` and the servers that use it apply it."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises ModelError where there is no template, or where its answers do not end with the end token."""
        if not tokenizer.chat_template:
            raise ModelError(f"{tokenizer.name_or_path}: no chat template; take the instruct model, or task.kind: pretrain")
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._eos: int = tokenizer.eos_token_id
        special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control_tokens: Sequence[str] = tuple(special.values())
        self.special_ids = frozenset(special)
        self._control = re.compile("|".join(map(re.escape, sorted(self.control_tokens, key=len, reverse=True))) or r"(?!)")
        self._pieces = Pieces(tokenizer)
        self._known: dict[str, list[int]] = {}
        self.keeps_system = self._template_keeps_system()
        """Else a system turn's text stands before the first user turn, and a blank line between."""
        self._refuse_endless()

    @property
    def identity(self) -> str:
        """Changes when the ids may change."""
        return f"template\x1f{self._tokenizer.chat_template}"

    def bytes_of(self, id: int) -> bytes:
        """What a token writes, in UTF-8."""
        return self._pieces.bytes_of(id)

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the assistant begins to answer. Raises BadRow."""
        (text,) = self._texts([self._seen(conversation.turns)], conversation.tools, answer_follows=True)
        if isinstance(text, BadRow):
            raise text
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | BadRow]:
        """Ids and answers of each conversation, or why it has none; those with the same tools in one pass."""
        found: list[Rendered | BadRow | None] = [None] * len(conversations)
        calling = {n for n, conversation in enumerate(conversations) if _calls(conversation)}
        if calling and not self._shows_tools:
            found = [_without_tools() if n in calling else None for n in range(len(conversations))]
        with_tools = [n for n, one in enumerate(conversations) if one.tools and found[n] is None]
        plain = [n for n, one in enumerate(conversations) if not one.tools and found[n] is None]
        for group in [plain, *([n] for n in with_tools)]:
            if group:
                for n, rendered in zip(group, self._render([conversations[n] for n in group]), strict=True):
                    found[n] = rendered
        return [rendered for rendered in found if rendered is not None]

    def _render(self, conversations: Sequence[Conversation]) -> list[Rendered | BadRow]:
        tools = conversations[0].tools
        seen = [self._seen(conversation.turns) for conversation in conversations]
        moved = [len(turns) - len(conversation.turns) for turns, conversation in zip(seen, conversations, strict=True)]
        # an answer's turn has another number where the system turn went into the first user turn
        places = [[turn + by for turn in one.asked] for one, by in zip(conversations, moved, strict=True)]
        wholes = self._texts(seen, tools)
        prompts = iter(self._texts([seen[n][:turn] for n, turns in enumerate(places) for turn in turns], tools, answer_follows=True))
        throughs = iter(
            self._texts([seen[n][: turn + 1] for n, turns in enumerate(places) for turn in turns if turn + 1 < len(seen[n])], tools)
        )
        texts = [text for text in wholes if isinstance(text, str)]
        # without offsets, which took a fifth of the time
        encodings = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        found: list[Rendered | BadRow] = []
        for whole, turns, one, place in zip(wholes, seen, conversations, places, strict=True):
            parts = [(next(prompts), next(throughs) if turn + 1 < len(turns) else whole) for turn in place]
            if isinstance(whole, BadRow):
                found.append(whole)
                continue
            found.append(self._located(whole, next(encodings).ids, dict(zip(one.asked, parts, strict=True))))
        return found

    def _located(self, whole: str, ids: list[int], parts: dict[int, tuple[str | BadRow, str | BadRow]]) -> Rendered | BadRow:
        """Where the answers stand: `parts` has for each the text of its prompt, and that of the conversation through it."""
        answers = {}
        special = [place for place, is_special in enumerate(map(self.special_ids.__contains__, ids)) if is_special]
        named = [match.span() for match in self._control.finditer(whole)]
        anchors = [(place, *span) for place, span in zip(special, named, strict=True)] if len(special) == len(named) else []
        for turn, (prompt, through) in parts.items():
            if isinstance(prompt, BadRow):
                return prompt
            if isinstance(through, BadRow):
                return through
            if not (whole.startswith(prompt) and whole.startswith(through)):
                continue
            begin = self._anchored(ids, prompt, anchors)
            begin = self._begin(whole, ids, prompt) if begin is None else begin
            if begin is None:
                because = f"turn {turn + 1}: the prompt before it is tokenized differently with the answer behind it; change how it begins"
                return BadRow("tokenized_differently", because)
            end = self._end(ids, begin)
            if end is None or not self._ends_in(through, whole, end, anchors):
                token = self._tokenizer.eos_token
                return BadRow("no_stop_token", f"turn {turn + 1}: the chat template does not end this answer with {token!r}")
            answers[turn] = (begin, end)
        return Rendered(ids, answers)

    def _anchored(self, ids: list[int], prompt: str, anchors: Sequence[Anchor]) -> int | None:
        """How many tokens the prompt has, told by its last special token; None where that does not tell it.

        Special tokens cut a text into parts that are tokenized on their own. The n-th in the text is the n-th in the ids, so
        what is behind the prompt's last one decides: alone it must have the tokens that it has here.
        """
        last = _last_within(prompt, anchors)
        if last is None:
            return None
        place, begin, _ = last
        head = self._alone(prompt[begin:])
        return place + len(head) if head and ids[place : place + len(head)] == head else None

    def _begin(self, whole: str, ids: list[int], prompt: str) -> int | None:
        """How many tokens the prompt has, if alone it has the same ones; else None. By offsets, for what has no such anchor."""
        encoding = self._backend.encode(whole, add_special_tokens=False)
        token = encoding.char_to_token(len(prompt))
        if token is not None:
            for anchor in range(token - 1, max(-1, token - 1 - ANCHOR), -1):
                if ids[anchor] in self.special_ids:
                    head = prompt[encoding.token_to_chars(anchor)[0] :]
                    if ids[anchor:token] == self._alone(head):
                        return int(token)
                    break
        alone = self._backend.encode(prompt, add_special_tokens=False).ids
        return len(alone) if len(alone) < len(ids) and ids[: len(alone)] == alone else None

    def _ends_in(self, through: str, whole: str, end: int, anchors: Sequence[Anchor]) -> bool:
        """Whether the stop token before `end` belongs to the text through the answer, not to what follows it."""
        if through == whole:
            return True
        last = _last_within(through, anchors)
        if last is not None:
            return end - 1 <= last[0]
        encoding = self._backend.encode(whole, add_special_tokens=False)
        return bool(encoding.token_to_chars(end - 1)[1] <= len(through))

    def _end(self, ids: list[int], begin: int) -> int | None:
        try:
            return ids.index(self._eos, begin) + 1
        except ValueError:
            return None

    def _alone(self, head: str) -> list[int]:
        ids = self._known.get(head)
        if ids is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            ids = self._known[head] = list(self._backend.encode(head, add_special_tokens=False).ids)
        return ids

    def _seen(self, turns: Sequence[Message]) -> list[Message]:
        """The turns as a server hands them to the template."""
        turns = [as_served(turn) if len(turn) > 2 else turn for turn in turns]
        if self.keeps_system or [turn["role"] for turn in turns[:2]] != ["system", "user"]:
            return turns
        system, first, *rest = turns
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def _texts(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[dict[str, Any]], answer_follows: bool = False
    ) -> list[str | BadRow]:
        try:
            return list(self._apply(conversations, tools, answer_follows))
        except Exception:  # a template raises what it likes; one conversation's fault is not the others'
            pass
        texts: list[str | BadRow] = []
        for turns in conversations:
            try:
                texts += self._apply([turns], tools, answer_follows)
            except Exception as error:  # jinja's own errors, or raise_exception("...")
                roles = " ".join(turn["role"] for turn in turns)
                because = str(error).strip() or type(error).__name__
                texts.append(BadRow("template_refuses", f"the chat template refuses these turns ({roles}): {because}"))
        return texts

    def _apply(self, conversations: Sequence[Sequence[Message]], tools: Sequence[dict[str, Any]], answer_follows: bool) -> list[str]:
        """What `apply_chat_template` renders, at less than half its cost for short turns.

        transformers compiles the template in its sandbox. It then copies the turns into plain JSON types, which ours are, and
        jinja copies all names that a template may use for each render; both took 20 us, where tokenizing 60 tokens takes 90.
        """
        offered = list(tools) or None
        template = _compiled(self._tokenizer.get_chat_template(None, offered))
        names = {**template.globals, **self._tokenizer.special_tokens_map}
        names |= {"tools": offered, "documents": None, "add_generation_prompt": answer_follows}
        return [
            "".join(template.root_render_func(template.new_context({**names, "messages": turns}, shared=True))) for turns in conversations
        ]

    def _template_keeps_system(self) -> bool:
        """Whether the text of a system turn is shown, before an answer and with it.

        Some templates refuse such a turn, some drop it; and some of Mistral's show it with the last turn only, and only
        while that is the user's, so that no conversation with its answer has it.
        """
        mark = "a system's text"
        asked = [{"role": "system", "content": mark}, {"role": "user", "content": "a question"}]
        texts = self._texts([asked], (), answer_follows=True)
        texts += self._texts([[*asked, {"role": "assistant", "content": "an answer"}]], ())
        return all(isinstance(text, str) and mark in text for text in texts)

    @cached_property
    def _shows_tools(self) -> bool:
        """Whether tools and calls are shown: a template that drops them would teach to answer with nothing."""
        call = {"id": "probe0001", "type": "function", "function": {"name": "a_call", "arguments": {"a": "b"}}}
        tool = {"type": "function", "function": {"name": "a_tool", "description": "", "parameters": {"type": "object", "properties": {}}}}
        turns: list[Message] = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        turns.append({"role": "tool", "content": "a result", "tool_call_id": "probe0001", "name": "a_call"})
        (text,) = self._texts([turns], [tool], answer_follows=True)
        # where the template refuses the probe, it will say of each conversation whether it does
        return isinstance(text, BadRow) or all(word in text for word in ("a_tool", "a_call", "a result"))

    def _refuse_endless(self) -> None:
        asked = {"role": "user", "content": "a question"}
        answer = {"role": "assistant", "content": "an answer"}
        probe = Conversation((asked, answer), asked=(1,))
        (found,) = self._render([probe])
        if isinstance(found, BadRow) and found.reason == "no_stop_token":
            token = self._tokenizer.eos_token
            raise ModelError(
                f"{self._tokenizer.name_or_path}: the chat template ends no answer with {token!r}; the model would never learn to stop"
            )


def _last_within(text: str, anchors: Sequence[Anchor]) -> Anchor | None:
    """The last special token that stands wholly in a text that the conversation begins with."""
    return anchors[within - 1] if (within := bisect_right(anchors, len(text), key=lambda anchor: anchor[2])) else None


def _calls(conversation: Conversation) -> bool:
    return bool(conversation.tools) or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in conversation.turns)


def _without_tools() -> BadRow:
    return BadRow(
        "tools_not_supported", "the chat template does not show tools and calls; take a base whose template does, or take them out"
    )


def _compiled(template: str) -> Any:
    """The template in transformers' own environment: its sandbox, filters and functions. Kept between calls there."""
    from transformers.utils import chat_template_utils

    compile_once: Any = chat_template_utils._compile_jinja_template
    return compile_once(template)


def as_served(turn: Message) -> Message:
    """A turn without our own marks, and with the arguments of its calls as objects: servers read them so for a template."""
    turn = {key: value for key, value in turn.items() if key != "train"}
    if turn.get("tool_calls"):
        calls = []
        for call in turn["tool_calls"]:
            function = dict(call["function"])
            with suppress(KeyError, TypeError, ValueError):  # no JSON: the template gets it as it is
                function["arguments"] = json.loads(function["arguments"])
            calls.append({**call, "function": function})
        turn["tool_calls"] = calls
    return turn
