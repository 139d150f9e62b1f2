"""Save, verify, find, retain: whole or not there, and of no particular topology.

    checkpoint-100/
      adapter/                 PEFT's own format; float32, so these are the master weights
      optimizer.safetensors    AdamW's moments by parameter name, float32
      progress.json            step, cursor (of all lanes), guard, validation, metric, seed of all noise; fingerprints of data, encoding,
                               base
      manifest.json            size and SHA-256 of each file, versions; written last

A checkpoint is written aside, synced, checksummed and renamed. Nothing in it depends on the number of ranks or the ZeRO
stage. All noise is drawn from (seed, step, slot), so the seed and the step are the whole state of every random generator.
"""

import errno
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mistral_dist import config
from mistral_dist.data.cursor import Cursor
from mistral_dist.errors import CheckpointError
from mistral_dist.files import aside_of, publish, remove, sha256
from mistral_dist.guards import Guard
from mistral_dist.validation import Validation

Tensors = Mapping[str, torch.Tensor]
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "mistral-dist")
NAME = re.compile(r"checkpoint-(\d+)")
ADAPTER_NAME = re.compile(r"(\.modules_to_save)?\.default(?=\.|$)")
UNREADABLE = "cannot be read"
"""How it is told of a checkpoint that the file system does not give."""
BESIDE_TENSORS = 64 * 1024
"""Bytes of a checkpoint's JSON files and headers, generously."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Steps made."""
    cursor: Cursor = Cursor()
    """Where the data stand."""
    guard: Guard = Guard()
    """What the guards remember."""
    validation: Validation = Validation()
    """What the validations have shown."""

    @property
    def updates(self) -> int:
        """Updates of the adapter made: a step whose update was left out is none."""
        return self.step - len(self.guard.untrained)

    @property
    def reached(self) -> float:
        """Up to where the metrics are made, as `journal.step_of` counts: half a step further where this step was validated, too."""
        return self.step + (0.5 if self.validation.step == self.step else 0.0)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is made of: copies, in which nothing changes while the training goes on."""

    progress: Progress
    adapter: Tensors
    """The trainable parameters by name, whole, float32, on the CPU."""
    adapter_config: Any
    moments: Tensors
    """AdamW's moments by `parameter.moment`, whole, float32, on the CPU."""
    facts: Mapping[str, Any]
    """What resume checks, and what a reader wants to know."""
    metric: float | None = None
    """The loss on the validation examples at this step; None where it was not taken."""

    @property
    def bytes(self) -> int:
        """The room that it needs on a disk."""
        return sum(tensor.nbytes for tensors in (self.adapter, self.moments) for tensor in tensors.values()) + BESIDE_TENSORS


@dataclass(frozen=True)
class Noted:
    """What a checkpoint notes of validations."""

    metric: float | None = None
    """The loss on the validation examples at its step; None where it was not taken."""
    best_step: int = 0
    """Where the best one up to it was; 0 where there was none."""


def save(folder: Path, snapshot: Snapshot, rules: config.Checkpoint, permit: Callable[[], None] = lambda: None, reach: int = 0) -> Path:
    """Write `checkpoint-<step>` into `folder`, then drop what neither the rules nor the guards (`reach`) keep; return its path.

    `permit` is called when all is written, before it is published, and may raise. Raises CheckpointError where the adapter
    must not be saved, OSError where the checkpoint cannot be written; those before it are untouched then.
    """
    target = folder / f"checkpoint-{snapshot.progress.step}"
    aside = aside_of(target)
    try:
        aside.mkdir(parents=True)
        save_adapter(aside / "adapter", snapshot.adapter, snapshot.adapter_config)
        write_tensors(aside / "optimizer.safetensors", snapshot.moments)
        _write_json(aside / "progress.json", {**asdict(snapshot.progress), "metric": snapshot.metric, **snapshot.facts})
        _write_json(aside / "manifest.json", _manifest(aside))
        permit()
        publish(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    step = snapshot.progress.step
    with suppress(OSError):  # the checkpoint is there; what is too many is dropped after the next one
        _retain(folder, step, rules, step - snapshot.progress.guard.back(step, reach) if reach else 0)
    return target


def save_adapter(folder: Path, adapter: Tensors, peft_config: Any) -> None:
    """Write an adapter in PEFT's format and pass it through the gate.

    `adapter`: the trainable parameters by name. Raises CheckpointError where it is empty or not finite, OSError where it
    cannot be written, or where the file read back differs from it in a single bit.
    """
    folder.mkdir(parents=True)
    named = {peft_name(name): tensor.detach().contiguous() for name, tensor in adapter.items()}
    if not named or any(tensor.numel() == 0 for tensor in named.values()):
        raise CheckpointError("the adapter is empty: its parameters were not gathered from their shards")
    # by NumPy: PyTorch would set a team of threads to it, beside that of the steps, whose bits depend on how many there are
    bad = [name for name, tensor in named.items() if not np.isfinite(tensor.numpy()).all()]
    if bad:
        raise CheckpointError(f"the adapter holds values that are not finite, first in {bad[0]}")
    write_tensors(folder / "adapter_model.safetensors", named)
    peft_config.save_pretrained(str(folder))
    try:
        read = load_file(folder / "adapter_model.safetensors")
    except SafetensorError as error:
        raise OSError(errno.EIO, f"the adapter cannot be read back ({error})", str(folder)) from None
    if read.keys() != named.keys() or any(_bits(read[name]) != _bits(tensor) for name, tensor in named.items()):
        raise OSError(errno.EIO, "the adapter read back is not the one that is trained; is the disk sound?", str(folder))


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, str]:
    """What a tensor holds, bit by bit (XXH3, 128 bits): 0.0 and -0.0 differ."""
    return tensor.dtype, tensor.shape, xxhash.xxh128_hexdigest(tensor.numpy().data)


def publish_adapter(target: Path, adapter: Tensors, peft_config: Any, tokenizer: Any, card: str) -> None:
    """Put the result of a run in its place: adapter, tokenizer, model card. Raises as `save` does."""
    aside = aside_of(target)
    try:
        save_adapter(aside, adapter, peft_config)
        tokenizer.save_pretrained(str(aside))
        (aside / "README.md").write_text(card, encoding="utf-8")
        publish(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_adapter(folder: Path, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Copy an adapter, saved in a folder of its own, into the parameters (by name), before they are sharded.

    Raises CheckpointError where names or shapes differ.
    """
    read = load_file(folder / "adapter_model.safetensors")
    named = {peft_name(name): parameter for name, parameter in parameters.items()}
    if read.keys() != named.keys():
        odd = sorted(read.keys() ^ named.keys())
        raise CheckpointError(f"{folder}: not the adapter of this recipe; first difference: {odd[0]}")
    for name, parameter in named.items():
        if read[name].shape != parameter.shape:
            raise CheckpointError(f"{folder}: {name} has shape {tuple(read[name].shape)}, the recipe gives {tuple(parameter.shape)}")
        parameter.data.copy_(read[name])


def content_of(folder: Path) -> str:
    """A fingerprint of the weights of an adapter that is saved in a folder of its own."""
    return str(xxhash.xxh128((folder / "adapter_model.safetensors").read_bytes()).hexdigest())


def adapter_of(folder: Path, parameters: Iterable[str]) -> dict[str, torch.Tensor]:
    """A checkpoint's adapter by the names of its parameters, float32, on the CPU."""
    read = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {name: read[peft_name(name)] for name in parameters}


def load_moments(folder: Path) -> dict[str, torch.Tensor]:
    """AdamW's moments by `parameter.moment`, float32, on the CPU."""
    return load_file(folder / "optimizer.safetensors")


def load_progress(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """How far the checkpoint is, and the facts that were saved with it, the metric among them."""
    facts = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    cursor, guard = Cursor.from_json(facts.pop("cursor")), Guard.from_json(facts.pop("guard"))
    return Progress(facts.pop("step"), cursor, guard, Validation(**facts.pop("validation", {}))), facts


def peft_name(parameter: str) -> str:
    """A parameter's name in PEFT's files, which leave out the adapter's own name; a layer that is trained whole is named as in the base."""
    return ADAPTER_NAME.sub("", parameter)


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that verifies. Nothing is moved: for those who only read."""
    return next((path for path in reversed(_all(folder)) if verify(path) is None), None)


def latest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each one that was newer and does not.

    Where there is one, the damaged ones are renamed to `damaged-checkpoint-...`, so that they neither count among the ones that are
    kept nor are looked at again. With none they keep their names: the next start must not take the run for a new one. One that
    cannot be read keeps its name, too, since a file server may come back.
    """
    problems: dict[Path, str] = {}
    found = None
    for path in reversed(_all(folder)):
        problem = verify(path)
        if problem is None:
            found = path
            break
        problems[path] = problem
    for path, problem in problems.items() if found else ():
        if not problem.startswith(UNREADABLE):
            _set_aside(path)
    return found, [
        f"{path.name} {problem}" if problem.startswith(UNREADABLE) else f"{path.name} is damaged ({problem})"
        for path, problem in problems.items()
    ]


def _set_aside(damaged: Path) -> None:
    taken = {path.name for path in damaged.parent.iterdir()}
    names = (f"damaged-{damaged.name}-{number}" for number in count(1))
    damaged.rename(damaged.with_name(next(name for name in names if name not in taken)))


def retreat(folder: Path, *, before: int) -> Path | None:
    """The newest good checkpoint from before a step; those after it are removed, since the run takes another way from there."""
    later = [path for path in _all(folder) if _step(path) >= before]
    found = next((path for path in reversed(_all(folder)) if path not in later and verify(path) is None), None)
    for path in later if found else []:
        remove(path)
    return found


def best_good(folder: Path, step: int) -> Path | None:
    """The good checkpoint with the lowest validation loss: that of `step`, where the run's best was, or the next best that is there."""
    found = {_step(path): path for path in _all(folder)}
    ranked = sorted((metric, other) for other, path in found.items() if (metric := _noted(path).metric) is not None)
    paths = (found[other] for other in [step, *(other for _, other in ranked)] if other in found)
    return next((path for path in paths if verify(path) is None), None)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where every byte is as it was written.

    Begins with `UNREADABLE` where the file system does not give it, which says nothing about its bytes.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        problems = (_problem(path / name, name, entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items())
        # hidden ones are left by file servers and file managers
        odd = {str(file.relative_to(path)) for file in _files(path) if not file.name.startswith(".")} - {
            *manifest["files"],
            "manifest.json",
        }
        return next((problem for problem in problems if problem), f"{min(odd)} is not of it" if odd else None)
    except FileNotFoundError:
        return "manifest.json is missing"
    except OSError as error:
        return f"{UNREADABLE} ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"


def _problem(file: Path, name: str, size: int, wanted: str) -> str | None:
    try:
        found = file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    if found != size:
        return f"{name} has {found} bytes, not {size}"
    return f"{name} has another checksum" if sha256(file) != wanted else None


def written_with(path: Path) -> dict[str, str]:
    """The versions that a checkpoint was written with."""
    return dict(json.loads((path / "manifest.json").read_text(encoding="utf-8"))["versions"])


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers depend on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def _all(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def to_drop(found: Mapping[int, Noted], newest: int, rules: config.Checkpoint, reach: int = 0) -> set[int]:
    """The steps whose checkpoints go: all but the last ones, the best ones, every n-th, those to go back to, and always the newest.

    `found`: what the checkpoint of each step notes; a metric of None or NaN is never among the best, of equal ones the first is.
    `newest`: the one that has just been written, which is good for certain. One that was saved only because a validation was good is
    none of the last: frequent ones would push out what a run can go back to. Where best ones are kept at all, those that the last
    ones know as the best are, too, since the run may go back to these.
    """
    measured = [(noted.metric, step) for step, noted in found.items() if noted.metric is not None and not math.isnan(noted.metric)]
    best = {step for _, step in sorted(measured)[: rules.save_best_limit]}
    regular = {step for step in found if rules.keep_every_steps and step % rules.keep_every_steps == 0}
    due = sorted(step for step, noted in found.items() if noted.metric is None or step % rules.save_steps == 0)
    last = {newest, *due[-rules.save_total_limit :]}
    known = {found[step].best_step for step in last & found.keys() if rules.save_best_limit}
    return found.keys() - best - regular - last - known - to_go_back_to(found, newest, reach)


def to_go_back_to(found: Iterable[int], newest: int, reach: int) -> set[int]:
    """Of these steps' checkpoints the newest that is `reach` steps old or more, and the one after it.

    The second becomes the first when it is old enough, so there is always one, and none is older than twice the reach and the
    steps between two saves.
    """
    if reach == 0:
        return set()
    old = max((step for step in found if step <= newest - reach), default=0)
    after = min((step for step in found if step > old), default=newest)
    return {old, after} - {0}


def _retain(folder: Path, newest: int, rules: config.Checkpoint, reach: int) -> None:
    found = {_step(path): path for path in _all(folder)}
    for step in to_drop({step: _noted(path) for step, path in found.items()}, newest, rules, reach):
        remove(found[step])


def _noted(path: Path) -> Noted:
    """Nothing where it cannot be read: `latest_good` will say what is wrong with that checkpoint."""
    try:
        progress, facts = load_progress(path)
        metric = facts.get("metric")
        return Noted(float(metric) if isinstance(metric, int | float) else None, progress.validation.best_step)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Noted()


def _manifest(folder: Path) -> dict[str, Any]:
    return {
        "files": {str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in _files(folder)},
        "versions": versions(),
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_tensors(file: Path, tensors: Tensors) -> None:
    """Write contiguous tensors as a safetensors file. Raises OSError where that cannot be, also for what the library wraps."""
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(file)) from error
    # the library leaves it to its owner alone; whoever serves the adapter must be able to read it
    file.chmod(0o644)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
