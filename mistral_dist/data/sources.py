"""Sources -> shards -> raw rows, each with the place that a person can look up.

A shard is read from beginning to end, or from a position on: a byte offset in uncompressed .jsonl and .txt (a seek costs
nothing), a row or line number elsewhere (what comes before is read again, but for Parquet's row groups). A place is
`file:line` for JSON Lines and text, `file row N` elsewhere. Where reading began at a byte offset, the number of the line is
not known, and the place is `file@byte N`, the byte at which the line begins.

Nothing is raised for one bad row: it is for rows.py to find. A file that cannot be read is a DataError.
"""

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol

from mistral_dist.config import Source
from mistral_dist.data import formats, hub_sets, remote
from mistral_dist.data.example import Row
from mistral_dist.errors import DataError
from mistral_dist.retry import reason

PREPARED = ("manifest.json", "quarantine.jsonl")
"""A folder that holds both is a data directory of ours, and no source."""


class Shard(Protocol):
    """What is read from beginning to end: one file, or one part of a hub data set. It can be sent to another process."""

    @property
    def name(self) -> str:
        """Path or URL, and part, as errors name it."""

    def rows(self, start: int = 0) -> Iterator[tuple[int, Row]]:
        """Rows from a position on, each with the position after it. Raises DataError for what cannot be read."""


@dataclass(frozen=True, slots=True)
class FileShard:
    """One file, on this machine or at a URL."""

    path: str

    @property
    def name(self) -> str:
        """The path, or the URL without what is secret in it."""
        return remote.shown(self.path) if remote.is_remote(self.path) else self.path

    def rows(self, start: int = 0) -> Iterator[tuple[int, Row]]:
        """Rows from a position on, each with the position after it; none of an empty file."""
        row = None
        try:
            with self._open() as stream:
                for position, row in formats.read(stream, self._file_name(), self.name, start):
                    yield position, row
        except formats.BROKEN as error:
            last = f"after {row.place}" if row else f"from position {start} on" if start else "from its beginning"
            remedy = "" if isinstance(error, formats.Damaged) else "; mend the file or remove it from data.sources"
            raise DataError(f"{self.name}: cannot be read {last}: {reason(error)}{remedy}") from error

    def _open(self) -> BinaryIO:
        return remote.open_remote(self.path) if remote.is_remote(self.path) else open(self.path, "rb")

    def _file_name(self) -> str:
        return remote.file_name(self.path) if remote.is_remote(self.path) else self.path


def check(sources: Iterable[Source]) -> None:
    """Refuse sources that are missing or of no known format, before anything else is done. Asks no network."""
    for source in sources:
        if source.path is None:
            continue
        if not remote.is_remote(source.path):
            _local_files(source.path)
        elif remote.is_http(source.path):
            remote.refuse_user(source.path)
            _known([source.path])


def shards(source: Source) -> list[Shard]:
    """The shards of a source, in an order that is the same on every machine. Raises DataError where there is none."""
    if source.path is None:
        return list(hub_sets.shards(source))
    return [FileShard(file) for file in _files(source.path)]


def read(source: Source) -> Iterator[Row]:
    """All rows of a source, in order. An empty file among others is passed over. Raises DataError where there is no row at all."""
    is_empty, parts = True, shards(source)
    for shard in parts:
        for _, row in shard.rows():
            is_empty = False
            yield row
    if is_empty:
        raise DataError(f"{_name(source, parts)}: empty; remove it from data.sources or fill it")


def _name(source: Source, parts: list[Shard]) -> str:
    """A source as errors name it: by its file where it is one."""
    if source.path is None:
        return hub_sets.HubShard(source).name
    if len(parts) == 1:
        return parts[0].name
    return remote.shown(source.path) if remote.is_remote(source.path) else source.path


def state(sources: Iterable[Source]) -> dict[str, list[Any]]:
    """What the files look like now, as {path: [bytes, mtime in ns]} or {URL: [bytes, ETag]}: changed means prepare again."""
    found: dict[str, list[Any]] = {}
    for path in [source.path for source in sources if source.path is not None]:
        for file in _files(path):
            if remote.is_remote(file):
                found[remote.shown(file)] = remote.state(file)
            else:
                stat = Path(file).stat()
                found[file] = [stat.st_size, stat.st_mtime_ns]
    return found


def _files(path: str) -> list[str]:
    return _remote_files(path) if remote.is_remote(path) else _local_files(path)


def _local_files(given: str) -> list[str]:
    path = Path(given).expanduser()
    if path.is_file():
        return _known([str(path)])
    if path.is_dir():
        found = [str(file) for file in path.rglob("*") if file.is_file()]
        return _some_data(found, str(path), path)
    # a name with brackets or stars is a name first
    matches = [file for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
    if not matches:
        nothing = "no such file, and no file fits this pattern" if glob.has_magic(str(path)) else "no such file or folder"
        raise DataError(f"data.sources: {path}: {nothing}; set data.sources to where your data are")
    return _some_data(matches, str(path), Path(remote.fixed(str(path))))


def _remote_files(url: str) -> list[str]:
    folder, found = remote.expand(url, beside=PREPARED)
    return _known(found) if found == [url] else _some_data(found, remote.shown(url), PurePath(folder))


def _some_data(files: list[str], where: str, folder: PurePath) -> list[str]:
    """Of many files those that can be read; nothing hidden, and nothing of a data directory that `prepare` made."""
    names = {PurePath(file): file for file in files}

    def is_prepared(parent: PurePath) -> bool:
        return all(parent / name in names or Path(parent, name).is_file() for name in PREPARED)

    parents = {parent for path in names for parent in path.parents if parent.is_relative_to(folder)}
    prepared = set(filter(is_prepared, parents))
    found = [
        names[path]
        for path in sorted(names)
        if formats.ending(path.name) in formats.READERS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and prepared.isdisjoint(path.parents)
    ]
    if not found:
        raise DataError(f"data.sources: {where}: no file in it that can be read ({', '.join(formats.READERS)})")
    return found


def _known(files: list[str]) -> list[str]:
    for file in files:
        name = remote.file_name(file) if remote.is_remote(file) else file
        if formats.ending(PurePath(name).name) not in formats.READERS:
            shown = remote.shown(file) if remote.is_remote(file) else file
            kind = PurePath(name).suffix
            raise DataError(f"data.sources: {shown}: unknown format {kind!r}; known are {', '.join(formats.READERS)}")
    return files
