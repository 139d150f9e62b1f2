"""A URL -> a file that can be read and sought like a local one, through stalls, resets and busy servers.

HTTP streams from where reading begins, and after trouble goes on at the byte reached, checked to be of the same file (size,
and ETag or Last-Modified). Everything else that fsspec knows (s3://, gs://, hf://, memory://, ...) is read block by block.
No attempt lasts longer than CONNECT_SECONDS + STALL_SECONDS, not even where the filesystem knows no time limit; the trouble
without progress is bounded by retry.SECONDS.
"""

import io
import re
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar

from mistral_dist import retry
from mistral_dist.data import places
from mistral_dist.data.places import Place, Seen, Store, Unfit, Web
from mistral_dist.errors import DataError

Result = TypeVar("Result")

UNREACHED_SECONDS = 10.0
"""A server that has never answered is waited for this long; one that did, retry.SECONDS."""


def is_remote(path: str) -> bool:
    """Whether a source's path is a URL."""
    return "://" in path


def is_http(url: str) -> bool:
    """Whether a URL is one of the web, which has no folders."""
    return url.lower().startswith(("http://", "https://"))


def shown(url: str) -> str:
    """A URL as errors, audits and model cards name it: without user and password, and without a query, which may hold a signature."""
    parts = urllib.parse.urlsplit(url)
    if not parts.netloc:
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

    return _patiently(url, _first_look(), find)


def refuse_user(url: str) -> None:
    """Raise DataError for a user name in an address of the web: it would be sent nowhere."""
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise DataError(f"{shown(url)}: a user name in an address is not supported; use a signed URL, or set data.sources.path to a copy")


def state(url: str) -> list[Any]:
    """Size and, if the server tells it, a stamp that changes with the content."""
    seen = _patiently(url, _first_look(), _place(url).look)
    return [seen.size, seen.stamp] if seen.stamp else [seen.size]


def open_remote(url: str) -> BinaryIO:
    """A file at a URL, buffered and seekable. Raises DataError with the URL and the reason, then and while it is read."""
    place = _place(url)
    patience = _first_look()
    seen = _patiently(url, patience, place.look)
    patience.worth = retry.is_transient
    if seen.size is None or (isinstance(place, Web) and not place.brings_parts):
        return _spool(url, place, patience)
    return io.BufferedReader(RemoteFile(url, place, seen, patience), places.BLOCK)


def _first_look() -> retry.Patience:
    """Patience with a server that was never reached: a closed port or an unknown name is more likely a mistake than trouble."""
    patience = retry.Patience()
    patience.worth = lambda error: retry.is_transient(error) and not (retry.is_unreachable(error) and patience.spent > UNREACHED_SECONDS)
    return patience


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
        end = min(self.at + min(len(buffer), places.BLOCK), self.size)
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
        return patience.attempt(lambda: retry.within(min(places.CONNECT_SECONDS + places.STALL_SECONDS, patience.left + 1), call))
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
    source, size = retry.within(places.CONNECT_SECONDS + places.STALL_SECONDS, place.whole)
    with source:
        while piece := retry.within(places.STALL_SECONDS, lambda: _some(source, places.BLOCK)):
            file.write(piece)
            moved[0] = time.monotonic()
    if size is not None and file.tell() != size:
        raise ConnectionError(f"it ended after {file.tell()} of {size} bytes")
    file.seek(0)


def _some(source: Any, most: int) -> bytes:
    """What has arrived, up to `most` bytes; nothing only at the end."""
    data: bytes = source.read1(most) if hasattr(source, "read1") else source.read(most)
    return data


def _place(url: str) -> Place:
    return Web(url) if is_http(url) else Store(*_filesystem(url))


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise DataError(
            f"{shown(url)}: cannot be read: {retry.reason(error)}; install what it names, or set data.sources.path to a copy"
        ) from error
    return fs, path
