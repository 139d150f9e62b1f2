"""Which command serves what lies at a place, and what is refused before an engine is started."""

import json
import shlex
import socket
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_dist.config import Recipe
from mistral_dist.errors import MachineError, ModelError, RecipeError, RunError
from mistral_dist.export.forms import Form
from mistral_dist.run import RunDirectory
from mistral_dist.serving.engines import Engine, command
from mistral_dist.serving.served import Served, open_served
from mistral_dist.serving.verb import KEY, Wish, serve
from tests.conftest import WriteRecipe
from tests.launch import mistral_dist
from tests.unit.test_export import exported, finished

WHOLE = Served("my", Path("/models/my"), "my")
ADAPTER = Served("a", Path("/base"), "mistralai/base", Path("/runs/a/adapter"), rank=16, dtype="bfloat16", quantized=True)


@pytest.fixture(scope="module")
def run(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return finished(Recipe.load(recipe_writer(tmp_path_factory.mktemp("serving"))(lora={"r": 4, "init_lora_weights": False})))


@pytest.fixture(scope="module")
def merged(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "merged"
    exported(run, out, form=Form.NF4, compare=False)
    return out


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_a_run_and_both_kinds_of_export_are_known(run: RunDirectory, merged: Path, tmp_path: Path) -> None:
    model = run.recipe().model
    live = Served(run.path.name, Path(str(model.path)), "test/small", run.adapter, 4, "float32", quantized=True)
    assert open_served(run.path) == live
    assert open_served(merged) == Served("merged", merged, "merged")
    exported(run, tmp_path / "alone", form=Form.ADAPTER, compare=False)
    assert open_served(tmp_path / "alone") == replace(live, name="alone", adapter=tmp_path / "alone")


def test_what_is_no_model_is_refused(run: RunDirectory, merged: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"neither a run \(recipe\.yaml\) nor an exported folder"):
        open_served(tmp_path)
    (tmp_path / "recipe.yaml").write_text(run.recipe().dump())
    with pytest.raises(RunError, match="has no adapter yet; `mistral-dist status"):
        open_served(tmp_path)
    (tmp_path / "export.json").write_text(json.dumps({"form": "merged-nf4"}))
    with pytest.raises(RunError, match="export the run again"):
        open_served(tmp_path)
    about = json.loads((merged / "export.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps({**about, "form": "adapter"}))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "modules_to_save": ["lm_head"]}))
    with pytest.raises(ModelError, match="trained lm_head whole, which no engine loads as an adapter; export it with --form merged-nf4"):
        open_served(tmp_path)


def test_vllm_serves_a_whole_model_greedily() -> None:
    words = command(Engine.VLLM, "vllm", [WHOLE], "127.0.0.1", 8000)
    assert words[:3] == ["vllm", "serve", "/models/my"]
    assert (after(words, "--served-model-name"), after(words, "--host"), after(words, "--port")) == ("my", "127.0.0.1", "8000")
    assert json.loads(after(words, "--override-generation-config")) == {"temperature": 0}
    assert "--enable-lora" not in words
    assert "--tokenizer-mode" not in words
    assert after(command(Engine.VLLM, "vllm", [replace(WHOLE, mistral_file=True)], "h", 1), "--tokenizer-mode") == "mistral"


def test_vllm_serves_a_base_with_its_adapters_by_name() -> None:
    words = command(Engine.VLLM, "vllm", [ADAPTER, replace(ADAPTER, name="b", adapter=Path("/b"), rank=20)], "127.0.0.1", 8000)
    assert words[2] == "/base"
    assert after(words, "--served-model-name") == "mistralai/base"
    assert (after(words, "--dtype"), after(words, "--max-loras"), after(words, "--max-lora-rank")) == ("bfloat16", "2", "32")
    modules = [json.loads(word) for word in words[words.index("--lora-modules") + 1 :]]
    assert [(module["name"], module["path"]) for module in modules] == [("a", "/runs/a/adapter"), ("b", "/b")]


@pytest.mark.parametrize(
    ("engine", "models", "told"),
    [
        (Engine.VLLM, [WHOLE, replace(WHOLE, name="b")], "b: is a whole model|my: is a whole model"),
        (Engine.VLLM, [ADAPTER, replace(ADAPTER, name="b", weights=Path("/other"))], "b: another base, dtype or tokenizer than a's"),
        (Engine.VLLM, [ADAPTER, replace(ADAPTER, adapter=Path("/b"))], "a: two models would have that name"),
        (Engine.VLLM, [replace(ADAPTER, rank=1024)], r"lora\.r=1024: vLLM loads adapters up to 512"),
        (Engine.TRANSFORMERS, [WHOLE, WHOLE], "transformers serves one model"),
        (Engine.TRANSFORMERS, [ADAPTER], "a: is an adapter, and transformers serves whole models"),
        (Engine.TRANSFORMERS, [replace(WHOLE, mistral_file=True)], "mistral-common encoded its conversations"),
    ],
)
def test_what_an_engine_cannot_serve_is_refused(engine: Engine, models: list[Served], told: str) -> None:
    with pytest.raises((RecipeError, ModelError), match=told):
        command(engine, engine, models, "127.0.0.1", 8000)


def test_transformers_serves_a_whole_model() -> None:
    words = command(Engine.TRANSFORMERS, "transformers", [WHOLE], "127.0.0.1", 8000)
    assert words == ["transformers", "serve", "/models/my", "--host", "127.0.0.1", "--port", "8000"]


def test_beyond_this_machine_a_key_is_asked_for(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with pytest.raises(RecipeError, match=rf"--host 0\.0\.0\.0: others could use the model without a key; `export {KEY}="):
        serve([merged], Wish(host="0.0.0.0"), told.append, start=False)
    monkeypatch.setenv(KEY, "a-secret")
    with pytest.raises(RecipeError, match="transformers knows no API key"):
        serve([merged], Wish(engine="transformers", host="::"), told.append, start=False)
    for host in ("0.0.0.0", "127.0.0.1", "localhost", "::1"):
        serve([merged], Wish(host=host), told.append, start=False)
    assert "a-secret" not in " ".join(told)


def test_the_engine_takes_the_place_of_the_command(run: RunDirectory, tmp_path: Path) -> None:
    """A stand-in that prints its words and variables: those that were told, ours first, then the user's; no network."""
    engine = tmp_path / "vllm"
    engine.write_text('#!/bin/sh\necho "pid $$"\nfor word; do echo "word $word"; done\necho "offline $HF_HUB_OFFLINE"\n')
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    done = mistral_dist("serve", run.path, "--engine", engine, "--dry-run", "--", "--max-model-len", "512")
    assert done.returncode == 0, done.stderr
    note, line = done.stdout.splitlines()
    assert note.startswith(f"{run.path.name}: is served on the base as published, not on the 4-bit one")
    words = shlex.split(line)
    assert words[:3] == ["$", str(engine), "serve"]
    assert words[-2:] == ["--max-model-len", "512"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = mistral_dist("serve", run.path, "--engine", engine, "--port", port)
    assert refused.returncode == 2
    assert f"127.0.0.1:{port}: cannot be listened on (Address already in use); choose another --port" in refused.stderr
    started = mistral_dist("serve", run.path, "--engine", engine, "--port", port, "--", "--max-model-len", "512")
    said = started.stdout.splitlines()
    assert [line.removeprefix("word ") for line in said if line.startswith("word ")] == shlex.split(said[1])[2:]
    assert said[-1] == "offline 1"


def test_an_engine_that_is_not_there_is_told(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match=r"--engine vllm: not found; give its command's path: --engine /path/to/vllm"):
        serve([merged], Wish(), print)
    with pytest.raises(MachineError, match="--engine /nowhere/vllm: not found"):
        serve([merged], Wish(engine="/nowhere/vllm"), print)
    with pytest.raises(RecipeError, match="--engine sglang: there are vllm and transformers"):
        serve([merged], Wish(engine="sglang"), print)
