"""Where the bytes of a remote file come from, one attempt at a time: a web server, or a filesystem of fsspec.

Nothing here waits or tries again; that is remote.py's.
"""

import http.client
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import IO, Any, Protocol

CONNECT_SECONDS = 10.0
STALL_SECONDS = 30.0
BLOCK = 4 * 2**20
"""Bytes that are read at once."""
SMALLEST_BLOCK = 2**16
"""A filesystem that cannot bring a block in time is asked for half of it, down to this."""


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

    def __init__(self, fs: Any, path: str) -> None:
        self.fs, self.path = fs, path
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
