"""Files, folders and hub data sets -> rows, each with the place that a person can look up.

Text formats are read here, line by line, so that a text stays the text it is (a CSV cell `NA`, a label `01`, a JSON string
`2024-01-31`) and a mistake has its line. Parquet, JSON arrays and the hub are the `datasets` library's. A place is
`file:line` for JSON Lines and text, `file row N` elsewhere.
"""

import csv
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from mistral_dist.config import Source
from mistral_dist.errors import DataError

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One raw record: its columns and where it stands."""

    place: str
    values: Values


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
    files = sorted(_data_files(path)) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data.sources: {path}: no file in it that can be read ({', '.join(READERS)})")
    for file in files:
        if _ending(file) not in READERS:
            raise DataError(f"data.sources: {file}: unknown format {file.suffix!r}; known are {', '.join(READERS)}")
    return files


def _data_files(folder: Path) -> Iterator[Path]:
    """What can be read in a folder, but nothing hidden and nothing of a data directory that `prepare` made."""
    prepared = {manifest.parent for manifest in folder.rglob("manifest.json") if (manifest.parent / "quarantine.jsonl").is_file()}
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and _ending(path) in READERS and not hidden and prepared.isdisjoint(path.parents):
            yield path


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
        row = None
        try:
            for row in READERS[_ending(file)](file):
                yield row
        except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
            last = f"after {row.place}" if row else "from its beginning"
            raise DataError(f"{file}: cannot be read {last}: {_one_line(error)}; mend the file or remove it from data.sources") from error
        if row is None:
            raise DataError(f"{file}: empty; remove it from data.sources or fill it")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends; a byte-order mark at the beginning is not part of the first."""
    with fsspec.open(str(file), "rb", compression="infer") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{file}:{number}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None


def _json_lines(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}:{number}: not valid JSON ({error.msg} at character {error.pos + 1}); mend or remove the line"
            ) from None
        if not isinstance(values, dict):
            raise DataError(f"{file}:{number}: a row is an object {{...}}, this is a {type(values).__name__}; mend or remove the line")
        yield Row(f"{file}:{number}", values)


def _text_lines(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        yield Row(f"{file}:{number}", {"text": line})


def _document(file: Path) -> Iterator[Row]:
    text = "\n".join(line for _, line in _lines(file))
    if text:
        yield Row(f"{file}", {"text": text})


def _csv(file: Path) -> Iterator[Row]:
    with fsspec.open(str(file), "rt", compression="infer", encoding="utf-8-sig", newline="") as stream:
        for number, values in enumerate(csv.DictReader(stream, strict=True), 1):
            if None in values or None in values.values():
                raise DataError(f"{file} row {number}: has another number of cells than the header; mend or remove the row")
            yield Row(f"{file} row {number}", dict(values))


def _parquet(file: Path) -> Iterator[Row]:
    return _library("parquet", str(file), data_files=[glob.escape(str(file))], split="train", streaming=True)


def _json(file: Path) -> Iterator[Row]:
    return _library("json", str(file), data_files=[glob.escape(str(file))], split="train", streaming=True)


# a cell may be as long as a document; the library's own limit is 128 KB
csv.field_size_limit(2**31 - 1)

READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text_lines,
    ".md": _document,
}
"""File ending, without that of a compression -> how its rows are read."""


def _read_hub(source: Source) -> Iterator[Row]:
    # not streaming: what `mistral-dist fetch` has put on this machine is read without a network
    options = {"name": source.subset, "split": source.split, "streaming": False}
    what = "/".join(part for part in (source.name, source.subset) if part)
    return _library(source.name or "", f"{what}[{source.split}]", **options)


def _library(loader: str, what: str, **options: Any) -> Iterator[Row]:
    """The rows that `datasets` reads; its errors come out as one line that names `what`."""
    import datasets

    number = 0
    try:
        for number, values in enumerate(datasets.load_dataset(loader, **options), start=1):
            yield Row(f"{what} row {number}", values)
    except GeneratorExit:
        raise
    except Exception as error:  # whatever the reader of a foreign format raises
        raise DataError(
            f"{what}: cannot be read after row {number}: {_one_line(error.__cause__ or error)}; mend it or remove it"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _renamed(row: Row, columns: dict[str, str]) -> Values:
    for theirs in columns.values():
        if theirs not in row.values:
            raise DataError(f"{row.place}: no column {theirs!r}; data.sources.columns may name {', '.join(row.values)}")
    return {**row.values, **{ours: row.values[theirs] for ours, theirs in columns.items()}}


def _ending(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""
