"""Loading the base: what `from_pretrained` makes of it, to the bit, from its files and from the cache."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mistral_dist import base, base_cache
from mistral_dist.base import _settings, load_base, quantize
from mistral_dist.config import Model
from mistral_dist.errors import ModelError

CPU = torch.device("cpu")
NOTHING = "off"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("MISTRAL_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def copy(small_model: Path, tmp_path: Path) -> Path:
    """A base that a test may spoil; old enough to be vouched for by its times."""
    shutil.copytree(small_model, tmp_path / "base")
    return tmp_path / "base"


def model_at(path: Path, dtype: str = "float32", quantization: str = "nf4") -> Model:
    return Model.model_validate({"name": "test/small", "path": str(path), "dtype": dtype, "quantization": quantization})


def from_pretrained(path: Path, dtype: torch.dtype, quantization: str) -> Any:
    """What this package did before it streamed, and what others do."""
    settings = _settings(dtype) if quantization == "nf4" else None
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=settings, attn_implementation="sdpa")


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def quant_state(state: Any) -> dict[str, Any]:
    """All of a quantisation state, its second level included; tensors as their bits."""
    values = dict(vars(state))
    if values.get("state2") is not None:
        values["state2"] = quant_state(values["state2"])
    return {
        key: (value.dtype, value.shape, raw(value.reshape(-1)).tolist()) if torch.is_tensor(value) else value
        for key, value in values.items()
    }


def assert_same(found: Any, wanted: Any) -> None:
    """Every bit of two models: parameters, their kinds and quantisation, buffers, ties, configurations."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(wanted, kind)())
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert (type(ours[name]), ours[name].dtype, ours[name].shape) == (type(tensor), tensor.dtype, tensor.shape), name
            assert torch.equal(raw(ours[name].reshape(-1)), raw(tensor.reshape(-1))), name
            if isinstance(tensor, bnb.nn.Params4bit):
                assert quant_state(ours[name].quant_state) == quant_state(tensor.quant_state), name
                plain = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized")
                assert [getattr(ours[name], key) for key in plain] == [getattr(tensor, key) for key in plain]
    assert [(name, type(module)) for name, module in found.named_modules()] == [(n, type(m)) for n, m in wanted.named_modules()]
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == (wanted.lm_head.weight is wanted.model.embed_tokens.weight)
    wanted.config.use_cache = False
    assert found.config.to_dict() == wanted.config.to_dict()
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert found.training == wanted.training
    assert found.name_or_path == wanted.name_or_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_base_is_that_of_from_pretrained_to_the_bit(
    small_model: Path, home: Path, dtype: torch.dtype, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built into the cache and read from it, read from it again, and without a cache."""
    wanted = from_pretrained(small_model, dtype, quantization)
    model = model_at(small_model, str(dtype).removeprefix("torch."), quantization)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)  # not the way back
    assert_same(load_base(model, CPU, "sdpa"), wanted)
    kept = sorted(home.rglob("*.safetensors"))
    assert bool(kept) == (quantization == "nf4")
    monkeypatch.setattr(base, "quantize", None)  # nothing is quantized a second time
    assert_same(load_base(model, CPU, "sdpa"), wanted)
    monkeypatch.undo()
    monkeypatch.setenv("MISTRAL_DIST_CACHE", NOTHING)
    assert_same(load_base(model, CPU, "sdpa"), wanted)
    assert sorted(home.rglob("*.safetensors")) == kept


def test_an_untied_base_in_shards_is_loaded_the_same(
    small_model: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Mistral-7B is: an output head of its own, several files. The cache has several, too."""
    untied = transformers.AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(torch.randn_like(untied.lm_head.weight))
    untied.save_pretrained(tmp_path / "untied", max_shard_size="30MB")
    assert len(list((tmp_path / "untied").glob("*.safetensors"))) > 2
    wanted = from_pretrained(tmp_path / "untied", torch.bfloat16, "nf4")
    monkeypatch.setattr(base, "SHARD_BYTES", 40_000_000)
    for _ in range(2):
        assert_same(load_base(model_at(tmp_path / "untied", "bfloat16"), CPU, "sdpa"), wanted)
    assert len(list(home.rglob("base-*.safetensors"))) == 3  # embedding and head are 57 MB each


@pytest.mark.parametrize("shape", [(64, 64), (96, 200), (34, 62), (1, 64)])
def test_slices_are_quantized_as_the_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a last block is not full, and where the slices do not divide the weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = bnb.nn.Params4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    wanted = {"weight": whole.data, **{f"weight.{key}": part for key, part in whole.quant_state.as_dict(packed=True).items()}}
    monkeypatch.setattr(base, "SLICE", 64 * 7)
    found = quantize(weight, torch.bfloat16, CPU)
    assert list(found) == list(wanted) == list(base._PARTS)
    assert all(torch.equal(raw(found[key].reshape(-1)), raw(wanted[key].reshape(-1))) for key in wanted)


def test_a_changed_base_is_never_taken_from_the_cache(copy: Path, home: Path) -> None:
    """One value of one tensor, in a file of the same size and the same modification time."""
    model = model_at(copy)
    before = load_base(model, CPU, "sdpa")
    assert base_cache.find(model, "cpu") is None  # changed a moment ago: its times vouch for nothing
    file = copy / "model.safetensors"
    stat = file.stat()
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].clone()
    tensors["model.norm.weight"][7] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    after = load_base(model, CPU, "sdpa")
    difference = (after.model.norm.weight - before.model.norm.weight).abs()
    assert difference.nonzero().tolist() == [[7]]
    assert len(list(home.glob("*/manifest.json"))) == 2


def test_files_are_hashed_once(copy: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_cache, "SAME_MOMENT", 0)
    model = model_at(copy)
    load_base(model, CPU, "sdpa")
    monkeypatch.setattr(base_cache, "sha256", None)
    assert base_cache.find(model, "cpu") is not None
    assert base_cache.find(model, "cuda") is None
    assert base_cache.find(model_at(copy, "bfloat16"), "cpu") is None
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert base_cache.find(model, "cpu") is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "manifest"])
def test_a_damaged_cache_is_built_again(copy: Path, home: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_cache, "SAME_MOMENT", 0)
    model = model_at(copy)
    wanted = load_base(model, CPU, "sdpa")
    file = next(home.rglob("base-00001.safetensors"))
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-1000] ^= 4
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "gone":
        file.unlink()
    else:
        (file.parent / "manifest.json").write_text('{"files": ')
    wanted.config.use_cache = True
    assert_same(load_base(model, CPU, "sdpa"), wanted)
    monkeypatch.setattr(base, "quantize", None)
    assert_same(load_base(model, CPU, "sdpa"), wanted)
    assert len(list(home.glob("test-small-*"))) == 1


@pytest.mark.parametrize("why", ["disk", "place", "writing"])
def test_no_run_fails_for_a_cache(
    small_model: Path, home: Path, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk without room, a folder that is none, a write that fails half-way."""
    said = {"disk": "it needs 0.1 GB, 0.0 GB are free", "place": "Not a directory", "writing": "No space left"}[why]
    if why == "disk":
        monkeypatch.setattr(base_cache, "free_bytes", lambda folder: 1)
    elif why == "place":
        home.parent.write_text("a file")
    else:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(base, "save_file", full)
    wanted = from_pretrained(small_model, torch.float32, "nf4")
    assert_same(load_base(model_at(small_model), CPU, "sdpa"), wanted)
    out = capsys.readouterr().out
    assert said in out and out.count("note: ") == 1 and "MISTRAL_DIST_CACHE" in out
    assert not list(home.glob("*test-small*")) if home.is_dir() else True


def test_a_base_that_changes_while_it_is_read_is_not_kept(copy: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = base._write

    def touched(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> dict[str, Any]:
        (copy / "config.json").touch()
        return real(tensors, folder)

    monkeypatch.setattr(base, "_write", touched)
    load_base(model_at(copy), CPU, "sdpa")
    assert not list(home.glob("*test-small*"))


def test_one_process_builds_and_the_others_wait(copy: Path, home: Path) -> None:
    """Four start at once; a killed builder's leftover is cleared."""
    model = model_at(copy)
    code = (
        "import sys, torch; from pathlib import Path; from mistral_dist import base, base_cache; from mistral_dist.config import Model\n"
        "real = base._write\n"
        "base._write = lambda *a: (print('built', flush=True), real(*a))[1]\n"
        "base.load_base(Model.model_validate_json(sys.argv[1]), torch.device('cpu'), 'sdpa')\n"
        "print('loaded')\n"
    )
    words = [sys.executable, "-c", code, model.model_dump_json()]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(process.communicate(timeout=200)[0] for process in started)
    assert said.count("built") == 1 and said.count("loaded") == 3
    place = next(home.glob("test-small-*"))
    leftover = base_cache.aside_of(place)
    place.rename(leftover)
    load_base(model, CPU, "sdpa")
    assert place.is_dir() and not leftover.exists()


def test_a_builder_that_does_not_end_is_not_waited_for_for_ever(
    copy: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock is another process's: within one, it is the process's own."""
    home.mkdir(parents=True)
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, str(home / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    monkeypatch.setattr(base_cache, "PATIENCE", 0.5)
    load_base(model_at(copy), CPU, "sdpa")
    assert "another process has been building there" in capsys.readouterr().out
    threading.Thread(target=holder.communicate).start()
    holder.wait(timeout=60)


def test_the_launcher_has_it_built_ahead(copy: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that ends; with bfloat16, on whatever this machine computes on."""
    said: list[str] = []
    monkeypatch.setattr(base_cache, "SAME_MOMENT", 0)
    os.utime(copy / "config.json")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_at(copy, "bfloat16")
    base_cache.ensure_ahead(model, device, said.append)
    assert len(said) == 1 and "quantizing test/small once for this machine (0.1 GB)" in said[0]
    place = next(home.glob("test-small-*"))
    manifest = json.loads((place / "manifest.json").read_text())
    base_cache.ensure_ahead(model_at(copy, quantization="none"), device, said.append)
    load_base(model, torch.device(device), "sdpa")
    assert json.loads((place / "manifest.json").read_text())["id"] == manifest["id"]
    assert len(said) == 1


def test_what_cannot_be_loaded_is_said_in_one_line(copy: Path, home: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, the first is model.norm.weight; fetch or copy"):
        load_base(model_at(copy), CPU, "sdpa")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"cannot be loaded as a causal language model: .*"):
        load_base(model_at(copy), CPU, "sdpa")
    file.unlink()
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match=r"index.json: is damaged; fetch"):
        load_base(model_at(copy), CPU, "sdpa")


def test_weights_of_another_kind_are_left_to_the_library(small_model: Path, copy: Path, home: Path) -> None:
    """A .bin base, and one that was saved quantized."""
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    wanted = from_pretrained(small_model, torch.float32, "nf4")
    found = load_base(model_at(copy), CPU, "sdpa")
    found.name_or_path = found.config.name_or_path = str(small_model)
    assert_same(found, wanted)
    assert not home.exists()
