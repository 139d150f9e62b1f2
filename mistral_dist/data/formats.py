"""The bytes of one file -> rows, each with the position after it.

Text formats are read here, line by line, so that a text stays the text it is (a CSV cell `NA`, a label `01`, a JSON string
`2024-01-31`) and a mistake has its line. What is wrong with one row is left in the row for rows.py to find: bytes that are
no UTF-8 stay as they are, or become lone surrogates; cells too many are under the key None, missing cells are None. What is
wrong with the file is raised, as whatever the reader of its format raises.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any, BinaryIO, TextIO

import zstandard

from mistral_dist.data.example import Row

Rows = Iterator[tuple[int, Row]]
Reader = Callable[[BinaryIO, str, int], Rows]
"""(the file, uncompressed; its name; position to begin at)"""

BATCH = 256
"""Rows of Parquet that are held as Python objects."""
CHUNK = 2**16
"""Characters of a .json file, or compressed bytes, that are read at once."""
BROKEN = (OSError, EOFError, csv.Error, zlib.error, lzma.LZMAError, zstandard.ZstdError, ValueError, RecursionError, NotImplementedError)
"""What the readers raise for a damaged file; pyarrow's errors are ValueErrors and OSErrors."""

# a cell may be as long as a document; the library's own limit is 128 KB
csv.field_size_limit(2**31 - 1)


class Damaged(ValueError):
    """A file that is not what its name says; the text says what is wrong and what to do."""


class ZstdFile(io.RawIOBase):
    """A .zst file of any number of frames. The library's own reader takes a cut file for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Some of the next bytes; none at the end. Raises EOFError where the last frame is not whole."""
        while not self._ready:
            data = self._raw.read(CHUNK)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends within a compressed frame: it was cut")
                return 0
            self._ready = memoryview(b"".join(self._frames(data)))
        piece = self._ready[: len(buffer)]
        buffer[: len(piece)] = piece
        self._ready = self._ready[len(piece) :]
        return len(piece)

    def _frames(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._frame is None:
                # 2 GB: what `zstd --long=31` needs
                self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            yield self._frame.decompress(data)
            data = b""
            if self._frame.eof:
                data, self._frame = self._frame.unused_data, None


COMPRESSED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": lambda raw: io.BufferedReader(ZstdFile(raw), 2**20),
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}


def ending(name: str) -> str:
    """The ending that tells a file's format, in small letters: that of a compression is not it."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def compression(name: str) -> str:
    """The ending that tells a file's compression, or nothing."""
    suffix = PurePath(name).suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def seeks_by_bytes(name: str) -> bool:
    """Whether a position in a file of this name is a byte offset."""
    return ending(name) in (".jsonl", ".txt") and not compression(name)


def read(stream: BinaryIO, file_name: str, name: str, start: int) -> Rows:
    """The rows of an opened file; `file_name` tells the format, `name` is what places say."""
    packed = compression(file_name)
    return READERS[ending(file_name)](COMPRESSED[packed](stream) if packed else stream, name, start)


def _lines(stream: BinaryIO, name: str, start: int) -> Iterator[tuple[int, str, bytes]]:
    """(position after it, place, line without its end). A byte-order mark at the beginning is no part of the first line.

    A stream that can be sought at no cost is, and its positions are bytes; then nobody knows the number of the line, and a
    place is the byte at which it begins. In others a position is the number of lines before it.
    """
    if not isinstance(stream, gzip.GzipFile | lzma.LZMAFile | bz2.BZ2File) and stream.seekable():
        at = stream.seek(start)
        for number, line in enumerate(stream, 1):
            place = f"{name}@byte {at}" if start else f"{name}:{number}"
            at += len(line)
            yield at, place, line.rstrip(b"\r\n") if number > 1 or start else _beginning(line).rstrip(b"\r\n")
        return
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = _beginning(line)
        if number > start:
            yield number, f"{name}:{number}", line.rstrip(b"\r\n")


def _beginning(data: bytes) -> bytes:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Damaged("is UTF-16; convert it to UTF-8, e.g. with `iconv -f UTF-16 -t UTF-8`")
    return data.removeprefix(codecs.BOM_UTF8)


def _text(stream: Any) -> TextIO:
    """Characters; bytes that are no UTF-8 become lone surrogates, which no valid text has."""
    _beginning(stream.peek(4)[:4])
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _json_lines(stream: BinaryIO, name: str, start: int) -> Rows:
    for position, place, line in _lines(stream, name, start):
        if line and not line.isspace():
            yield position, Row(place, line)


def _text_lines(stream: BinaryIO, name: str, start: int) -> Rows:
    for position, place, line in _lines(stream, name, start):
        yield position, Row(place, {"text": line.decode("utf-8", "surrogateescape")})


def _document(stream: BinaryIO, name: str, start: int) -> Rows:
    text = "\n".join(line.rstrip("\r\n") for line in _text(stream))
    if text and not start:
        yield 1, Row(name, {"text": text})


def _csv(stream: BinaryIO, name: str, start: int) -> Rows:
    rows = _csv_rows(_text(stream))
    for number, values in enumerate(rows, 1):
        if number > start:
            yield number, Row(f"{name} row {number}", values)


def _csv_rows(text: TextIO) -> Iterator[dict[Any, Any]]:
    first = next((line for line in text if line.strip()), "")
    if not first:
        return
    bare = re.sub(r'"[^"]*"', "", first)
    delimiter = "," if "," in bare else max(";\t", key=bare.count)
    table = csv.reader(itertools.chain([first], text), delimiter=delimiter if delimiter in bare else ",", strict=True)
    header = next(table)
    twice = sorted({column for column in header if column and header.count(column) > 1})
    if twice:
        raise Damaged(f"two columns are named {twice[0]!r}; rename one")
    number = 0
    while True:
        begin = table.line_num + 1
        try:
            cells = next(table, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise Damaged(f"a quote that opens in row {number + 1} (line {begin} or after) is never closed; close it") from error
            number += 1
            yield {None: [f"this row is no CSV: {error}"]}  # the reader goes on at the next line
            continue
        if cells is None:
            return
        if cells:
            number += 1
            yield _named(header, cells)


def _named(header: list[str], cells: list[str]) -> dict[Any, Any]:
    """The cells under their columns, what is beyond them under None, what is missing as None: as csv.DictReader does."""
    values: dict[Any, Any] = dict(zip(header, cells, strict=False))
    if len(cells) > len(header):
        values[None] = cells[len(header) :]
    for column in header[len(cells) :]:
        values[column] = None
    return values


def _json(stream: BinaryIO, name: str, start: int) -> Rows:
    """An array of objects, or objects one after the other; held in memory one at a time."""
    for number, value in enumerate(_Values(_text(stream)), 1):
        if number > start:
            # what is no object is for rows.py to refuse
            payload = value if isinstance(value, dict) else json.dumps(value).encode()
            yield number, Row(f"{name} row {number}", payload)


class _Values:
    """The JSON values of a text, of which no more is held than the value that is read."""

    def __init__(self, text: TextIO) -> None:
        self.text, self.buffer, self.at = text, "", 0

    def __iter__(self) -> Iterator[Any]:
        in_array = self._skip() == "["
        self.at += in_array
        for number in itertools.count(1):
            sign = self._skip()
            if in_array and sign == "]":
                self.at += 1
                if self._skip():
                    raise Damaged(f"goes on after the end of its array, after row {number - 1}; remove what follows")
                return
            if not in_array and not sign:
                return
            if in_array and number > 1:
                if sign != ",":
                    raise Damaged(f"not valid JSON after row {number - 1}: neither a comma nor the end of the array; mend it")
                self.at += 1
                self._skip()
            yield self._value(number)

    def _skip(self) -> str:
        """Go to the next character that is no blank."""
        while True:
            self.at = _BLANK.match(self.buffer, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._more(CHUNK):
                return ""

    def _more(self, size: int) -> bool:
        more = self.text.read(size)
        self.buffer, self.at = self.buffer[self.at :] + more, 0
        return bool(more)

    def _value(self, number: int) -> Any:
        size = CHUNK
        while True:
            try:
                value, end = _DECODE(self.buffer, self.at)
            except json.JSONDecodeError as error:
                if not self._more(size):  # else it may only be cut
                    raise Damaged(f"not valid JSON in row {number}: {error.msg}; mend it") from None
            else:
                length = end - self.at
                if end < len(self.buffer) or not self._more(size):  # a number at the end may go on
                    self.at += length
                    return value
            size *= 2


_BLANK = re.compile(r"[ \t\r\n]*")
_DECODE = json.JSONDecoder().raw_decode


def _parquet(stream: BinaryIO, name: str, start: int) -> Rows:
    """Row groups before the position are not read. Local files are read in pieces of a column, remote ones a column at once."""
    import pyarrow.parquet

    is_local = isinstance(getattr(stream, "raw", None), io.FileIO)
    file = pyarrow.parquet.ParquetFile(stream, buffer_size=2**20 if is_local else 0, pre_buffer=False)
    number = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if number + rows <= start:
            number += rows
            continue
        for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], use_threads=False):
            if number + len(batch) <= start:
                number += len(batch)
                continue
            for values in batch.to_pylist():
                number += 1
                if number > start:
                    yield number, Row(f"{name} row {number}", values)


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text_lines,
    ".md": _document,
}
"""File ending, without that of a compression -> how its rows are read."""
