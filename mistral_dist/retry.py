"""Patience with what may heal by itself: a reset connection, a busy server; never with a wrong name or a missing right.

Waits double from half a second to half a minute, without chance in them, and what a server asks for (Retry-After) is
honoured. The whole is bounded by SECONDS: ranks that wait for each other in a collective give up after 10 minutes, and a
rank that waits for its data must have said so long before.
"""

import datetime
import email.utils
import errno
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

SECONDS = 240.0
"""Trouble without progress that is borne, attempts and waits together."""
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0

BUSY = (408, 425, 429)
"""With all above 499: the answers of a server that may say something else later."""
HEALING = {
    "TransportError",  # httpx
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "HTTPClientError",  # botocore
    "ProtocolError",  # urllib3
}
"""Failures of the network in libraries that need not be installed, by name."""
FINAL = {"OfflineModeIsEnabled", "UnsupportedProtocol", "LocalProtocolError", "InvalidURL", "SSLCertVerificationError"}
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG)
"""A full disk is an OSError too."""

GIVE_UP = threading.Event()
"""Set when this process is to end: nothing is waited for any more."""

Result = TypeVar("Result")


class Patience:
    """How much trouble has been borne. One object accompanies one undertaking; `rest` when it got on."""

    def __init__(
        self,
        seconds: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = GIVE_UP.wait,
        worth: Callable[[BaseException], bool] | None = None,
        waits_only: bool = False,
    ) -> None:
        self.seconds = SECONDS if seconds is None else seconds
        self.clock = clock
        self.worth = worth or is_transient
        self.failures = 0
        self.spent = 0.0
        self._sleep = sleep
        # a download that fails after an hour has not used up an hour of patience
        self._waits_only = waits_only

    def rest(self) -> None:
        """There was progress: patience is full again."""
        self.failures, self.spent = 0, 0.0

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(self.seconds - self.spent, 0.0)

    def after(self, error: BaseException, took: float) -> None:
        """Wait after a failed attempt that took so long; or raise the error, where waiting would not help or was enough."""
        self.failures += 1
        self.spent += 0.0 if self._waits_only else took
        wait = max(min(FIRST_WAIT * 2.0 ** (self.failures - 1), LONGEST_WAIT), retry_after(error) or 0.0)
        if not self.worth(error) or wait >= self.left:
            raise error
        self._sleep(wait)
        if GIVE_UP.is_set():
            raise error
        self.spent += wait

    def attempt(self, call: Callable[[], Result]) -> Result:
        """The result of a call, made again while that may help. Raises what the last one raised."""
        while True:
            begun = self.clock()
            try:
                return call()
            except Exception as error:
                self.after(error, self.clock() - begun)

    def __str__(self) -> str:
        return f"{self.failures} attempts in {self.spent:.0f} s" if self.failures > 1 else "not tried again"


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """The result of a call, or TimeoutError. A call that hangs is left to a thread that does not keep the process alive."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:.3g} s")
    if errors:
        raise errors[0]
    return results[0]


def is_transient(error: BaseException) -> bool:
    """Whether the same request may do better later. What a server answered decides; where none did, the kind of failure."""
    names = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    if names & FINAL or any(getattr(one, "errno", None) in LOCAL for one in _chain(error)):
        return False
    answered = status(error)
    if answered is not None:
        return answered in BUSY or answered >= 500
    return bool(names & HEALING) or any(_is_of_the_network(one) for one in _chain(error))


def is_unreachable(error: BaseException) -> bool:
    """Whether nobody is there: the name is unknown or the port closed. A person who waits is better told at once."""
    return any(isinstance(one, ConnectionRefusedError | socket.gaierror) for one in _chain(error))


def status(error: BaseException) -> int | None:
    """The HTTP status that some client library's error tells of."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for found in (response, getattr(response, "status_code", None), getattr(one, "status", None), getattr(one, "code", None)):
            if isinstance(found, int) and 100 <= found < 600:
                return found
    return None


def retry_after(error: BaseException) -> float | None:
    """The seconds that a server asks to wait, if it does."""
    for one in _chain(error):
        for headers in (getattr(one, "headers", None), getattr(getattr(one, "response", None), "headers", None)):
            asked = headers.get("Retry-After") if headers is not None and hasattr(headers, "get") else None
            if asked is not None:
                return _seconds(str(asked))
    return None


def reason(error: BaseException) -> str:
    """What happened, in one line of at most 200 characters."""
    text = " ".join(str(error).split())[:200]
    answered = status(error)
    if answered is None:
        return text or type(error).__name__
    asked = retry_after(error)
    waiting = f", which asks to wait {asked:.0f} s" if asked else ""
    return f"HTTP {answered} {http.client.responses.get(answered, '')}".rstrip() + waiting


def _is_of_the_network(error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | FileExistsError):
        return False
    return isinstance(error, OSError | http.client.HTTPException)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it: libraries wrap what a server answered."""
    seen: list[Any] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _seconds(asked: str) -> float | None:
    if asked.strip().isdigit():
        return float(asked)
    try:
        until = email.utils.parsedate_to_datetime(asked)
    except ValueError:
        return None
    return max((until - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0) if until.tzinfo else None
