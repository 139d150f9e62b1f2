"""What a long job over many examples has found so far, kept so that a killed one goes on where it was.

Each rank appends to a file of its own, and at the start reads those of all: another number of ranks may have written them.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

PATTERN = "unfinished-*.jsonl"


class Unfinished:
    """Values by key. Only what belongs to the same work is read: the same adapter, data and settings, told by a fingerprint."""

    def __init__(self, folder: Path, rank: int, fingerprint: str) -> None:
        """Reads what there is; every rank must have done so before any begins to `add`."""
        self._folder, self._rank, self._fingerprint = folder, rank, fingerprint
        self._stream: TextIO | None = None
        self.found: dict[str, Any] = {key: value for file in folder.glob(PATTERN) for key, value in _read(file, fingerprint)}

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep values; a process that is killed a moment later has them."""
        if self._stream is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # a name of its own for each launch: a line that a kill has torn stays the last of its file
            file = self._folder / PATTERN.replace("*", f"{self._rank}-{uuid.uuid4().hex[:8]}")
            self._stream = open(file, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the work goes on
            self._stream.write(json.dumps({"of": self._fingerprint}) + "\n")
        self._stream.write(json.dumps(dict(values)) + "\n")
        self._stream.flush()
        self.found |= values

    def discard(self) -> None:
        """The work is done, or is to be done anew: nothing is kept."""
        discard(self._folder)


def discard(folder: Path) -> None:
    """Remove what any rank has kept in a folder."""
    for file in folder.glob(PATTERN):
        file.unlink(missing_ok=True)


def _read(file: Path, fingerprint: str) -> Iterator[tuple[str, Any]]:
    with open(file, encoding="utf-8") as stream:
        first = stream.readline()
        if not first.endswith("\n") or json.loads(first) != {"of": fingerprint}:
            return
        for line in stream:
            if line.endswith("\n"):
                yield from json.loads(line).items()
