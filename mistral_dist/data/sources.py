"""Files, folders and hub data sets -> rows, each with the place that a person can look up.

Reading is the `datasets` library's: JSON Lines, JSON, CSV, Parquet, text and Markdown, plain or compressed. Here a row
only gets its place, `file:line` where the format has lines (JSON Lines, text) and `file row N` elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_dist.config import Source
from mistral_dist.errors import DataError

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
"""File ending (without .gz, .zst, .xz, .bz2) -> the loader of `datasets` that reads it."""

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


@dataclass(frozen=True, slots=True)
class Row:
    """One raw record: its columns and where it stands."""

    place: str
    values: dict[str, Any]


def check(sources: tuple[Source, ...]) -> None:
    """Refuse local sources that are missing or of no known format, before anything else is done."""
    for source in sources:
        if source.path is not None:
            local_files(source)


def local_files(source: Source) -> list[Path]:
    """The files of a local source, sorted. Raises DataError where there is none that can be read."""
    path = Path(source.path or "").expanduser()
    if not path.exists():
        raise DataError(f"data.sources: {path}: no such file or folder; set data.sources to where your data are")
    files = sorted(p for p in path.rglob("*") if p.is_file() and _ending(p) in READERS) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data.sources: {path}: no file in it that can be read ({', '.join(READERS)})")
    for file in files:
        if _ending(file) not in READERS:
            raise DataError(f"data.sources: {file}: unknown format {file.suffix!r}; known are {', '.join(READERS)}")
    return files


def read(sources: tuple[Source, ...]) -> Iterator[Row]:
    """All rows of all sources, in order. Raises DataError naming the file (or data set) that cannot be read."""
    for source in sources:
        for row in _read_local(source) if source.path else _read_hub(source):
            yield Row(row.place, _renamed(row, source.columns))


def state(sources: tuple[Source, ...]) -> dict[str, list[int]]:
    """What the local files look like now, as {path: [bytes, mtime in ns]}: changed means prepare again."""
    files = [file for source in sources if source.path for file in local_files(source)]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _read_local(source: Source) -> Iterator[Row]:
    for file in local_files(source):
        kind = READERS[_ending(file)]
        keep = {"sample_by": "document"} if _ending(file) == ".md" else {}
        separator = ":" if kind == "text" or _ending(file) == ".jsonl" else " row "
        number = 0
        for number, values in _numbered(kind, str(file), data_files=[str(file)], split="train", streaming=True, **keep):
            yield Row(f"{file}{separator}{number}", values)
        if number == 0:
            raise DataError(f"{file}: empty; remove it from data.sources or fill it")


def _read_hub(source: Source) -> Iterator[Row]:
    # not streaming: what `mistral-dist fetch` has put on this machine is read without a network
    options = {"name": source.subset, "split": source.split, "streaming": False}
    for number, values in _numbered(source.name or "", f"{source.name}[{source.split}]", **options):
        yield Row(f"{source.name}[{source.split}] row {number}", values)


def _numbered(loader: str, what: str, **options: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows that `datasets` reads, numbered from 1; its errors come out as one line that names `what`."""
    import datasets

    number = 0
    try:
        for number, values in enumerate(datasets.load_dataset(loader, **options), start=1):
            yield number, values
    except (GeneratorExit, DataError):
        raise
    except Exception as error:  # whatever the reader of a foreign format raises
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise DataError(f"{what}: cannot be read after row {number}: {reason}; mend the file or the source") from error


def _renamed(row: Row, columns: dict[str, str]) -> dict[str, Any]:
    for theirs in columns.values():
        if theirs not in row.values:
            raise DataError(f"{row.place}: no column {theirs!r}; data.sources.columns may name {', '.join(row.values)}")
    return {**row.values, **{ours: row.values[theirs] for ours, theirs in columns.items()}}


def _ending(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""
