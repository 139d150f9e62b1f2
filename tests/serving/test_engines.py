"""What is served is what was trained: real engines, the official client, a real model. Run by `make serve-test`, which installs vLLM.

The yardstick is transformers with the same form in float32: same greedy text, same labels, same prompts.
"""

import http.client
import json
import re
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
import transformers

from examples.serving.classify import probabilities
from mistral_dist.answers import label_row, label_scores, write_answers
from mistral_dist.config import Recipe, Task
from mistral_dist.data.encode import Encoder, load_encoder
from mistral_dist.export.forms import Form
from mistral_dist.model import load_tuned
from mistral_dist.run import RunDirectory
from mistral_dist.runtime import process
from tests.conftest import LABELS, WriteRecipe
from tests.launch import mistral_dist, train, wait_for
from tests.serving.server import Server, serving
from tests.unit.test_export import exported, finished
from tests.unit.test_mistral_format import PLAIN, SYSTEM, WEATHER, base, recipe, user

pytestmark = [pytest.mark.serving, pytest.mark.timeout(3600)]  # a busy machine takes several times the ten minutes of a quiet one

CPU = torch.device("cpu")
WORDS = 24
"""Tokens of an answer at most."""
PROMPTS = 50
EXAMPLES = 100
NEAR_TIE = 1e-2
"""Logits that close may change places by rounding."""
VLLM_FLAGS = ("--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager")
VLLM_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def vllm() -> str:
    found = process.environment("VLLM")
    if not shutil.which(found):
        pytest.skip("VLLM does not name vLLM's command; `make serve-test` installs it")
    return found


@pytest.fixture(scope="module")
def run(recipe_writer: Callable[[Path], WriteRecipe], demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The whole small model, trained for some steps as a classifier."""
    folder = tmp_path_factory.mktemp("served")
    optim, steps = {"learning_rate": 2e-4, "warmup_ratio": 0.1}, {"steps": 12, "global_batch_size": 4}
    file = recipe_writer(folder)(model={"path": str(demo_model)}, lora={"r": 8, "lora_alpha": 16}, optim=optim, train=steps)
    assert mistral_dist("prepare", file).returncode == 0
    return RunDirectory(train(file, folder / "tuned", processes=1, zero=0))


@pytest.fixture(scope="module")
def merged(run: RunDirectory) -> Path:
    out = run.path.parent / "merged"
    exported(run, out, form=Form.NF4, compare=False)
    return out


@pytest.fixture(scope="module")
def encoder(run: RunDirectory) -> Encoder:
    return load_encoder(run.recipe())


@pytest.fixture(scope="module")
def adapters(run: RunDirectory, vllm: str) -> Iterator[Server]:
    """Base and adapter, by name."""
    with serving(run.path, "--engine", vllm, flags=VLLM_FLAGS, log=run.path.parent / "adapters.log", **VLLM_VARIABLES) as server:
        yield server


@pytest.fixture(scope="module")
def whole(merged: Path, vllm: str) -> Iterator[Server]:
    with serving(
        merged, "--engine", vllm, flags=VLLM_FLAGS, log=merged.parent / "whole.log", VLLM_API_KEY="a-key", **VLLM_VARIABLES
    ) as server:
        yield server


@pytest.fixture(scope="module")
def plain(merged: Path) -> Iterator[Server]:
    """transformers' own server."""
    with serving(merged, "--engine", "transformers", log=merged.parent / "plain.log") as server:
        yield server


def reference(form: str, run: RunDirectory, merged: Path) -> Any:
    """A form in the hands of transformers, in float32."""
    if form == "merged":
        return transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    model = run.recipe().model
    if form == "base":
        return transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    return load_tuned(model.model_copy(update={"quantization": "none"}), run.adapter, CPU, "sdpa")


def questions(texts: list[dict[str, str]], encoder: Encoder) -> list[list[Any]]:
    """Half are the classifier's questions, half ask for more than a word."""
    asked = [encoder._with_system(encoder.question(row["text"])) for row in texts[: PROMPTS // 2]]
    return asked + [[user(f"Tell me something about {row['text']}")] for row in texts[: PROMPTS // 2]]


def streamed(client: openai.OpenAI, model: str, turns: list[Any]) -> str:
    chunks = client.chat.completions.create(model=model, messages=turns, max_tokens=WORDS, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def written(client: openai.OpenAI, model: str, turns: list[Any]) -> str:
    return client.chat.completions.create(model=model, messages=turns, max_tokens=WORDS).choices[0].message.content or ""


@torch.no_grad()
def gap_where_they_part(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """How far apart the two tokens' logits are, at the first place where two answers differ."""
    same = next((n for n, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), min(len(ours), len(theirs)))
    if same == len(ours) or same == len(theirs):
        return float("inf")
    logits = model(input_ids=torch.tensor([prompt + ours[:same]])).logits[0, -1]
    return float((logits[ours[same]] - logits[theirs[same]]).abs())


def assert_same_text(model: Any, encoder: Encoder, asked: list[list[Any]], ask: Callable[[list[Any]], str]) -> None:
    """Token for token; a difference must be a near-tie."""
    tokenizer, near = encoder.tokenizer, 0
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, asked))
    for turns, answer in zip(asked, answers, strict=True):
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        (wanted,) = write_answers(model, [prompt], tokenizer, WORDS, CPU)
        if answer.strip() != wanted.text:
            ours, theirs = (tokenizer.encode(text, add_special_tokens=False) for text in (wanted.text, answer.strip()))
            gap = gap_where_they_part(model, prompt, ours, theirs)
            print(f"{wanted.text!r} / {answer!r}: {gap:.2e}")
            assert gap < NEAR_TIE, (wanted.text, answer)
            near += 1
    print(f"{len(asked)} prompts, {near} near-ties")
    assert len(set(answers)) > len(asked) // 4, "answers that differ, or nothing is compared"


@pytest.mark.parametrize("form", ["base", "adapter", "merged"])
def test_vllm_writes_what_transformers_writes(
    request: pytest.FixtureRequest, run: RunDirectory, merged: Path, encoder: Encoder, texts: list[dict[str, str]], form: str
) -> None:
    """Streamed and not, greedy though the client asks for nothing of the kind."""
    server: Server = request.getfixturevalue("whole" if form == "merged" else "adapters")
    name = {"base": run.recipe().model.name, "adapter": run.path.name, "merged": merged.name}[form]
    assert name in {model.id for model in server.client.models.list()}
    model, asked = reference(form, run, merged), questions(texts, encoder)
    assert_same_text(model, encoder, asked, lambda turns: written(server.client, name, turns))
    assert_same_text(model, encoder, asked, lambda turns: streamed(server.client, name, turns))


def test_transformers_serves_what_it_loads(
    plain: Server, run: RunDirectory, merged: Path, encoder: Encoder, texts: list[dict[str, str]]
) -> None:
    model, asked = reference("merged", run, merged), questions(texts, encoder)
    assert_same_text(model, encoder, asked, lambda turns: written(plain.client, str(merged), turns))
    assert_same_text(model, encoder, asked, lambda turns: streamed(plain.client, str(merged), turns))


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_client_gets_the_labels_with_their_probabilities(
    request: pytest.FixtureRequest, run: RunDirectory, merged: Path, encoder: Encoder, texts: list[dict[str, str]], form: str
) -> None:
    server: Server = request.getfixturevalue("whole" if form == "merged" else "adapters")
    name = merged.name if form == "merged" else run.path.name
    model, labels, apart, taken = reference(form, run, merged), list(LABELS), 0.0, set()
    answers = json.loads((merged / "export.json").read_text())["task"]["answers"]
    for row in texts[:EXAMPLES]:
        with torch.no_grad():
            scores = label_scores(model, label_row([encoder.candidates(row["text"])]), 1, len(labels), CPU)[0]
        wanted = dict(zip(labels, torch.softmax(scores, 0).tolist(), strict=True))
        found = probabilities(server.client, name, encoder._with_system(encoder.question(row["text"])), answers)
        apart = max(apart, *(abs(found[label] - wanted[label]) for label in labels))
        assert max(found, key=found.__getitem__) == max(wanted, key=wanted.__getitem__)
        taken.add(max(found, key=found.__getitem__))
    print(f"{form}: {EXAMPLES} examples, no probability off by more than {apart:.1e}; labels that were taken: {sorted(taken)}")
    assert apart < 1e-3
    assert len(taken) > 1


# prompts


def ids_of(server: Server, model: str, turns: list[Any], **more: Any) -> list[int]:
    """The prompt of a request as the server tokenizes it."""
    reply: Any = server.client.chat.completions.create(
        model=model, messages=turns, max_tokens=1, extra_body={"return_token_ids": True}, **more
    )
    return list(reply.prompt_token_ids)


def test_the_servers_prompt_is_that_of_training(
    whole: Server, adapters: Server, run: RunDirectory, merged: Path, encoder: Encoder, texts: list[dict[str, str]]
) -> None:
    """By the tokenizer's template: classification with its system turn, chat with and without one."""
    for server, name in ((whole, merged.name), (adapters, run.path.name)):
        for row in texts[:20]:
            assert ids_of(server, name, encoder._with_system(encoder.question(row["text"]))) == encoder.prompt(
                encoder.question(row["text"])
            )
        chat = Encoder(encoder.tokenizer, Task(kind="chat"))
        for turns in PLAIN.values():
            asked = [turn for turn in turns if turn["role"] != "system"][:-1]
            for given in (asked, [SYSTEM, *asked]):
                assert ids_of(server, name, given) == chat.prompt(given)


def mistral_run(folder: Path, version: str, file: str, name: str) -> RunDirectory:
    """A tiny Mistral with random weights and Mistral's own tokenizer as the base of a run with a random adapter."""
    path = base(folder / version, version, file)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(path, mistral_format=False))
    config = transformers.MistralConfig(vocab_size=vocabulary, head_dim=64, **sizes)  # vLLM's attention on a CPU wants 32 or more
    transformers.MistralForCausalLM(config).save_pretrained(path)
    return finished(Recipe.model_validate({**recipe(path, name).model_dump(mode="json"), "run": {"dir": str(folder / "own")}}))


@pytest.fixture(scope="module", params=["adapter", "merged"])
def mistral(request: pytest.FixtureRequest, vllm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Encoder]]:
    """Behind the server as a base with its adapter, as a run of Mistral-7B usually is, and as a whole model."""
    folder = tmp_path_factory.mktemp("mistral")
    run = mistral_run(folder, "v3", "tokenizer.model.v3", "someone/tuned")
    place = run.path
    if request.param == "merged":
        place = folder / "merged" / "own"
        exported(run, place, "model.dtype=float32", form=Form.BF16, compare=False)
    with serving(place, "--engine", vllm, flags=VLLM_FLAGS, log=folder / "log", **VLLM_VARIABLES) as server:
        assert "--tokenizer-mode mistral" in server.log.read_text()
        yield server, load_encoder(run.recipe())


def test_a_tokenizer_without_tools_is_served(vllm: str, tmp_path: Path) -> None:
    """Version 1, of the first two Mistral-7B-Instructs: vLLM refuses to read calls where there are no tokens for them."""
    run = mistral_run(tmp_path, "v1", "tokenizer.model", "mistralai/Mistral-7B-Instruct-v0.1")
    encoder = load_encoder(run.recipe())
    with serving(run.path, "--engine", vllm, flags=VLLM_FLAGS, log=tmp_path / "log", **VLLM_VARIABLES) as server:
        for turns in ([user("Hello")], [SYSTEM, user("Hello")]):
            assert ids_of(server, "own", turns) == encoder.prompt(turns)


def test_the_servers_prompt_is_that_of_training_in_mistrals_own_format(mistral: tuple[Server, Encoder]) -> None:
    server, encoder = mistral
    for turns in PLAIN.values():
        asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        assert ids_of(server, "own", asked) == encoder.prompt(asked)
    call = {"id": "abcde1234", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ürümqi"}'}}
    called: Any = {"role": "assistant", "content": "", "tool_calls": [call]}
    result: Any = {"role": "tool", "content": '{"sky": "grün"}', "tool_call_id": "abcde1234", "name": "weather"}
    tools = [user("How is it outside?"), called, result]
    assert ids_of(server, "own", tools, tools=[WEATHER]) == encoder.prompt(tools, [WEATHER])


def test_a_labels_probability_in_mistrals_own_format(mistral: tuple[Server, Encoder]) -> None:
    """The tokens that the server continues with are those of the answers; two labels of which one begins the other."""
    server, encoder = mistral
    classifier = Encoder(encoder.tokenizer, Task(kind="classification", labels=["act", "action"]), encoder._format)
    found = classifier.candidates("Run.")
    turns = classifier.question("Run.")
    assert ids_of(server, "own", turns) == found.prompt
    told = probabilities(server.client, "own", turns, dict(zip(("act", "action"), found.answers, strict=True)))
    assert sum(told.values()) == pytest.approx(1)
    if (server.place / "model.safetensors").is_file():  # that a base with an adapter is what it should be is shown above
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(server.place, dtype=torch.float32).eval()
        with torch.no_grad():
            scores = label_scores(model, label_row([found]), 1, 2, CPU)[0]
        assert list(told.values()) == pytest.approx(torch.softmax(scores, 0).tolist(), abs=1e-4)


# what clients do wrong


GOOD = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
BAD: dict[str, tuple[bytes, set[int]]] = {
    "no JSON": (b"{ not json", {400, 422}),
    "nothing": (b"", {400, 422}),
    "a list": (b"[]", {400, 422}),
    "no messages": (b'{"max_tokens": 4}', {400, 422}),
    "messages of the wrong type": (b'{"messages": 7}', {400, 422}),
    "a role that is none": (b'{"messages": [{"role": "judge", "content": 3}]}', {400, 422}),
    "another model": (json.dumps({**GOOD, "model": "nobody/knows"}).encode(), {404}),
    "too long": (json.dumps({"messages": [{"role": "user", "content": "word " * 3000}]}).encode(), {400}),
    "no bytes of text": (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', {400, 422}),
    "less than no tokens": (json.dumps({**GOOD, "max_tokens": -1}).encode(), {400, 422}),
}
REQUESTS, CONNECTIONS = 200, 16


def ask_badly(server: Server, number: int) -> tuple[str, int]:
    """One of many requests: every fourth is right, every seventh is dropped, the others are wrong in one way or another."""
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=120)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
    try:
        if number % 4 == 0:
            connection.request("POST", "/v1/chat/completions", json.dumps(GOOD), headers)
            return "good", connection.getresponse().status
        if number % 7 == 0:
            connection.request("POST", "/v1/chat/completions", json.dumps({**GOOD, "max_tokens": 400, "stream": True}), headers)
            assert connection.sock is not None
            connection.sock.shutdown(socket.SHUT_RDWR)
            return "dropped", 0
        name = list(BAD)[number % len(BAD)]
        connection.request("POST", "/v1/chat/completions", BAD[name][0], headers)
        return name, connection.getresponse().status
    finally:
        connection.close()


def test_bad_requests_harm_nobody(whole: Server) -> None:
    """The right HTTP codes, no crash, no growth of memory, whatever 16 connections send; what is dropped is not written to its end."""

    def storm() -> list[tuple[str, int]]:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(lambda number: ask_badly(whole, number), range(REQUESTS)))

    storm()  # what is allocated once
    before = whole.memory()
    answered = storm()
    after = whole.memory()
    print(f"{before / 2**20:,.0f} MiB before {REQUESTS} requests, {after / 2**20:,.0f} MiB after")
    for name, code in answered:
        assert code in ({200} if name == "good" else {0} if name == "dropped" else BAD[name][1]), (name, code)
    assert {name for name, _ in answered} >= {"good", "dropped", *BAD}
    assert after < before + 32 * 2**20
    assert whole.get("/health") == ""
    wait_for(lambda: re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", whole.get("/metrics"), re.MULTILINE) == ["0.0"])


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/invocations", "/tokenize", "/metrics"])
def test_without_the_key_nothing_is_answered(whole: Server, path: str) -> None:
    for key in (None, "a-kex"):
        request = urllib.request.Request(f"{whole.url}{path}", headers={"Authorization": f"Bearer {key}"} if key else {})
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=10)


def test_an_answer_that_is_being_written_is_ended_when_the_server_is_stopped(merged: Path, vllm: str) -> None:
    with serving(merged, "--engine", vllm, flags=VLLM_FLAGS, log=merged.parent / "stopped.log", **VLLM_VARIABLES) as server:
        chunks = server.client.chat.completions.create(
            model=merged.name, messages=[user("Tell me something.")], max_tokens=60, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(iter(chunks))
        assert first.choices
        server.process.terminate()
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
