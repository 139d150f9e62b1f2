"""What is worth another attempt, and for how long."""

import email.utils
import errno
import socket
import ssl
import time
import urllib.error
from email.message import Message
from typing import Any

import pytest

from mistral_dist import retry


def answer(code: int, **headers: str) -> urllib.error.HTTPError:
    message = Message()
    for key, value in headers.items():
        message[key.replace("_", "-")] = value
    return urllib.error.HTTPError("http://x", code, "no", message, None)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class Clock:
    """Time that passes only in sleep, and in calls that take some."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def failing(clock: Clock, error: Exception, times: int, took: float = 0.0) -> Any:
    left = [error] * times

    def call() -> str:
        clock.now += took
        if left:
            raise left.pop()
        return "done"

    return call


class ConnectError(Exception):
    """Named and placed as in a library that need not be installed."""


class TransportError(Exception):
    pass


class ReadError(TransportError):
    pass


class OfflineModeIsEnabled(ConnectionError):
    pass


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        socket.gaierror(),
        answer(429),
        answer(503),
        ReadError(),
        urllib.error.URLError(ConnectionRefusedError()),
        caused(FileNotFoundError("not in the cache"), ConnectionResetError()),
        caused(ValueError("wrapped"), answer(500)),
    ],
)
def test_what_may_heal(error: Exception) -> None:
    assert retry.is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        answer(404),
        answer(403),
        FileNotFoundError(),
        PermissionError(),
        OSError(errno.ENOSPC, "disk full"),
        ssl.SSLCertVerificationError(),
        caused(urllib.error.URLError("wrapped"), ssl.SSLCertVerificationError()),
        caused(ConnectionError("wrapped"), OSError(errno.ENOSPC, "disk full")),
        KeyError("text"),
        caused(ConnectionError("cannot reach"), answer(401)),
        OfflineModeIsEnabled(),
        caused(ConnectionError("cannot reach"), OfflineModeIsEnabled()),
        ConnectError(),
    ],
)
def test_what_does_not(error: Exception) -> None:
    assert not retry.is_transient(error)


def test_waits_double_and_are_the_same_each_time() -> None:
    for _ in range(2):
        clock = Clock()
        assert retry.Patience(clock=clock, sleep=clock.sleep).attempt(failing(clock, TimeoutError(), 8)) == "done"
        assert clock.slept == [0.5, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("took", [0.0, 7.0, 40.0])
def test_trouble_is_borne_no_longer_than_it_may_be(took: float) -> None:
    clock = Clock()
    with pytest.raises(TimeoutError):
        retry.Patience(clock=clock, sleep=clock.sleep).attempt(failing(clock, TimeoutError(), 10**6, took))
    assert retry.SECONDS / 2 < clock.now < retry.SECONDS + took


def test_patience_lasts_across_calls_until_there_is_progress() -> None:
    clock = Clock()
    patience = retry.Patience(100, clock=clock, sleep=clock.sleep)
    patience.attempt(failing(clock, TimeoutError(), 1, took=60))
    with pytest.raises(TimeoutError):
        patience.attempt(failing(clock, TimeoutError(), 1, took=60))
    patience.rest()
    assert patience.attempt(failing(clock, TimeoutError(), 1, took=60)) == "done"


def test_a_long_attempt_need_not_use_up_patience() -> None:
    clock = Clock()
    patience = retry.Patience(100, clock=clock, sleep=clock.sleep, waits_only=True)
    assert patience.attempt(failing(clock, TimeoutError(), 3, took=3600)) == "done"


def test_what_does_not_heal_is_raised_at_once() -> None:
    clock = Clock()
    with pytest.raises(KeyError):
        retry.Patience(clock=clock, sleep=clock.sleep).attempt(failing(clock, KeyError("x"), 1))
    assert clock.slept == []


def test_the_wait_is_the_one_that_is_asked_for() -> None:
    clock = Clock()
    retry.Patience(clock=clock, sleep=clock.sleep).attempt(failing(clock, answer(429, Retry_After="77"), 2))
    assert clock.slept == [77, 77]


def test_a_wait_that_is_too_long_is_not_begun() -> None:
    clock = Clock()
    with pytest.raises(urllib.error.HTTPError):
        retry.Patience(clock=clock, sleep=clock.sleep).attempt(failing(clock, answer(429, Retry_After="3600"), 1))
    assert clock.slept == []


def test_a_date_may_be_asked_for() -> None:
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert retry.retry_after(answer(503, Retry_After=date)) == pytest.approx(60, abs=3)
    assert retry.retry_after(answer(503, Retry_After="soon")) is None


def test_a_call_that_hangs_is_left() -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        retry.within(0.1, lambda: time.sleep(2))
    assert time.monotonic() - begun < 1
    assert retry.within(1, lambda: 5) == 5
    with pytest.raises(KeyError):
        retry.within(1, lambda: {}["x"])


def test_the_bound_leaves_a_collective_its_time() -> None:
    # a rank may meet trouble when it opens a file, and again at its first block: patience is not full again in between
    from mistral_dist.data import places
    from mistral_dist.runtime.engine import TIMEOUT

    assert TIMEOUT.total_seconds() / 2 > retry.SECONDS + places.CONNECT_SECONDS + places.STALL_SECONDS
