"""Files and folders that are whole or not there, also after a crash: written aside, synced, renamed."""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from mistral_dist.errors import RunError

_LIBC = ctypes.CDLL(None, use_errno=True)
_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of rename(2)."""

ASIDE = ".aside-"
"""Prefix of what is being written or removed; `sweep` clears what a killed process left of it."""


def write_text(file: Path, text: str) -> None:
    """Replace a file in one step: readers see the old content or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
    try:
        with open(aside, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def replace_text(file: Path, text: str) -> None:
    """As `write_text`; on a full disk a small file is written over in its own block, in one write, padded with blanks."""
    try:
        write_text(file, text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not file.is_file():
            raise
        handle = os.open(file, os.O_WRONLY)
        try:
            os.pwrite(handle, text.rstrip("\n").encode().ljust(os.fstat(handle).st_size - 1) + b"\n", 0)
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON file's object, or None where it is missing. Raises RunError where it is no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise RunError(f"{file}: is damaged (no JSON object in it); remove it")
    return content


def sha256(file: Path) -> str:
    """Of a file's bytes, 64 hex digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe(error: OSError, what: str, folder: Path, needed: int | None = None) -> str:
    """Why something could not be saved in a folder, in one line, with the bytes that are free, and those that it needs if known."""
    why = error.strerror or str(error)
    needs, unit = ("", " bytes") if needed is None else (f"it needs {needed:,} bytes, ", "")
    try:
        free = f"{shutil.disk_usage(folder).free:,}{unit} are free"
    except OSError as other:
        free = f"how many{unit} are free cannot be told ({other.strerror})"
    return f"{folder}: {what} could not be saved: {why} ({needs}{free})"


def remedy(error: OSError) -> str:
    """What the user can do about a folder that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
        return "make room there, or make it writable,"
    return "see that its disk or file server answers"


def aside_of(target: Path) -> Path:
    """A fresh name beside a folder, to write it under."""
    return target.with_name(f"{ASIDE}{target.name}-{uuid.uuid4().hex[:8]}")


def asides_of(target: Path) -> list[Path]:
    """What was written or removed under such names and never finished; of this folder only, not of `<its name>-more`."""
    pattern = re.compile(re.escape(f"{ASIDE}{target.name}-") + "[0-9a-f]{8}")
    return sorted(path for path in target.parent.glob(f"{ASIDE}*") if pattern.fullmatch(path.name))


def publish(aside: Path, target: Path) -> None:
    """Sync a finished folder and rename it into place; what stood there goes. At every moment one of the two is there.

    Not so where the file system cannot exchange names (NFS, say): between two renames there is neither.
    """
    sync(aside)
    old = aside
    if not target.exists():
        aside.rename(target)
    elif not _exchange(aside, target):
        old = aside_of(target)
        target.rename(old)
        aside.rename(target)
    sync_entry(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where that cannot be."""
    rename = getattr(_LIBC, "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def remove(folder: Path) -> None:
    """Remove a folder; cut short, it leaves nothing under the folder's name."""
    gone = aside_of(folder)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left aside in a folder. Only for the one that may write there."""
    for path in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(path, ignore_errors=True)


def sync(folder: Path) -> None:
    """Have every byte of a folder on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_entry(path)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_entry(path)


def sync_entry(path: Path) -> None:
    """Have a file's bytes on the disk, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
