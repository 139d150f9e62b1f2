"""A conversation -> token ids by Mistral's own library, mistral-common: what the family was trained with, and is served with.

The library joins, trims and orders what each version of the tokenizer wants: version 1 puts the system's text into the
first user turn, version 3 into the last, together with the tools. Its ids are taken as they are, never made anew here.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral_dist.data.chat_format import Conversation, Rendered
from mistral_dist.data.example import BadRow, Message
from mistral_dist.data.pieces import spelled
from mistral_dist.errors import ModelError

CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
"""What version 3 wants of the id of a tool call."""
VERSIONED = re.compile(r"tokenizer\.model\.v(\d+)(m\d+)?")


def tokenizer_file(folder: Path, *, plain: bool) -> Path | None:
    """The tokenizer of Mistral's own that a model's folder holds, the newest first; `plain`: also a bare `tokenizer.model`."""
    if (folder / "tekken.json").is_file():
        return folder / "tekken.json"
    versioned = [(int(found[1]), path) for path in folder.glob("tokenizer.model.v*") if (found := VERSIONED.fullmatch(path.name))]
    if versioned:
        return max(versioned)[1]
    bare = folder / "tokenizer.model"
    return bare if plain and bare.is_file() else None


class MistralFormat:
    """Conversations by the rules of one tokenizer file."""

    def __init__(self, file: Path) -> None:
        """Raises ModelError for a file that is no tokenizer of Mistral's."""
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        try:
            # agnostic: a conversation may end with a question or with an answer; all else is checked as in serving
            self._library: Any = MistralTokenizer.from_file(str(file), mode=ValidationMode.agnostic)
        except Exception as error:  # of the library's, of sentencepiece's, of json's
            raise ModelError(f"{file}: no tokenizer of Mistral's ({_first_line(error)}); set model.chat_format=template") from error
        self.file = file
        self._tokenizer = self._library.instruct_tokenizer.tokenizer
        self.control_tokens: Sequence[str] = tuple(self._tokenizer.id_to_piece(id) for id in sorted(self._tokenizer.special_ids))
        if self._library.version.value == "v1" and self._tokenizer.is_special("[INST]"):
            # taken for version 1 by its name, but its control tokens are of a later version
            raise ModelError(
                f"{file}: its name does not tell its version; put the base's tokenizer.model.v3 beside it (`mistral-dist fetch`)"
            )
        self.knows_tools = self._library.version.value != "v1"
        """Whether there are tokens for tools and calls."""
        instruct: Any = self._library.instruct_tokenizer
        self._memory = instruct.tokenizer = _Memory(self._tokenizer)
        # the library decodes each result for its debugging, a third of its time; the ids do not depend on it
        instruct.decode = _no_text

    @property
    def identity(self) -> str:
        """Changes when the ids may change: the file, and the library's version."""
        import mistral_common

        return f"mistral\x1f{mistral_common.__version__}\x1f{self.file.name}\x1f{hashlib.sha256(self.file.read_bytes()).hexdigest()}"

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of the control tokens."""
        return frozenset(self._tokenizer.special_ids)

    def bytes_of(self, id: int) -> bytes:
        """What a token writes, in UTF-8; of a control token, its name."""
        if id in self._tokenizer.special_ids:
            return str(self._tokenizer.id_to_piece(id)).encode()
        if hasattr(self._tokenizer, "id_to_byte_piece"):  # tekken
            return bytes(self._tokenizer.id_to_byte_piece(id))
        return spelled(self._tokenizer.id_to_piece(id))

    def refuse_other_vocabulary(self, tokenizer: Any) -> None:
        """Raises ModelError unless ids mean the same to the Hugging Face tokenizer, which is saved with the adapter."""
        ours = (self._tokenizer.n_words, self._tokenizer.bos_id, self._tokenizer.eos_id)
        theirs = (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
        if ours != theirs:
            raise ModelError(
                f"{tokenizer.name_or_path}: {self.file.name} has {ours[0]} tokens, bos {ours[1]}, eos {ours[2]}, but the Hugging Face"
                f" tokenizer has {theirs[0]}, {theirs[1]}, {theirs[2]}; set model.chat_format=template"
            )

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the assistant begins to answer. Raises BadRow."""
        self._memory.forget()
        messages = self._messages(conversation)
        return self._ids(messages, self._tools(conversation.tools), conversation.turns)

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | BadRow]:
        """Ids and answers of each conversation, or why it has none."""
        found: list[Rendered | BadRow] = []
        for conversation in conversations:
            try:
                found.append(self._render(conversation))
            except BadRow as bad:
                found.append(bad)
        return found

    def _render(self, conversation: Conversation) -> Rendered:
        self._memory.forget()
        turns, messages, tools = conversation.turns, self._messages(conversation), self._tools(conversation.tools)
        ids = self._ids(messages, tools, turns)
        answers = {}
        for turn in conversation.asked:
            through = ids if turn + 1 == len(turns) else self._ids(messages[: turn + 1], tools, turns[: turn + 1])
            before = self._ids(messages[:turn], tools, turns[:turn])
            if len(before) < len(through) and through[: len(before)] == before and ids[: len(through)] == through:
                answers[turn] = (len(before), len(through))
        return Rendered(ids, answers)

    def _ids(self, messages: list[Any], tools: list[Any] | None, turns: Sequence[Message]) -> list[int]:
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        try:
            return list(self._library.encode_chat_completion(ChatCompletionRequest(messages=messages, tools=tools)).tokens)
        except Exception as error:  # its own, pydantic's, and asserts
            raise _refused(turns, error) from error

    def _tools(self, tools: Sequence[dict[str, Any]]) -> list[Any] | None:
        from mistral_common.protocol.instruct.tool_calls import Tool

        if tools and not self.knows_tools:
            raise _without_tools()
        try:
            return [Tool.from_openai(tool) for tool in tools] or None
        except Exception as error:  # pydantic's, or a KeyError
            raise BadRow("template_refuses", f"tools: {_first_line(error)}; each is an object as in OpenAI's API") from error

    def _messages(self, conversation: Conversation) -> list[Any]:
        try:
            made, waiting = [], [""]
            for place, turn in enumerate(conversation.turns):
                made.append(self._message(turn, place, waiting))
            return made
        except BadRow:
            raise
        except Exception as error:  # pydantic's, or a KeyError
            raise _refused(conversation.turns, error) from error

    def _message(self, turn: Message, place: int, waiting: list[str]) -> Any:
        """The library's message for a turn; `waiting` are the ids of the calls whose results are still to come."""
        from mistral_common.protocol.instruct import messages

        role, content = turn["role"], turn["content"]
        if role == "system":
            return messages.SystemMessage(content=content)
        if role == "user":
            return messages.UserMessage(content=content)
        if not self.knows_tools and (role == "tool" or turn.get("tool_calls")):
            raise _without_tools()
        if role == "tool":
            given = turn.get("tool_call_id") or (waiting[0] if waiting else "")
            if given in waiting:
                waiting.remove(given)
            return messages.ToolMessage(content=content, name=turn.get("name"), tool_call_id=call_id(given))
        calls = turn.get("tool_calls") or []
        waiting[:] = [call.get("id") or f"{place} {number}" for number, call in enumerate(calls)]
        made = [_call(call, id) for call, id in zip(calls, waiting, strict=True)]
        return messages.AssistantMessage(content=content or None, tool_calls=made or None)


def _no_text(*_: Any, **__: Any) -> str:
    return ""


class _Memory:
    """A tokenizer of the library's that remembers texts: each turn comes again in the prompts of all later answers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        if bos or eos:
            return list(self._tokenizer.encode(s, bos=bos, eos=eos))
        ids = self._known.get(s)
        if ids is None:
            ids = self._known[s] = self._tokenizer.encode(s, bos=False, eos=False)
        return ids.copy()  # the library appends to what it gets

    def forget(self) -> None:
        self._known.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def call_id(given: str) -> str:
    """An id of 9 letters and digits: the given one where it is such, else one that follows from it."""
    return given if CALL_ID.fullmatch(given) else hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def _call(call: dict[str, Any], id: str) -> Any:
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall

    function = call["function"]
    return ToolCall(id=call_id(id), function=FunctionCall(name=function["name"], arguments=function["arguments"]))


def _without_tools() -> BadRow:
    return BadRow(
        "tools_not_supported", "the base's tokenizer, of Mistral's version 1, has no tools; take a base of version 3, or take them out"
    )


def _refused(turns: Sequence[Message], error: Exception) -> BadRow:
    roles = " ".join(str(turn.get("role")) for turn in turns)
    return BadRow("template_refuses", f"mistral-common refuses these turns ({roles}): {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
