"""Which command serves what lies at a place, and what is refused before an engine is started."""

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_dist.base_cache import fingerprint
from mistral_dist.config import Recipe
from mistral_dist.errors import MachineError, ModelError, RecipeError, RunError
from mistral_dist.export.forms import Form
from mistral_dist.run import RunDirectory
from mistral_dist.serving.engines import Engine, command
from mistral_dist.serving.guard.mistral_dist_guard import RequireKey
from mistral_dist.serving.served import Served, open_served
from mistral_dist.serving.verb import KEY, Options, serve
from tests.conftest import WriteRecipe
from tests.launch import COMMAND, ROOT, mistral_dist
from tests.unit.test_export import exported, finished

WHOLE = Served("my", Path("/models/my"), "my", "float32")
ADAPTER = Served("a", Path("/base"), "mistralai/base", "bfloat16", Path("/runs/a/adapter"), rank=16, quantized=True)


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
    live = Served(run.path.name, Path(str(model.path)), "test/small", "float32", run.adapter, 4, quantized=True)
    assert open_served(run.path) == live
    assert open_served(merged) == Served("merged", merged, "merged", "float32")
    exported(run, tmp_path / "half", "model.dtype=bfloat16", form=Form.NF4, compare=False)
    assert open_served(tmp_path / "half").dtype == "bfloat16", "as it was exported, not as it was trained"
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
    (tmp_path / "SHA256SUMS").write_text("")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "modules_to_save": ["lm_head"]}))
    with pytest.raises(ModelError, match="trained lm_head whole, which no engine loads as an adapter; export it with --form merged-nf4"):
        open_served(tmp_path)


def test_vllm_serves_a_whole_model_greedily() -> None:
    words = command(Engine.VLLM, "vllm", [WHOLE], "127.0.0.1", 8000)
    assert words[:3] == ["vllm", "serve", "/models/my"]
    assert (after(words, "--served-model-name"), after(words, "--host"), after(words, "--port")) == ("my", "127.0.0.1", "8000")
    assert json.loads(after(words, "--override-generation-config")) == {"temperature": 0}
    assert (after(words, "--dtype"), after(words, "--generation-config"), after(words, "--tokenizer-mode")) == ("float32", "vllm", "hf")
    assert not {"--enable-lora", "--trust-remote-code", "--middleware", "--tool-call-parser"} & set(words)
    mistral = replace(WHOLE, mistral_common=True, trust_remote_code=True)
    assert "--tool-call-parser" not in command(Engine.VLLM, "vllm", [mistral], "h", 1), "vLLM does not start where no token is for them"
    words = command(Engine.VLLM, "vllm", [replace(mistral, tools=True)], "h", 1, key=True)
    assert (after(words, "--tokenizer-mode"), after(words, "--tool-call-parser")) == ("mistral", "mistral")
    assert "--trust-remote-code" in words
    assert after(words, "--middleware") == "mistral_dist_guard.RequireKey"


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
        (Engine.TRANSFORMERS, [replace(WHOLE, mistral_common=True)], "mistral-common encoded its conversations"),
    ],
)
def test_what_an_engine_cannot_serve_is_refused(engine: Engine, models: list[Served], told: str) -> None:
    with pytest.raises((RecipeError, ModelError), match=told):
        command(engine, engine, models, "127.0.0.1", 8000)


def test_transformers_serves_a_whole_model() -> None:
    words = command(Engine.TRANSFORMERS, "transformers", [WHOLE], "127.0.0.1", 8000)
    assert words == ["transformers", "serve", "/models/my", "--host", "127.0.0.1", "--port", "8000", "--dtype", "float32"]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for vLLM that prints its process, words and variables."""
    path = tmp_path / "bin" / "vllm"
    path.parent.mkdir()
    path.write_text(
        """#!/bin/sh\necho "pid $$"\nfor word; do echo "word $word"; done\necho "offline $HF_HUB_OFFLINE"\necho "path $PYTHONPATH"\n"""
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_beyond_this_machine_a_key_is_asked_for(merged: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with pytest.raises(RecipeError, match=rf"--host 0\.0\.0\.0: others could use the model without a key; `export {KEY}="):
        serve([merged], Options(host="0.0.0.0"), told.append, start=False)
    for host in ("127.0.0.1", "localhost", "::1"):
        serve([merged], Options(str(engine), host=host), told.append, start=False)
    assert "--middleware" not in " ".join(told)
    monkeypatch.setenv(KEY, "a-secret")
    with pytest.raises(RecipeError, match="transformers knows no API key"):
        serve([merged], Options(engine="transformers", host="::"), told.append, start=False)
    serve([merged], Options(str(engine), host="0.0.0.0"), told.append, start=False)
    assert "--middleware mistral_dist_guard.RequireKey" in told[-1]
    assert "a-secret" not in " ".join(told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--host", "0.0.0.0"), "--host: not as an engine's argument; it stands before `--`, where it is checked"),
        (("--port=1",), "--port: not as"),
        (("--api_key", "x"), f"--api-key: not as an engine's argument; set {KEY}"),
        (("--hos", "0.0.0.0"), "--hos: not as an engine's argument; it stands before"),
        (("--api-ke=x",), f"--api-ke: not as an engine's argument; set {KEY}"),
        (("--uds", "x"), "--uds: not as an engine's argument; leave it out"),
        (("runs/b",), "runs/b: one model is served; another adapter of the same base with --also runs/b"),
    ],
)
def test_an_engines_argument_goes_round_no_check(merged: Path, engine: Path, words: tuple[str, ...], told: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(told)):
        serve([merged], Options(str(engine), engine_args=words), print, start=False)


def answers(app: RequireKey, path: str, *headers: tuple[bytes, bytes], kind: str = "http", method: str = "POST") -> list[Any]:
    """What a request to it is answered."""
    sent: list[Any] = []

    async def ask() -> None:
        async def send(message: dict[str, Any]) -> None:
            sent.append(message.get("status") or message.get("code") or message.get("body"))

        async def receive() -> dict[str, Any]:
            return {}

        await app({"type": kind, "method": method, "path": path, "headers": headers}, receive, send)

    asyncio.run(ask())
    return sent


def test_the_guard_lets_nobody_in_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "a-secret")

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"status": 200})

    guarded, key = RequireKey(app), (b"authorization", b"Bearer a-secret")
    assert answers(guarded, "/invocations", key) == [200]
    assert answers(guarded, "/health") == [200]
    assert answers(guarded, "/v1/models", method="OPTIONS") == [200]
    for path in ("/invocations", "/v1/models", "/tokenize", "/health/", "//health"):
        assert answers(guarded, path)[0] == 401
    assert answers(guarded, "/v1/models", (b"authorization", b"Bearer a-secret2"))[0] == 401
    assert answers(guarded, "/v1/realtime", kind="websocket") == [1008]


def test_the_engine_takes_the_place_of_the_command(run: RunDirectory, engine: Path) -> None:
    """Those words that were told, ours first, then the user's; in this very process, where a signal finds it; no network."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = mistral_dist("serve", run.path, "--engine", engine, "--port", port)
    assert refused.returncode == 2
    assert f"127.0.0.1:{port}: cannot be listened on (Address already in use); choose another --port" in refused.stderr
    words = [*COMMAND, "serve", str(run.path), "--engine", str(engine), "--port", port, "--", "--max-model-len", "512"]
    environment = {**os.environ, KEY: "a-secret"}
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as started:
        said = started.communicate()[0].splitlines()
    assert said[0].startswith(f"{run.path.name}: is served on the base as published, not on the 4-bit one")
    told = shlex.split(said[1])
    assert told[:3] == ["$", str(engine), "serve"]
    assert told[-2:] == ["--max-model-len", "512"]
    assert said[2] == f"http://127.0.0.1:{port}/v1"
    assert said[3] == f"pid {started.pid}"
    assert [line.removeprefix("word ") for line in said if line.startswith("word ")] == told[2:]
    assert "offline 1" in said
    assert said[-1].startswith(f"path {ROOT / 'mistral_dist/serving/guard'}")
    assert "a-secret" not in " ".join(said)


def test_an_engine_that_is_not_there_is_told(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match=r"--engine vllm: not found; give its command's path: --engine /path/to/vllm"):
        serve([merged], Options(), print)
    with pytest.raises(MachineError, match="--engine /nowhere/vllm: not found"):
        serve([merged], Options(engine="/nowhere/vllm"), print)
    with pytest.raises(RecipeError, match="--engine sglang: there are vllm and transformers"):
        serve([merged], Options(engine="sglang"), print)
    told: list[str] = []
    serve([merged], Options(engine="transformers"), told.append, start=False)
    assert told[-1].startswith(f"$ {Path(sys.executable).with_name('transformers')} serve {merged}")


def test_an_adapter_finds_its_base_elsewhere(run: RunDirectory, merged: Path, tmp_path: Path) -> None:
    exported(run, tmp_path / "alone", form=Form.ADAPTER, compare=False)
    about = json.loads((tmp_path / "alone" / "export.json").read_text())
    about["model"]["path"] = "/on/another/machine"
    (tmp_path / "alone" / "export.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="test/small: the adapter's base is not on this machine; say where it is with --base FOLDER"):
        open_served(tmp_path / "alone")
    there = Path(str(run.recipe().model.path))
    assert open_served(tmp_path / "alone", there).weights == there
    with pytest.raises(ModelError, match=rf"{merged}: is not the base that {tmp_path / 'alone'} was trained on \(fingerprint"):
        open_served(tmp_path / "alone", merged)  # the adapter would be in it twice
    with pytest.raises(ModelError, match="no model there"):
        open_served(tmp_path / "alone", tmp_path)
    with pytest.raises(RunError, match="is a whole model, which needs none"):
        open_served(merged, merged)
    (tmp_path / "alone" / "adapter_config.json").unlink()
    with pytest.raises(RunError, match=r"lacks adapter_config\.json; export the run again"):
        open_served(tmp_path / "alone", merged)


def test_a_run_finds_its_base_elsewhere(run: RunDirectory, merged: Path, tmp_path: Path) -> None:
    recipe, moved = run.recipe(), tmp_path / "moved"
    shutil.copytree(run.path, moved)
    away = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "/on/another/machine"})})
    (moved / "recipe.yaml").write_text(away.dump())
    with pytest.raises(ModelError, match="say where it is with --base FOLDER"):
        open_served(moved)
    there = Path(str(recipe.model.path))
    assert open_served(moved, there) == replace(open_served(run.path), name="moved", adapter=moved / "adapter")
    (moved / "status.json").write_text(json.dumps({"base": fingerprint(recipe.model)}))
    assert open_served(moved, there).weights == there
    with pytest.raises(ModelError, match="is not the base that"):
        open_served(moved, merged)


def test_an_export_that_lacks_a_file_is_told_before_a_job_waits_for_it(merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "my")
    (tmp_path / "my" / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"my: lacks model\.safetensors; export the run again"):
        open_served(tmp_path / "my")
