"""Mistral's own format: the ids are the library's, each answer stands behind the prompt that a server would send, once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_dist.config import Model, Recipe, Task
from mistral_dist.data.encode import Encoder, load_encoder
from mistral_dist.data.example import BadRow, Example, Message
from mistral_dist.data.mistral_format import MistralFormat, call_id
from mistral_dist.errors import ModelError

DATA = MistralTokenizer._data_path()
FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "tekken": "tekken_240718.json",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look out of the window – naïvely",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call_abc-1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ürümqi"}'}}
ODD = " \t two  spaces \n\n line​\u00a0end  "


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


SYSTEM: Message = {"role": "system", "content": "Be brief."}
CALLED = assistant("", tool_calls=[CALL])
RESULT: Message = {"role": "tool", "content": '{"sky": "grün"}', "tool_call_id": "call_abc-1", "name": "weather"}
PLAIN: dict[str, list[Message]] = {
    "single": [user("Hello"), assistant("Hi there.")],
    "multi": [user("Hello"), assistant("Hi"), user("Bye"), assistant("Ciao"), user("?"), assistant("!")],
    "system": [SYSTEM, user("Hello"), assistant("Hi"), user("Bye"), assistant("Ciao")],
    "unicode": [SYSTEM, user("数 😀👩‍👩‍👧 é e\u0301"), assistant("😀 ŵ 𝔘nicode\u202e"), user("ß"), assistant("👍🏽")],
    "white space": [user(ODD), assistant(ODD), user("\n"), assistant("\n\nx")],
    "two questions": [user("One"), user("Two"), assistant("Three")],
    "off": [user("One"), assistant("not this", train=False), user("Two"), assistant("this")],
}
TOOLS: dict[str, list[Message]] = {
    "call": [user("Weather?"), CALLED],
    "result": [user("Weather?"), CALLED, RESULT, assistant("Green.")],
    "later": [SYSTEM, user("Hi"), assistant("Ho"), user("Weather?"), CALLED, RESULT, assistant("Green."), user("Thanks"), assistant("!")],
}


class FakeTokenizer:
    """What an Encoder wants of a Hugging Face tokenizer, where the ids are the format's."""

    name_or_path, eos_token_id, bos_token_id, chat_template, added_tokens_decoder = "fake", 2, 1, None, {}  # type: ignore[var-annotated]

    class backend_tokenizer:
        no_truncation = no_padding = staticmethod(lambda: None)
        to_str = staticmethod(lambda: "")


@pytest.fixture(scope="module")
def formats() -> dict[str, tuple[MistralTokenizer[Any, Any, Any, Any, Any], Encoder]]:
    """The library as it comes, and our encoder, for each version."""
    made = {}
    for name, file in FILES.items():
        pristine = MistralTokenizer.from_file(str(DATA / file), mode=ValidationMode.agnostic)
        made[name] = pristine, Encoder(FakeTokenizer, Task(kind="chat"), MistralFormat(DATA / file))
    return made


def example(turns: list[Message], tools: tuple[dict[str, Any], ...] = ()) -> Example:
    return Example("f:1", messages=tuple(turns), tools=tools)


def request(turns: list[Message] | tuple[Message, ...], tools: tuple[dict[str, Any], ...] = ()) -> Any:
    """The library's request, written out here on its own."""
    made: list[Any] = []
    for turn in turns:
        if turn["role"] == "system":
            made.append(SystemMessage(content=turn["content"]))
        elif turn["role"] == "user":
            made.append(UserMessage(content=turn["content"]))
        elif turn["role"] == "tool":
            made.append(ToolMessage(content=turn["content"], name=turn["name"], tool_call_id=call_id(turn["tool_call_id"])))
        else:
            calls = [ToolCall(id=call_id(c["id"]), function=FunctionCall(**c["function"])) for c in turn.get("tool_calls", [])]
            made.append(AssistantMessage(content=turn["content"] or None, tool_calls=calls or None))
    return ChatCompletionRequest(messages=made, tools=[Tool.from_openai(tool) for tool in tools] or None)


def check(pristine: Any, encoder: Encoder, whole: Example) -> list[Example]:
    """Each piece is the library's ids; each answer is a target once, right behind the served prompt, and says what it says."""
    answers = []
    pieces = encoder.unrolled(whole)
    for piece in pieces:
        encoded = encoder.encode(piece)
        ids = pristine.encode_chat_completion(request(piece.messages, piece.tools)).tokens
        targets = []
        for place, turn in enumerate(piece.messages):
            if turn["role"] == "assistant" and turn.get("train", True):
                before = pristine.encode_chat_completion(request(piece.messages[:place], piece.tools)).tokens
                assert ids[: len(before)] == before == encoder.prompt(piece.messages[:place], piece.tools)
                end = ids.index(pristine.instruct_tokenizer.tokenizer.eos_id, len(before))
                targets += range(len(before), end + 1)
                answers.append(turn)
                said = pristine.instruct_tokenizer.tokenizer.decode(ids[len(before) : end])
                if not turn.get("tool_calls"):
                    assert said.strip(" ") == turn["content"].strip(" ")
                else:
                    assert json.loads(turn["tool_calls"][0]["function"]["arguments"]) == json.loads(said)[0]["arguments"]
        assert encoded.targets.tolist() == targets
        assert encoded.ids.tolist() == ids[: targets[-1] + 1]
    wanted = [turn for turn in whole.messages if turn["role"] == "assistant" and turn.get("train", True)]
    assert answers == wanted
    return pieces


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize("name", PLAIN)
def test_ids_are_the_librarys_and_each_answer_stands_behind_its_served_prompt(formats: Any, version: str, name: str) -> None:
    check(*formats[version], example(PLAIN[name]))


@pytest.mark.parametrize("version", ["v2", "v3", "tekken", "v7"])
@pytest.mark.parametrize("name", TOOLS)
def test_tools_calls_and_results_too(formats: Any, version: str, name: str) -> None:
    check(*formats[version], example(TOOLS[name], (WEATHER,)))


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(" \t\n\u3000a‍😀é", max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    version=st.sampled_from(["v1", "v3", "tekken"]),
    system=st.none() | text.filter(bool),
    texts=st.lists(st.tuples(text, text.filter(lambda said: said.strip(" "))), min_size=1, max_size=4),
)
def test_so_it_is_for_any_texts(formats: Any, version: str, system: str | None, texts: list[tuple[str, str]]) -> None:
    pristine, encoder = formats[version]
    turns = [turn for asked, said in texts for turn in (user(asked), assistant(said))]
    whole = example([{"role": "system", "content": system}, *turns] if system is not None else turns)
    if encoder.control_token_in(whole) is not None:
        return
    trained = 0
    for piece in encoder.unrolled(whole):
        trained += sum(turn["role"] == "assistant" and turn.get("train", True) for turn in piece.messages)
        encoded = encoder.encode(piece)
        assert encoded.ids.tolist() == pristine.encode_chat_completion(request(piece.messages)).tokens
        before = pristine.encode_chat_completion(request(piece.messages[:-1])).tokens
        assert encoded.ids[: len(before)].tolist() == before
        assert encoded.targets[-1] == len(encoded.ids) - 1
        assert len(before) in encoded.targets
        assert len(before) - 1 not in encoded.targets
    assert trained == len(texts)


def test_what_moves_is_unrolled_and_what_does_not_is_not(formats: Any) -> None:
    assert {v: len(formats[v][1].unrolled(example(PLAIN["multi"]))) for v in FILES} == dict.fromkeys(FILES, 1)
    # the system's text: before the first question in v1, a turn of its own in v7, before the last question in between
    assert {v: len(formats[v][1].unrolled(example(PLAIN["system"]))) for v in FILES} == {"v1": 1, "v2": 2, "v3": 2, "tekken": 2, "v7": 1}
    first, second, third = formats["v3"][1].unrolled(example(TOOLS["later"], (WEATHER,)))
    assert [[turn.get("train", True) for turn in piece.messages if turn["role"] == "assistant"] for piece in (first, second, third)] == [
        [True],
        [False, True, True],
        [False, False, False, True],
    ]
    with pytest.raises(BadRow, match="answer_moved"):
        formats["v3"][1].encode(example(PLAIN["system"]))


def test_context_after_the_answers_does_not_lose_them(formats: Any) -> None:
    whole = example([SYSTEM, user("a"), assistant("b"), user("c"), assistant("d", train=False)])
    (piece,) = check(*formats["v3"], whole)
    assert piece.messages == whole.messages[:3]


@pytest.mark.parametrize("version", ["v2", "v3", "tekken"])
def test_calls_without_a_list_of_tools(formats: Any, version: str) -> None:
    """Version 2 leaves earlier calls out: behind the first question then stands what was said after the call."""
    turns = [user("Weather?"), CALLED, RESULT, assistant("Green."), user("Thanks"), assistant("!")]
    pieces = check(*formats[version], example(turns))
    assert len(pieces) == (2 if version == "v2" else 1)


@pytest.mark.parametrize("version", ["v1", "v3", "tekken"])
def test_an_answer_that_is_off_does_not_come_in_with_the_one_it_is_joined_to(formats: Any, version: str) -> None:
    """The library makes one turn of two answers in a row."""
    (piece,) = check(*formats[version], example([user("a"), assistant("b"), assistant("c", train=False)]))
    assert piece.messages == (user("a"), assistant("b"))


def test_version_1_has_no_tools(formats: Any) -> None:
    encoder = formats["v1"][1]
    for turns, tools in ((TOOLS["result"], ()), (PLAIN["single"], (WEATHER,))):
        with pytest.raises(BadRow, match="tools_not_supported"):
            encoder.encode(example(turns, tools))


def test_ids_of_calls_become_what_version_3_wants_the_same_for_call_and_result(formats: Any) -> None:
    assert call_id("abcDEF123") == "abcDEF123"
    assert call_id("call_abc-1") == call_id("call_abc-1") != call_id("call_abc-2")
    pristine, encoder = formats["v3"]
    said = pristine.decode(encoder.encode(example(TOOLS["result"], (WEATHER,))).ids.tolist())
    assert said.count(call_id("call_abc-1")) == 2
    without = [user("?"), assistant("", tool_calls=[{k: v for k, v in CALL.items() if k != "id"}]), {**RESULT, "tool_call_id": ""}]
    said = pristine.decode(encoder.encode(example([*without, assistant("Green.")], (WEATHER,))).ids.tolist())
    assert said.count(call_id("1 0")) == 2


@pytest.mark.parametrize(
    ("turns", "because"),
    [
        ([user("a"), assistant("")], "template_refuses"),
        ([user("a"), RESULT, assistant("b")], "template_refuses"),
        ([user("a"), assistant("b"), assistant("c")], "tokenized_differently"),
        ([user("a"), assistant("b", train=False)], "no_target"),
    ],
)
def test_what_one_example_makes_impossible_is_its_own_fault(formats: Any, turns: list[Message], because: str) -> None:
    encoder = formats["v3"][1]
    good = example(PLAIN["single"])
    bad = example(turns)
    with pytest.raises(BadRow, match=because):
        [encoder.encode(piece) for piece in encoder.unrolled(bad)]
    first, second, third = encoder.encode_batch([good, bad, good])
    assert isinstance(second, BadRow)
    assert first.ids.tolist() == third.ids.tolist() == encoder.encode(good).ids.tolist()


def test_control_tokens_of_the_librarys_tokenizer_are_seen(formats: Any) -> None:
    encoder = formats["v3"][1]
    assert encoder.control_token_in(example([user("a [/INST] b"), assistant("c")])) == "[/INST]"
    assert encoder.control_token_in(example([user("a"), assistant("</s>")])) == "</s>"
    hidden = {**CALL, "function": {"name": "weather", "arguments": '{"city": "\\u005bINST]"}'}}
    assert encoder.control_token_in(example([user("a"), assistant("", tool_calls=[hidden])])) == "[INST]"
    assert encoder.control_token_in(example(PLAIN["white space"], (WEATHER,))) is None


# which format


def base(folder: Path, version: str, file: str, chat_template: str | None = "{{ messages[0].content }}</s>", size: int = 0) -> Path:
    """A model's folder with a Hugging Face tokenizer of the same vocabulary as one of the library's, and the latter's file."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = MistralTokenizer.from_file(str(DATA / FILES[version])).instruct_tokenizer.tokenizer
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"token{n}": n for n in range(3, size or inner.n_words)}
    made = Tokenizer(models.WordLevel(words))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    shutil.copy(DATA / FILES[version], folder / file)
    return folder


def recipe(folder: Path, name: str, chat_format: str = "auto") -> Recipe:
    model = Model(name=name, path=str(folder), chat_format=chat_format)  # type: ignore[arg-type]
    return Recipe.model_validate(
        {"version": 1, "task": {"kind": "chat"}, "data": {"sources": [{"path": "x.jsonl"}]}, "model": model.model_dump()}
    )


def is_mistral(encoder: Encoder) -> bool:
    return isinstance(encoder._format, MistralFormat)


def test_only_a_tokenizer_with_tokens_for_tools_calls_them(tmp_path: Path, formats: Any) -> None:
    """A server that was told to read calls does not start on one that has none."""
    assert load_encoder(recipe(base(tmp_path / "v3", "v3", "tokenizer.model.v3"), "someone/tuned")).calls_tools
    assert not load_encoder(recipe(base(tmp_path / "v1", "v1", "tokenizer.model"), "mistralai/Mistral-7B-Instruct-v0.1")).calls_tools
    assert not load_encoder(recipe(tmp_path / "v3", "someone/tuned", "template")).calls_tools


def test_the_bases_files_decide_and_the_recipe_may(tmp_path: Path, formats: Any) -> None:
    v3 = base(tmp_path / "v3", "v3", "tokenizer.model.v3")
    encoder = load_encoder(recipe(v3, "someone/tuned"))
    assert is_mistral(encoder)
    assert encoder.encode(example(PLAIN["multi"])).ids.tolist() == formats["v3"][1].encode(example(PLAIN["multi"])).ids.tolist()
    assert not is_mistral(load_encoder(recipe(v3, "someone/tuned", "template")))
    assert load_encoder(recipe(v3, "someone/tuned", "template")).fingerprint != encoder.fingerprint


def test_a_bare_file_is_trusted_in_mistrals_own_7b_only(tmp_path: Path) -> None:
    v1 = base(tmp_path / "v1", "v1", "tokenizer.model")
    assert is_mistral(load_encoder(recipe(v1, "mistralai/Mistral-7B-Instruct-v0.2")))
    assert not is_mistral(load_encoder(recipe(v1, "teknium/OpenHermes-2.5-Mistral-7B"))), "a fine-tune may speak ChatML"
    assert is_mistral(load_encoder(recipe(v1, "teknium/OpenHermes-2.5-Mistral-7B", "mistral")))


def test_a_bare_file_of_a_later_version_is_not_taken_for_version_1(tmp_path: Path) -> None:
    folder = base(tmp_path / "bare", "v3", "tokenizer.model")
    with pytest.raises(ModelError, match="its name does not tell its version"):
        load_encoder(recipe(folder, "mistralai/Mistral-7B-Instruct-v0.3"))
    shutil.copy(DATA / FILES["v3"], folder / "tokenizer.model.v3")
    assert is_mistral(load_encoder(recipe(folder, "mistralai/Mistral-7B-Instruct-v0.3")))


def test_tekken_comes_first(tmp_path: Path) -> None:
    folder = base(tmp_path / "tekken", "tekken", "tekken.json")
    shutil.copy(DATA / FILES["v3"], folder / "tokenizer.model.v3")
    encoder = load_encoder(recipe(folder, "mistralai/Mistral-Nemo-Instruct-2407"))
    assert isinstance(encoder._format, MistralFormat)
    assert encoder._format.file.name == "tekken.json"


def test_ids_that_mean_something_else_to_the_saved_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = base(tmp_path / "grown", "v3", "tokenizer.model.v3", size=32769)
    with pytest.raises(ModelError, match=r"has 32768 tokens, bos 1, eos 2, but .* has 32769, 1, 2; set model\.chat_format=template"):
        load_encoder(recipe(folder, "someone/tuned"))


def test_mistral_without_a_file_and_with_a_broken_one(tmp_path: Path) -> None:
    folder = base(tmp_path / "none", "v1", "other")
    with pytest.raises(ModelError, match=r"model\.chat_format=mistral needs tekken\.json"):
        load_encoder(recipe(folder, "someone/tuned", "mistral"))
    (folder / "tokenizer.model.v3").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"tokenizer\.model\.v3: no tokenizer of Mistral's"):
        load_encoder(recipe(folder, "someone/tuned"))
