"""A URL -> a file that can be read and sought like a local one, through stalls, resets and busy servers.

HTTP is read here: one request streams from where reading begins, and after trouble another goes on at the byte reached,
checked to be of the same file (size, and ETag or Last-Modified). Everything else that fsspec knows (s3://, gs://, hf://,
memory://, ...) is read block by block through its filesystem. No attempt lasts longer than CONNECT_SECONDS +
STALL_SECONDS, not even where the filesystem knows no time limit; the trouble without progress is bounded by retry.SECONDS.
"""

import http.client
import io
import re
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, BinaryIO, Protocol, TypeVar

from mistral_dist import retry
from mistral_dist.errors import DataError

CONNECT_SECONDS = 10.0
STALL_SECONDS = 30.0
BLOCK = 4 * 2**20
"""Bytes that are read at once."""
SMALLEST_BLOCK = 2**16
"""A filesystem that cannot bring a block in time is asked for half of it, down to this."""

Result = TypeVar("Result")


class Unfit(Exception):
    """What was read cannot be put together; trying again does not help."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a server tells of a file."""

    size: int | None
    stamp: str
    """ETag, time of change or the like; empty where the server tells none."""

    def is_not(self, other: "Seen") -> bool:
        """Whether this is certainly another file than the one seen before."""
        return self.size != other.size or bool(self.stamp and other.stamp and self.stamp != other.stamp)


class Place(Protocol):
    """Where the bytes of one file come from. Each call is one attempt."""

    def look(self) -> Seen:
        """Size and stamp."""

    def fetch(self, start: int, end: int, seen: Seen) -> bytes:
        """Bytes from `start` to `end` at most, and at least one. Raises Unfit where the file is no longer the one seen."""

    def whole(self) -> tuple[IO[bytes], int | None]:
        """The file from its beginning and its size if announced: for places that bring no parts."""

    def forget(self) -> None:
        """Something went wrong: begin anew at the next attempt."""


def is_remote(path: str) -> bool:
    """Whether a source's path is a URL."""
    return "://" in path


def is_http(url: str) -> bool:
    """Whether a URL is one of the web, which has no folders."""
    return url.lower().startswith(("http://", "https://"))


def shown(url: str) -> str:
    """A URL as errors and manifests name it: without passwords, and without a query, which may hold a signature."""
    parts = urllib.parse.urlsplit(url)
    if not is_http(url):
        return url
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def file_name(url: str) -> str:
    """The last part of a URL's path."""
    return PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path) if is_http(url) else url).name


def fixed(path: str) -> str:
    """The folder that a pattern surely begins with."""
    return re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]


def expand(url: str, beside: Sequence[str] = ()) -> tuple[str, list[str]]:
    """(the folder, the files) that a folder or a pattern at a URL stands for; a file stands for itself.

    Files named `beside` are found as well, where a folder on the way to a file has them all, whatever the pattern.
    """
    if is_http(url):
        return url, [url]
    fs, path = _filesystem(url)

    def find() -> tuple[str, list[str]]:
        fs.invalidate_cache()
        if any(sign in path for sign in "*?[") and not fs.exists(path):
            folder = fixed(path)
            found = [one for one, info in fs.glob(path, detail=True).items() if info["type"] == "file"]
            parents = {"/".join(one.split("/")[:n]) for one in found for n in range(folder.count("/") + 1, one.count("/") + 1)}
            for parent in sorted(parents):
                names = [f"{parent}/{name}" for name in beside]
                found += names if all(map(fs.exists, names)) else []
        elif fs.isdir(path):
            folder, found = path, fs.find(path)
        else:
            return url, [url]
        return fs.unstrip_protocol(folder), sorted({fs.unstrip_protocol(one) for one in found})

    return _patiently(url, retry.Patience(), find)


def state(url: str) -> list[Any]:
    """Size and, if the server tells it, a stamp that changes with the content."""
    seen = _patiently(url, retry.Patience(), _place(url).look)
    return [seen.size, seen.stamp] if seen.stamp else [seen.size]


def open_remote(url: str) -> BinaryIO:
    """A file at a URL, buffered and seekable. Raises DataError with the URL and the reason, then and while it is read."""
    place = _place(url)
    patience = retry.Patience()
    seen = _patiently(url, patience, place.look)
    if seen.size is None or (isinstance(place, Web) and not place.brings_parts):
        return _spool(url, place, patience)
    return io.BufferedReader(RemoteFile(url, place, seen, patience), BLOCK)


class RemoteFile(io.RawIOBase):
    """The bytes of a place, fetched as they are read. Use it through a BufferedReader."""

    def __init__(self, url: str, place: Place, seen: Seen, patience: retry.Patience) -> None:
        self.url, self.place, self.seen, self.patience = url, place, seen, patience
        self.size = seen.size or 0
        self.at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes, at the cost of a request."""
        return True

    def tell(self) -> int:
        """The next byte."""
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; nothing is asked for before it is read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        self.at = max(base + offset, 0)
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Some of the next bytes; none at the end."""
        if self.at >= self.size or not len(buffer):
            return 0
        end = min(self.at + min(len(buffer), BLOCK), self.size)
        where = f" at byte {self.at} of {self.size}"
        data = _patiently(self.url, self.patience, lambda: self.place.fetch(self.at, end, self.seen), where)
        self.patience.rest()
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        """Close the connection too."""
        self.place.forget()
        super().close()


def _patiently(url: str, patience: retry.Patience, call: Callable[[], Result], where: str = "") -> Result:
    """A call's result within the limits of time; its last failure as a DataError that names the URL."""
    try:
        return patience.attempt(lambda: retry.within(min(CONNECT_SECONDS + STALL_SECONDS, patience.left + 1), call))
    except DataError:
        raise
    except Exception as error:
        raise _refusal(url, error, patience, where) from error


def _refusal(url: str, error: BaseException, patience: retry.Patience, where: str = "") -> DataError:
    if isinstance(error, ImportError):
        return DataError(f"{shown(url)}: {retry.reason(error)}; install that package or set data.sources.path to a copy")
    if isinstance(error, Unfit):
        return DataError(f"{shown(url)}: {error}")
    remedy = (
        "check the address and your right to read it" if not retry.is_transient(error) else "try again, or set data.sources.path to a copy"
    )
    if isinstance(error, FileNotFoundError):
        return DataError(f"{shown(url)}: no such file; {remedy}")
    return DataError(f"{shown(url)}: cannot be read{where}: {retry.reason(error)} ({patience}); {remedy}")


def _spool(url: str, place: Place, patience: retry.Patience) -> BinaryIO:
    """A whole file, copied to the disk for temporary files: where a server brings no parts there is no seeking otherwise."""
    while True:
        file: Any = tempfile.TemporaryFile()  # noqa: SIM115 - it is what is returned
        moved = [time.monotonic()]
        try:
            _copy(place, file, moved)
            return file
        except Exception as error:
            file.close()
            try:
                # only what stood still counts as trouble: a large file may take long
                patience.after(error, time.monotonic() - moved[0])
            except Exception:
                raise _refusal(url, error, patience) from error


def _copy(place: Place, file: BinaryIO, moved: list[float]) -> None:
    source, size = retry.within(CONNECT_SECONDS + STALL_SECONDS, place.whole)
    with source:
        while piece := retry.within(STALL_SECONDS, lambda: _some(source, BLOCK)):
            file.write(piece)
            moved[0] = time.monotonic()
    if size is not None and file.tell() != size:
        raise ConnectionError(f"it ended after {file.tell()} of {size} bytes")
    file.seek(0)


def _some(source: Any, most: int) -> bytes:
    """What has arrived, up to `most` bytes; nothing only at the end."""
    data: bytes = source.read1(most) if hasattr(source, "read1") else source.read(most)
    return data


# the web


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.timeout = CONNECT_SECONDS
        super().connect()
        self.sock.settimeout(STALL_SECONDS)


class _SecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        self.timeout = CONNECT_SECONDS
        super().connect()
        self.sock.settimeout(STALL_SECONDS)


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _Secure(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req)


class Web:
    """A file at an http:// or https:// address."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.brings_parts = True
        self.opener = urllib.request.build_opener(_Plain, _Secure)
        self.standing: tuple[Any, int] = (None, 0)
        """An answer, and the byte at which it stands. One value: an attempt that was left alone may still come back with one."""

    def look(self) -> Seen:
        """Ask for one byte: a HEAD is often forbidden, and the answer shows whether parts can be had."""
        try:
            with self._get("bytes=0-0") as response:
                self.brings_parts = response.status == 206 and _total(response) is not None
                return _seen(response)
        except urllib.error.HTTPError as error:
            if error.code == 416 and _total(error) == 0:  # an empty file has no first byte
                return _seen(error)
            raise

    def fetch(self, start: int, end: int, seen: Seen) -> bytes:
        """Read on in the answer that stands there, or ask for all from `start` on."""
        (response, at), self.standing = self.standing, (None, 0)
        if response is None or at != start:
            response = self._rest(start, seen)
        data = _gather(response, end - start)
        if not data:
            raise ConnectionError(f"the connection closed after {start} of {seen.size} bytes")
        self.standing = (response, start + len(data))
        return data

    def _rest(self, start: int, seen: Seen) -> Any:
        try:
            response = self._get(f"bytes={start}-")
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            raise Unfit(f"changed while it was read: it had {seen.size} bytes, and has none at {start}; start again") from None
        now = _seen(response)
        if now.is_not(seen):
            was, became = (f"{one.size} bytes {one.stamp}".strip() for one in (seen, now))
            raise Unfit(f"changed while it was read: it was {was}, and is {became}; start again")
        if not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
            raise Unfit(f"at byte {start} the server no longer answers with a part; start again")
        return response

    def whole(self) -> tuple[IO[bytes], int | None]:
        """The file from its beginning."""
        response = self._get(None)
        length = response.headers.get("Content-Length")
        return response, int(length) if length else None

    def forget(self) -> None:
        """Close the connection."""
        (response, _), self.standing = self.standing, (None, 0)
        if response is not None:
            response.close()

    def _get(self, part: str | None) -> Any:
        headers = {"Accept-Encoding": "identity", "User-Agent": "mistral-dist"}
        return self.opener.open(urllib.request.Request(self.url, headers=headers | ({"Range": part} if part else {})))


def _gather(response: Any, most: int) -> bytes:
    """Up to `most` bytes; fewer where the connection breaks or half of the time is over, so that nothing is read twice."""
    pieces: list[bytes] = []
    until = time.monotonic() + STALL_SECONDS / 2
    while most > 0 and time.monotonic() < until:
        try:
            piece = response.read1(most)
        except (OSError, http.client.HTTPException):
            if not pieces:
                raise
            break  # the next attempt meets it again, with these bytes safe
        if not piece:
            break
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


def _total(response: Any) -> int | None:
    """The size of the whole file, as an answer with a part tells it."""
    total = str(response.headers.get("Content-Range", "")).rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _seen(response: Any) -> Seen:
    headers = response.headers
    size = _total(response)
    if size is None and str(headers.get("Content-Length", "")).isdigit():
        size = int(headers["Content-Length"])
    return Seen(size, headers.get("ETag") or headers.get("Last-Modified") or "")


# everything else


class Store:
    """A file of any filesystem of fsspec."""

    def __init__(self, url: str) -> None:
        self.fs, self.path = _filesystem(url)
        self.most = BLOCK

    def look(self) -> Seen:
        """Ask the filesystem, not what it remembers."""
        self.fs.invalidate_cache()
        info = self.fs.info(self.path)
        if info.get("type") == "directory":
            raise IsADirectoryError(f"{self.path} is a folder")
        known = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "updated", "mtime", "created")
        return Seen(info.get("size"), next((str(info[key]) for key in known if info.get(key)), ""))

    def fetch(self, start: int, end: int, seen: Seen) -> bytes:
        """One block, and a look whether the file is still the same."""
        end = min(end, start + self.most)
        most, self.most = self.most, max(self.most // 2, SMALLEST_BLOCK)  # stays so where this attempt is left alone
        data: bytes = self.fs.cat_file(self.path, start=start, end=end)
        self.most = most
        now = self.look()
        if now.is_not(seen):
            raise Unfit(f"changed while it was read (was {seen.size} bytes {seen.stamp}, is {now.size} bytes {now.stamp}); start again")
        if len(data) != end - start:
            raise ConnectionError(f"{len(data)} bytes came of {end - start} from byte {start} on, of {seen.size} announced")
        return data

    def whole(self) -> tuple[IO[bytes], int | None]:
        """The file from its beginning."""
        return self.fs.open(self.path, "rb"), None

    def forget(self) -> None:
        """There is no connection of ours."""


def _place(url: str) -> Place:
    return Web(url) if is_http(url) else Store(url)


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise DataError(
            f"{shown(url)}: cannot be read: {retry.reason(error)}; install what it names, or set data.sources.path to a copy"
        ) from error
    return fs, path
