"""Which base a run was trained on: told from the content of its files, wherever they lie, cheaply the second time."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_dist import base_cache
from mistral_dist.base_cache import fingerprint
from mistral_dist.errors import ModelError
from tests.unit.test_base import copy, home, model_at  # noqa: F401 - fixtures


def flip(file: Path) -> None:
    """One bit of the last value; size and times stay."""
    stat = file.stat()
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        (last,) = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("cache", ["a folder", "off"])
def test_a_base_is_known_by_its_content(
    quantization: str,
    cache: str,
    copy: Path,  # noqa: F811
    home: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base_cache, "SAME_MOMENT", 0)
    if cache == "off":
        monkeypatch.setenv("MISTRAL_DIST_CACHE", "off")
    first = fingerprint(model_at(copy, quantization=quantization))
    assert fingerprint(model_at(copy, quantization=quantization)) == first
    other = shutil.copytree(copy, tmp_path / "another folder")
    assert fingerprint(model_at(other, quantization=quantization)) == first
    flip(other / "model.safetensors")
    assert fingerprint(model_at(other, quantization=quantization)) != first
    assert fingerprint(model_at(copy, quantization=quantization)) == first
    assert home.exists() == (cache != "off")


def test_code_of_its_own_belongs_to_a_base(copy: Path, home: Path) -> None:  # noqa: F811
    first = fingerprint(model_at(copy))
    (copy / "modeling_own.py").write_text("scale = 1\n")
    second = fingerprint(model_at(copy))
    (copy / "modeling_own.py").write_text("scale = 2 # another forward\n")
    assert len({first, second, fingerprint(model_at(copy))}) == 3


def test_the_settings_that_change_the_numbers_belong_to_it(copy: Path, home: Path) -> None:  # noqa: F811
    found = {fingerprint(model_at(copy, dtype, quantization)) for dtype in ("float32", "bfloat16") for quantization in ("nf4", "none")}
    assert len(found) == 4
    assert fingerprint(model_at(copy, "auto")) == fingerprint(model_at(copy, "bfloat16")), "which is what auto means"


def test_a_base_of_the_same_shapes_is_another_one(copy: Path, home: Path) -> None:  # noqa: F811
    """Also where the sums of all bytes are equal: two values have changed places."""
    first = fingerprint(model_at(copy))
    tensors = load_file(copy / "model.safetensors")
    norm = tensors["model.norm.weight"] = tensors["model.norm.weight"].clone()
    a, b = 0, int((norm != norm[0]).nonzero()[0])
    norm[[a, b]] = norm[[b, a]]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(model_at(copy)) != first


def test_files_are_read_once_and_again_after_a_change(copy: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(base_cache, "SAME_MOMENT", 0)
    read: list[str] = []
    real = base_cache.sha256
    monkeypatch.setattr(base_cache, "sha256", lambda file: (read.append(file.name), real(file))[1])
    first = fingerprint(model_at(copy))
    assert sorted(read) == ["config.json", "model.safetensors"]
    assert fingerprint(model_at(copy)) == first
    assert len(read) == 2
    flip(copy / "model.safetensors")
    assert fingerprint(model_at(copy)) != first
    assert len(read) == 4


def test_where_nothing_can_be_kept_the_files_are_read_each_time(copy: Path, home: Path) -> None:  # noqa: F811
    first = fingerprint(model_at(copy))
    shutil.rmtree(home.parent)
    home.parent.write_text("a file, in the place of the folder")
    assert fingerprint(model_at(copy)) == first


def test_weights_in_other_files_count_as_well(copy: Path, home: Path) -> None:  # noqa: F811
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    first = fingerprint(model_at(copy))
    flip(copy / "pytorch_model.bin")
    assert fingerprint(model_at(copy)) != first


def test_a_base_that_cannot_be_read_is_the_users_to_mend(copy: Path, home: Path) -> None:  # noqa: F811
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-00001.safetensors"}}')
    with pytest.raises(ModelError, match=r"base: cannot be read .*model-00001\.safetensors.*; fetch or copy the base again"):
        fingerprint(model_at(copy))
