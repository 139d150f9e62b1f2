"""Is this machine ready? Versions, GPUs, attention kernels, disk, hub; each line says what to do where it is not."""

import importlib.util
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mistral_dist import assets
from mistral_dist.hub import endpoint, free_bytes, is_reachable
from mistral_dist.runtime import process
from mistral_dist.runtime.launcher import OLD_DRIVER

CORE = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")
BASE_GB = 15
"""A Mistral-7B in bfloat16 is 14.5 GB on disk."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    found: str
    ok: bool = True
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Look at everything, in the order in which a run would need it."""
    yield Finding("python", platform.python_version())
    yield from _versions()
    yield from _gpus()
    yield _attention()
    yield _compiler()
    yield _disk()
    yield _hub()


def tested_versions() -> dict[str, str]:
    """The versions that the tests ran with, from the constraints file."""
    file = assets.find("configs/constraints.txt")
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", file.read_text(encoding="utf-8"), re.MULTILINE))


def _versions() -> Iterator[Finding]:
    tested = tested_versions()
    for name in CORE:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "not installed", False, "pip install mistral-dist -c constraints.txt")
            continue
        same = found.split("+")[0] == tested[name]
        yield Finding(name, found, same, "" if same else f"tested with {tested[name]}; pip install {name}=={tested[name]}")


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None
        remedy = "this torch is a CPU build; reinstall torch with CUDA" if driver else "the demo runs without; a 7B wants one with 16 GB"
        if torch.version.cuda and torch.cuda.device_count():
            remedy = OLD_DRIVER
        yield Finding("GPU", "none", not driver, remedy)
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        fits = (card.major, card.minor) >= (8, 0)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        yield Finding(f"GPU {index}", f"{card.name}, {memory}", fits, "" if fits else "has no bfloat16; needs Ampere (2020) or newer")


def _attention() -> Finding:
    flash = importlib.util.find_spec("flash_attn") is not None
    if flash:
        return Finding("attention", f"flash-attn {metadata.version('flash_attn')}")
    return Finding(
        "attention", "PyTorch's SDPA", True, "on GPUs `pip install mistral-dist[flash-attn]` is faster on long packs (it compiles)"
    )


def _compiler() -> Finding:
    found = shutil.which("g++") and shutil.which("ninja")
    return Finding(
        "compiler", "g++ and ninja" if found else "none", True, "" if found else "only some of DeepSpeed's optional parts need one"
    )


def _disk() -> Finding:
    cache = Path(process.environment("HF_HOME", "~/.cache/huggingface")).expanduser()
    free = free_bytes(cache) / 1e9
    return Finding(
        "disk", f"{free:.0f} GB free for {cache}", free > BASE_GB, "" if free > BASE_GB else f"a 7B needs {BASE_GB} GB; set HF_HOME"
    )


def _hub() -> Finding:
    reachable = is_reachable()
    remedy = "" if reachable else "`mistral-dist fetch` where there is a network, or set model.path; the demo needs no hub"
    return Finding("hub", f"{endpoint()} {'answers' if reachable else 'does not answer'}", reachable, remedy)
