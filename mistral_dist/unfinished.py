"""What a long job over many examples has found so far, kept so that a killed one goes on where it was.

Each rank appends to a file of its own, and at the start reads those of all: another number of ranks may have written them.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mistral_dist.journal import Journal
from mistral_dist.runtime.engine import Runtime

PATTERN = "unfinished-*.jsonl"


class Unfinished:
    """Values by key. Only what belongs to the same work is read: the same adapter, data and settings, told by a fingerprint."""

    def __init__(self, folder: Path, rank: int, fingerprint: str, before: Mapping[str, Any]) -> None:
        """`before`: what earlier launches have found, the same on each rank; see `of`."""
        self._folder, self._rank, self._fingerprint = folder, rank, fingerprint
        self._journal: Journal | None = None
        self.before = before
        self.found: dict[str, Any] = {}
        """By this rank in this launch."""

    @classmethod
    def of(cls, folder: Path, fingerprint: str, runtime: Runtime) -> "Unfinished":
        """One for each rank. Rank 0 reads what there is, since another process may be writing there. A collective."""
        return cls(folder, runtime.rank, fingerprint, runtime.on_main(lambda: read(folder, fingerprint)))

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep values; a process that is killed a moment later has them."""
        if self._journal is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # a name of its own for each launch: a line that a kill has torn stays the last of its file
            self._journal = Journal(self._folder / PATTERN.replace("*", f"{self._rank}-{uuid.uuid4().hex[:8]}"))
            self._journal.append({"of": self._fingerprint})
        self._journal.append(dict(values))
        self.found |= values

    def discard(self) -> None:
        """The work is done, or is to be done anew: nothing is kept."""
        for file in self._folder.glob(PATTERN):
            file.unlink(missing_ok=True)


def read(folder: Path, fingerprint: str) -> dict[str, Any]:
    """What earlier launches have found of this very work."""
    return {key: value for file in sorted(folder.glob(PATTERN)) for key, value in _read(file, fingerprint)}


def _read(file: Path, fingerprint: str) -> Iterator[tuple[str, Any]]:
    with open(file, encoding="utf-8", errors="replace") as stream:
        if _whole(stream.readline()) != {"of": fingerprint}:
            return
        for line in stream:
            yield from _whole(line).items()


def _whole(line: str) -> dict[str, Any]:
    """What a line holds; nothing where a kill has torn it, or a machine that went down has left zeros: that is found again."""
    try:
        found = json.loads(line) if line.endswith("\n") else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
