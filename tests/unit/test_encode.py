"""Conversations to ids and targets, shown as text: [what the loss counts] stands in brackets."""

from pathlib import Path
from typing import Any

import pytest

from mistral_dist.config import Task
from mistral_dist.data.encode import Encoder
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
