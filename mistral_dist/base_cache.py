"""Quantized bases kept on this machine: which one is which, built once, found again in milliseconds.

An entry is a folder of safetensors and a manifest. Its name is a digest of everything that decides its bytes: the SHA-256
of each of the base's files, the settings, the libraries. Files are hashed whole, once; after that their size, times and
inode vouch for them. By the same hashes a run knows its base again (`fingerprint`). Nothing here imports torch: a launcher
looks before it starts anything.
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mistral_dist.config import Model, digest
from mistral_dist.errors import ModelError, RunError
from mistral_dist.files import aside_of, asides_of, publish, read_json, remove, sha256, write_text
from mistral_dist.hub import free_bytes, local_path
from mistral_dist.runtime import process

VARIABLE = "MISTRAL_DIST_CACHE"
"""A folder for the cache, or `off`."""
DEFAULT = "~/.cache/mistral-dist"
MANIFEST = "manifest.json"
OTHER_WEIGHTS = (".bin", ".gguf", ".safetensors")
SETTINGS = {"quant_type": "nf4", "blocksize": 64, "double_quant": True}
LIBRARIES = ("bitsandbytes", "torch", "transformers")
"""What the bytes of a quantized base depend on."""
SAME_MOMENT = 2_000_000_000
"""Nanoseconds. A file that changed so short a time ago could change again within its time stamp, as in git's index."""
HASHERS = 4
"""Files that are hashed at once: SHA-256 takes a core for some 1.4 GB/s."""
PATIENCE = 540.0
"""Seconds that a process waits for another one that builds; below the ten minutes after which a collective gives up."""

Build = Callable[[Path], dict[str, Any]]
"""Writes an entry's files into a folder; returns what the manifest shall say of them."""


@dataclass(frozen=True)
class Entry:
    """One quantized base on the disk."""

    path: Path
    manifest: dict[str, Any]

    def files(self) -> list[Path]:
        """Its safetensors files."""
        return [self.path / name for name in self.manifest["files"]]


def folder() -> Path | None:
    """Where quantized bases are kept; None where the user wants none."""
    chosen = process.environment(VARIABLE) or DEFAULT
    return None if chosen.lower() in ("off", "none", "0") else Path(chosen).expanduser() / "bases"


def weight_files(base: Path) -> dict[str, Path]:
    """The safetensors files that hold a base's weights, by name, as `from_pretrained` chooses them; {} where there are none."""
    if (base / "model.safetensors").is_file():
        return {"model.safetensors": base / "model.safetensors"}
    index = base / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError):
        raise ModelError(f"{index}: is damaged; fetch or copy the base again") from None
    return {name: base / name for name in sorted(names)}


def fingerprint(model: Model) -> str:
    """Which base a run is trained on: of the content of its files, and of the settings that decide what is made of them.

    Not of its folder, the device or the libraries. 16 hex digits. Without a cache, and after a change, all files are read.
    Raises ModelError where one cannot be.
    """
    base = local_path(model)
    try:
        digests = _digests_of(folder(), base)
    except OSError as error:
        raise ModelError(f"{base}: cannot be read ({error}); fetch or copy the base again") from None
    return digest({"files": digests, "dtype": dtype_name(model), "quantization": SETTINGS if model.quantization == "nf4" else None})


def find(model: Model, device: str) -> Entry | None:
    """The entry for a base as it is now, quantized on a `device` ("cpu" or "cuda"); None where there is none. Reads no weights."""
    home = folder()
    if home is None or model.quantization == "none":
        return None
    try:
        digests = _known_digests(home, local_path(model))
        return None if digests is None else _entry(_place(home, model, device, digests))
    except OSError:
        return None


def ensure(model: Model, device: str, need: int, build: Build, say: Callable[[str], None], damaged: Entry | None = None) -> Entry | None:
    """The entry for a base, built if need be (or if what is there is the `damaged` one), by one process at a time.

    `need` is the size of an entry in bytes. None where no cache can be kept, which `say` hears; a cache is never worth a
    failed run.
    """
    home = folder()
    if home is None or model.quantization == "none":
        return None
    if damaged is None and (found := find(model, device)) is not None:
        return found
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _lock(home):
            return _build_if_missing(home, model, device, need, build, damaged)
    except OSError as error:
        advice = f"{VARIABLE}=FOLDER keeps it elsewhere, {VARIABLE}=off nowhere"
        say(f"note: the quantized base cannot be kept in {home} ({error}), it is quantized at each start; {advice}")
        return None


def ensure_ahead(model: Model, device: str, say: Callable[[str], None]) -> None:
    """Have a quantized base on the disk before workers start, built by a process that gives its memory back."""
    home = folder()
    if model.quantization != "nf4" or home is None:
        return
    files = weight_files(local_path(model))
    if not files or find(model, device) is not None:
        return
    size = sum(file.stat().st_size for file in files.values() if file.is_file())
    say(f"quantizing {model.name} once for this machine ({size / 1e9:.1f} GB), kept in {home}")
    command = [sys.executable, "-m", "mistral_dist.base", model.model_dump_json()]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("note: "):
            say(line)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        say(f"note: the base could not be quantized ahead ({last}); the workers try themselves")


def _build_if_missing(home: Path, model: Model, device: str, need: int, build: Build, damaged: Entry | None) -> Entry | None:
    """Under the lock."""
    base = local_path(model)
    digests = _digests(home, base)
    place = _place(home, model, device, digests)
    found = _entry(place)
    if found is not None and (damaged is None or found.manifest["id"] != damaged.manifest["id"]):
        return found
    if place.exists():
        remove(place)
    for leftover in asides_of(place):
        remove(leftover)
    free = free_bytes(home)
    if free < need:
        raise OSError(f"it needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    before = _stamps(base)
    aside = aside_of(place)
    try:
        aside.mkdir()
        manifest = {**build(aside), "id": aside.name, "of": _description(device, model, digests)}
        if _stamps(base) != before:
            raise OSError(f"{base} changed while it was read")
        manifest["files"] = {file.name: file.stat().st_size for file in sorted(aside.glob("*.safetensors"))}
        write_text(aside / MANIFEST, json.dumps(manifest))
        publish(aside, place)
    finally:
        if aside.exists():
            remove(aside)
    return _entry(place)


def _entry(place: Path) -> Entry | None:
    """What is there, if all its files have the sizes that they were written with. Its bytes are checked as they are read."""
    try:
        manifest = read_json(place / MANIFEST)
        if manifest is None or any((place / name).stat().st_size != size for name, size in manifest["files"].items()):
            return None
    except (OSError, RunError):
        return None
    return Entry(place, manifest)


def _place(home: Path, model: Model, device: str, digests: dict[str, str]) -> Path:
    readable = re.sub(r"[^\w.-]+", "-", model.name).strip("-")
    return home / f"{readable}-{digest(_description(device, model, digests))}"


def _description(device: str, model: Model, digests: dict[str, str]) -> dict[str, Any]:
    """Everything that decides an entry's bytes."""
    libraries = {name: version(name) for name in LIBRARIES}
    return {"format": 1, "files": digests, "dtype": dtype_name(model), "device": device, "quantization": SETTINGS, "libraries": libraries}


def dtype_name(model: Model) -> str:
    """What a model computes in, and is kept in where it is not quantized."""
    return "float32" if model.dtype == "float32" else "bfloat16"


def _files(base: Path) -> dict[str, Path]:
    """The files that decide what a base is: weights, configuration, and code of its own, where it brings some.

    Where the weights are not in safetensors, all that may hold some.
    """
    weights = weight_files(base) or {file.name: file for file in sorted(base.iterdir()) if file.suffix in OTHER_WEIGHTS}
    return {"config.json": base / "config.json", **weights, **{file.name: file for file in sorted(base.glob("*.py"))}}


def _stamps(base: Path) -> dict[str, list[int]]:
    """Size, times and inode of each file that decides what the base is; the change time is one that no program can set."""
    found = {name: file.stat() for name, file in _files(base).items()}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for name, stat in found.items()}


def _known_digests(home: Path, base: Path) -> dict[str, str] | None:
    """The SHA-256 of each file, if they were hashed before and have not changed since."""
    try:
        memo = read_json(_memo(home, base)) or {}
    except RunError:
        return None
    stamps = _stamps(base)
    if not len(stamps) > 1 or memo.get("stamps") != stamps:
        return None
    return memo["digests"]


def _digests_of(home: Path | None, base: Path) -> dict[str, str]:
    """The SHA-256 of each file, kept for the next time; of processes that ask at once, one reads. Without a cache, read each time."""
    if home is not None:
        with suppress(OSError):
            known = _known_digests(home, base)
            if known is not None:
                return known
            home.mkdir(parents=True, exist_ok=True)
            with _lock(home):
                return _digests(home, base)
    return _hashed(base)


def _hashed(base: Path) -> dict[str, str]:
    files = _files(base)
    with ThreadPoolExecutor(HASHERS) as threads:
        return dict(zip(files, threads.map(sha256, files.values()), strict=True))


def _digests(home: Path, base: Path) -> dict[str, str]:
    """Under the lock."""
    known = _known_digests(home, base)
    if known is not None:
        return known
    now, stamps = time.time_ns(), _stamps(base)
    digests = _hashed(base)
    if all(max(stamp[1:3]) < now - SAME_MOMENT for stamp in stamps.values()) and _stamps(base) == stamps:
        memo = _memo(home, base)
        memo.parent.mkdir(exist_ok=True)
        write_text(memo, json.dumps({"folder": str(base.resolve()), "stamps": stamps, "digests": digests}))
    return digests


def _memo(home: Path, base: Path) -> Path:
    return home / "digests" / f"{hashlib.sha256(str(base.resolve()).encode()).hexdigest()[:16]}.json"


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    """One builder at a time; the kernel frees the lock of a process that dies. Raises OSError where it cannot be had."""
    handle = os.open(home / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process has been building there for {PATIENCE:.0f} s") from None
                time.sleep(0.2)
        yield
    finally:
        os.close(handle)
