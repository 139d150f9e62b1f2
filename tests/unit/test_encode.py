"""Conversations to ids and targets, shown as text: [what the loss counts] stands in brackets."""

import copy
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_dist.config import Task
from mistral_dist.data.chat_format import TemplateFormat
from mistral_dist.data.encode import Encoded, Encoder
from mistral_dist.data.example import BadRow, Example
from mistral_dist.errors import DataError, ModelError


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_model)


def conversation(*turns: str) -> Example:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return Example("f:1", messages=tuple({"role": roles[turn[0]], "content": turn[2:]} for turn in turns))


def shown(tokenizer: Any, task: Task, example: Example) -> str:
    encoded = Encoder(tokenizer, task).encode(example)
    parts = [(tokenizer.decode([token]), position in encoded.targets) for position, token in enumerate(encoded.ids)]
    text = "".join(f"[{part}]" if target else part for part, target in parts)
    return text.replace("][", "")


def test_targets_are_the_answers_with_their_stop_token(tokenizer: Any) -> None:
    example = conversation("s:Be brief.", "u:Hello", "a:Hi there.", "u:Bye", "a:Ciao")
    assert shown(tokenizer, Task(kind="chat"), example) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n[Hi there.<|im_end|>]\n"
        "<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n[Ciao<|im_end|>]"
    )


def test_classification_asks_and_learns_the_label(tokenizer: Any) -> None:
    task = Task(kind="classification", labels=("good", "bad"), prompt="{labels}? {text}", system="Judge.")
    assert shown(tokenizer, task, Example("f:1", text="A {labels} film", label="bad")) == (
        "<|im_start|>system\nJudge.<|im_end|>\n"
        "<|im_start|>user\ngood, bad? A {labels} film<|im_end|>\n"
        "<|im_start|>assistant\n[bad<|im_end|>]"
    )


def test_plain_text_is_all_target_but_its_first_token(tokenizer: Any) -> None:
    assert shown(tokenizer, Task(kind="pretrain"), Example("f:1", text="Some text")) == "<|im_start|>[Some text<|im_end|>]"


def test_candidates_share_the_prompt_of_the_training_example(tokenizer: Any) -> None:
    task = Task(kind="classification", labels=("good", "very bad"), prompt="{text}")
    encoder = Encoder(tokenizer, task)
    candidates = encoder.candidates("A film")
    for label, answer in zip(task.labels, candidates.answers, strict=True):
        encoded = encoder.encode(Example("f:1", text="A film", label=label))
        assert encoded.ids.tolist() == candidates.prompt + answer
        assert encoded.targets.tolist() == list(range(len(candidates.prompt), len(encoded.ids)))


def test_the_stop_token_is_learned_although_it_is_the_pad_token(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = Encoder(tokenizer, Task(kind="chat")).encode(conversation("u:Hi", "a:Ho"))
    assert encoded.ids[encoded.targets[-1]] == tokenizer.eos_token_id


def test_no_answer_no_target_no_example(tokenizer: Any) -> None:
    with pytest.raises(BadRow, match=r"no_target: no target token .*add an answer or remove the row"):
        Encoder(tokenizer, Task(kind="chat")).encode(conversation("u:Hi"))


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m.role if loop.last else 'x' }} {{ m.content }}<|im_end|>{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    encoder = Encoder(tokenizer, Task(kind="chat"))
    example = conversation("u:Hi", "a:Ho", "u:Hi", "a:Ho")
    with pytest.raises(BadRow, match="answer_moved: turn 2: what follows it changes the prompt"):
        encoder.encode(example)
    with pytest.raises(BadRow, match="tokenized_differently: turn 4: the prompt that a server would show"):
        encoder.unrolled(example)


def test_a_template_without_a_stop_token_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(ModelError, match="would never learn to stop"):
        Encoder(tokenizer, Task(kind="chat")).encode(conversation("u:Hi", "a:Ho"))


def test_what_the_template_says_is_passed_on(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRow, match=r"template_refuses: the chat template refuses these turns \(user assistant\): roles must alternate"):
        Encoder(tokenizer, Task(kind="chat")).encode(conversation("u:Hi", "a:Ho"))


def test_a_tokenizer_without_a_template_is_refused_at_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ModelError, match="no chat template"):
        Encoder(tokenizer, Task(kind="chat"))
    Encoder(tokenizer, Task(kind="pretrain"))


def test_a_template_that_drops_the_system_turn_gets_it_in_the_first_user_turn(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of Mistral's templates show the system's text with the last turn only, and only while that is the user's."""
    template = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
        "{% else %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'user' %}(INST) {% if loop.last and system is defined %}{{ system }}: {% endif %}"
        "{{ m.content }} (/INST){% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    example = conversation("s:Be brief.", "u:Hello", "a:Hi.", "u:Bye", "a:Ciao")
    wanted = "(INST) Be brief.\n\nHello (/INST)[ Hi.<|im_end|>](INST) Bye (/INST)[ Ciao<|im_end|>]"
    assert shown(tokenizer, Task(kind="chat"), example) == wanted


@pytest.mark.parametrize("turn", ["u:Say <|im_end|>", "a:<|im_start|>system"])
def test_control_tokens_in_texts_are_seen(tokenizer: Any, turn: str) -> None:
    encoder = Encoder(tokenizer, Task(kind="chat"))
    assert encoder.control_token_in(conversation("u:Hi", turn)) in ("<|im_end|>", "<|im_start|>")
    assert encoder.control_token_in(conversation("u:Hi", "a:less <b>than</b>")) is None
    with pytest.raises(DataError, match="control token"):
        encoder.prompt([{"role": "user", "content": turn[2:]}])


def test_only_the_last_piece_of_a_text_ends_it(tokenizer: Any) -> None:
    task = Task(kind="pretrain")
    assert shown(tokenizer, task, Example("f:1", text="Some text", ends=False)) == "<|im_start|>[Some text]"


def test_the_fingerprint_sees_template_and_task(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Encoder(tokenizer, Task(kind="chat")).fingerprint
    assert Encoder(tokenizer, Task(kind="chat", system="x")).fingerprint != first
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + " ")
    assert Encoder(tokenizer, Task(kind="chat")).fingerprint != first


def test_the_fingerprint_sees_every_token(tokenizer: Any) -> None:
    first = Encoder(tokenizer, Task(kind="pretrain")).fingerprint
    other = copy.deepcopy(tokenizer)
    assert Encoder(other, Task(kind="pretrain")).fingerprint == first
    other.add_tokens(["a token that was not there"])
    assert Encoder(other, Task(kind="pretrain")).fingerprint != first


# what a template may do

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MOVING = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{% set last = turns | map(attribute='role') | list %}"
    "{% set ns = namespace(last=0) %}{% for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in turns %}{% if m.role == 'user' %}(INST){% if loop.index0 == ns.last and system %}{{ system }}|{% endif %}"
    "{{ m.content }}(/INST){% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
"""The system's text stands before the last question, as in version 3 of Mistral's own format."""
TEMPLATES = {
    "chatml": CHATML + ASKS,
    "plain": "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
    "line feed": "{% for m in messages %}{{ m.role }}: \n{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: \n{% endif %}",
    "moving": MOVING,
}
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.text(" \t\n\u3000aé😀\u0301", max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    system=st.none() | text.filter(bool),
    texts=st.lists(st.tuples(text, text), min_size=1, max_size=3),
)
def test_each_answer_stands_behind_the_prompt_as_it_is_tokenized_alone(
    tokenizer: Any, name: str, system: str | None, texts: list[tuple[str, str]]
) -> None:
    """Whatever the texts and the template: an example is trained as it is served, or it is refused."""
    turns = [turn for asked, said in texts for turn in (f"u:{asked}", f"a:{said}")]
    whole = conversation(*([] if system is None else [f"s:{system}"]), *turns)
    kept = tokenizer.chat_template
    tokenizer.chat_template = TEMPLATES[name]
    try:
        encoder = Encoder(tokenizer, Task(kind="chat"))
        if encoder.control_token_in(whole) is not None:
            return
        trained = 0
        for piece in encoder.unrolled(whole):
            encoded = encoder.encode(piece)
            rendered = tokenizer.apply_chat_template(list(piece.messages), tokenize=True, return_dict=False)
            assert encoded.ids.tolist() == rendered[: len(encoded.ids)]
            for place, turn in enumerate(piece.messages):
                if turn["role"] == "assistant" and turn.get("train", True):
                    trained += 1
                    before = encoder.prompt(piece.messages[:place])
                    served = tokenizer.apply_chat_template(
                        list(piece.messages[:place]), tokenize=True, return_dict=False, add_generation_prompt=True
                    )
                    assert before == served == encoded.ids[: len(before)].tolist()
                    end = encoded.ids.tolist().index(tokenizer.eos_token_id, len(before))
                    said = turn["content"]
                    if tokenizer.decode(tokenizer.encode(said, add_special_tokens=False)) == said:  # this vocabulary lacks some bytes
                        assert tokenizer.decode(encoded.ids[len(before) : end]) == said
                    assert set(range(len(before), end + 1)) <= set(encoded.targets.tolist())
        assert trained == len(texts)
    except BadRow as bad:
        melts = any(said[:1].isspace() or unicodedata.combining(said[:1] or " ") or not said for _, said in texts)
        if bad.reason != "tokenized_differently" or (name == "chatml" and not melts):
            raise
    finally:
        tokenizer.chat_template = kept


def test_the_tail_of_a_prompt_that_is_tokenized_differently_alone_is_seen(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, two blanks are one token; with a word behind them the second one is the word's."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES["chatml"].replace("assistant\n", "assistant  "))
    with pytest.raises(BadRow, match="tokenized_differently"):
        Encoder(tokenizer, Task(kind="chat")).encode(conversation("u:Hi", "a:Hi"))


def test_the_tokens_of_a_tail_are_compared_not_only_its_end(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, a blank and a line feed may be one token, where in front of a word they are two: the answer begins with a token
    of its own, and yet a server would have shown other ones."""
    encoder = Encoder(tokenizer, Task(kind="chat"))
    assert isinstance(encoder.encode(conversation("u:Hi", "a:Ho")), Encoded)
    monkeypatch.setattr(TemplateFormat, "_alone", lambda _self, head: tokenizer.encode(head.replace("assistant", "assistants")))
    real = encoder._format._backend  # type: ignore[union-attr]
    monkeypatch.setattr(encoder._format, "_backend", Elsewhere(real))
    with pytest.raises(BadRow, match="tokenized_differently"):
        encoder.encode(conversation("u:Hi", "a:Ho"))


class Elsewhere:
    """A tokenizer that tokenizes a prompt alone in another way than in front of an answer."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
        return self.real.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        return self.real.encode(text.replace("assistant", "assistants"), add_special_tokens=add_special_tokens)


def test_an_answer_that_melts_into_its_prompt_is_refused_and_the_others_are_not(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, Task(kind="chat"))
    good, bad = conversation("u:Hi", "a:Ho"), conversation("u:Hi", "a:\n\nHo")
    first, second, third = encoder.encode_batch([good, bad, good])
    assert isinstance(second, BadRow)
    assert second.reason == "tokenized_differently"
    assert isinstance(first, Encoded)
    assert isinstance(third, Encoded)
    assert first.ids.tolist() == third.ids.tolist() == encoder.encode(good).ids.tolist()


def test_a_conversation_that_the_template_refuses_does_not_fail_its_batch(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + TEMPLATES["chatml"]
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    encoder = Encoder(tokenizer, Task(kind="chat"))
    first, second = encoder.encode_batch([conversation("u:no", "a:Ho"), conversation("u:Hi", "a:Ho")])
    assert isinstance(first, BadRow)
    assert first.because == "the chat template refuses these turns (user assistant): not this"
    assert isinstance(second, Encoded)


def test_a_system_turn_that_moves_unrolls_the_conversation(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", MOVING)
    encoder = Encoder(tokenizer, Task(kind="chat"))
    pieces = encoder.unrolled(conversation("s:S", "u:Hello", "a:Hi", "u:Bye", "a:Ciao"))
    assert [shown(tokenizer, Task(kind="chat"), piece) for piece in pieces] == [
        "(INST)S|Hello(/INST)[Hi<|im_end|>]",
        "(INST)Hello(/INST)Hi<|im_end|>(INST)S|Bye(/INST)[Ciao<|im_end|>]",
    ]
    alone = conversation("u:Hello", "a:Hi", "u:Bye", "a:Ciao")
    assert encoder.unrolled(alone) == [alone]


def test_a_template_that_ends_only_the_last_answer_unrolls_too(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}({{ m.role }}){{ m.content }}{% if loop.last and m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template + "{% if add_generation_prompt %}(assistant){% endif %}")
    pieces = Encoder(tokenizer, Task(kind="chat")).unrolled(conversation("u:Hello", "a:Hi", "u:Bye", "a:Ciao"))
    assert [shown(tokenizer, Task(kind="chat"), piece) for piece in pieces] == [
        "(user)Hello(assistant)[Hi<|im_end|>]",
        "(user)Hello(assistant)Hi(user)Bye(assistant)[Ciao<|im_end|>]",
    ]


def test_a_turn_that_is_off_is_context(tokenizer: Any) -> None:
    example = conversation("u:Hello", "a:Hi", "u:Bye", "a:Ciao")
    example.messages[1]["train"] = False
    assert shown(tokenizer, Task(kind="chat"), example).count("[") == 1
    assert "[Ciao<|im_end|>]" in shown(tokenizer, Task(kind="chat"), example)
    example.messages[3]["train"] = False
    with pytest.raises(BadRow, match="no_target"):
        Encoder(tokenizer, Task(kind="chat")).encode(example)


TOOLS = ({"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}},)
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"far": true}'}}


def test_a_template_gets_tools_and_calls_as_a_server_gives_them(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% if tools %}{{ tools | map(attribute='function.name') | join(',') }}|{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls %}"
        "{{ c.function.name }}{{ c.function.arguments.far }}{% endfor %}"
        "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "tool_calls": [CALL]}]
    turns += [{"role": "tool", "content": "far away", "tool_call_id": "1"}, {"role": "assistant", "content": "There.", "train": True}]
    example = Example("f:1", messages=tuple(turns), tools=TOOLS)
    wanted = "look|user: ?\nassistant:[ !lookTrue<|im_end|>]\ntool: far away\nassistant:[ There.<|im_end|>]"
    encoder = Encoder(tokenizer, Task(kind="chat"))
    with pytest.raises(BadRow, match="tokenized_differently"):
        encoder.encode(example)  # the blank belongs to the answer's first token
    monkeypatch.setattr(tokenizer, "chat_template", template.replace("assistant: {%", "assistant:{%"))
    assert shown(tokenizer, Task(kind="chat"), example) == wanted
    both = Encoder(tokenizer, Task(kind="chat")).encode_batch([example, conversation("u:a", "a:b"), example])
    assert [tokenizer.decode(one.ids)[:5] for one in both if isinstance(one, Encoded)] == ["look|", "user:", "look|"]


def test_a_template_that_drops_tools_would_teach_to_say_nothing(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, Task(kind="chat"))
    asked, called = {"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "far", "tool_call_id": "1"}
    plain = conversation("u:a", "a:b")
    calling = Example("f:1", messages=(asked, called))
    answering = Example("f:1", messages=(asked, result, {"role": "assistant", "content": "Far."}))
    offered = Example("f:1", messages=plain.messages, tools=TOOLS)
    first, *refused = encoder.encode_batch([plain, calling, answering, offered])
    assert isinstance(first, Encoded)
    assert [one.reason for one in refused if isinstance(one, BadRow)] == ["tools_not_supported"] * 3


def test_control_tokens_in_tools_and_calls_are_seen(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, Task(kind="chat"))
    hidden = {**CALL, "function": {"name": "look", "arguments": '{"x": "\\u003c|im_end|>"}'}}
    turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [hidden]})
    assert encoder.control_token_in(Example("f:1", messages=turns)) == "<|im_end|>"
    named = ({"type": "function", "function": {"name": "<|im_start|>"}},)
    assert encoder.control_token_in(Example("f:1", messages=turns[:1], tools=named)) == "<|im_start|>"
    assert encoder.control_token_in(Example("f:1", messages=turns[:1], tools=TOOLS)) is None


def test_a_batch_gives_what_each_alone_gives(tokenizer: Any) -> None:
    examples = [conversation("u:" + "word " * n, "a:" + "said " * (n + 1)) for n in range(20)]
    encoder = Encoder(tokenizer, Task(kind="chat"))
    for one, example in zip(encoder.encode_batch(examples), examples, strict=True):
        assert isinstance(one, Encoded)
        alone = Encoder(tokenizer, Task(kind="chat")).encode(example)
        assert (one.ids.tolist(), one.targets.tolist()) == (alone.ids.tolist(), alone.targets.tolist())


def test_a_continuation_begins_where_training_does(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, Task(kind="pretrain"))
    trained = encoder.encode(Example("f:1", text="Some text", ends=False))
    assert encoder.prompt([{"role": "user", "content": "Some text"}]) == trained.ids.tolist()
    with pytest.raises(BadRow, match="no_target"):
        encoder.encode(Example("f:1", text="", ends=False))


def test_a_refused_prompt_says_why(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('never') }}")
    with pytest.raises(DataError, match=r"the conversation: the chat template refuses these turns \(user\): never"):
        Encoder(tokenizer, Task(kind="chat")).prompt([{"role": "user", "content": "Hi"}])


def test_targets_are_inside_and_ascend() -> None:
    for targets in ([0], [3], [2, 1], [1, 1]):
        with pytest.raises(AssertionError):
            Encoded([5, 6, 7], targets)


def test_special_tokens_are_the_anchors_not_the_only_way(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way (from the last special token on) and the long one (the whole prompt again) give the same."""
    examples = [conversation("u:Hello there", "a:Hi"), conversation("u:A\n", "a:B", "u:C", "a:D e")]
    short = Encoder(tokenizer, Task(kind="chat")).encode_batch(examples)
    monkeypatch.setattr(TemplateFormat, "_alone", lambda _self, _head: [])
    long = Encoder(tokenizer, Task(kind="chat")).encode_batch(examples)
    assert [one.targets.tolist() for one in short if isinstance(one, Encoded)] == [
        one.targets.tolist() for one in long if isinstance(one, Encoded)
    ]
