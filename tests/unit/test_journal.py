"""Lines that only grow: each once and in order, through full disks, failed syncs and cuts."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_dist import journal as module
from mistral_dist.errors import MachineError
from mistral_dist.journal import Journal, reached


def steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


Room = Callable[[int], None]


def narrow(patch: pytest.MonkeyPatch) -> Room:
    """A disk that takes so many bytes more, then it is full; a function that says how many."""
    left, real = [1 << 30], os.pwrite

    def pwrite(handle: int, content: bytes, place: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(handle, content[: left[0]], place)
        left[0] -= written
        return written

    def take(size: int) -> None:
        left[0] = size

    patch.setattr(os, "pwrite", pwrite)
    return take


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    return narrow(monkeypatch)


def test_a_full_disk_takes_half_a_line_and_the_rest_later(file: Path, room: Room) -> None:
    journal = Journal(file)
    journal.append({"step": 1})
    room(5)
    for step in (2, 3):
        journal.append({"step": step})
    with pytest.raises(OSError, match="No space"):
        journal.sync()
    assert file.read_text() == '{"step": 1}\n{"ste'
    room(1 << 30)
    journal.append({"step": 4})
    assert steps_in(file) == [1, 2, 3, 4]
    journal.sync()
    journal.append({"step": 5})
    assert steps_in(file) == [1, 2, 3, 4, 5]


@given(st.lists(st.one_of(st.integers(0, 60), st.none()), max_size=30))
def test_each_line_is_there_once_and_in_order_whatever_the_room(tmp_path_factory: pytest.TempPathFactory, rooms: list[int | None]) -> None:
    """A number: the room that there is before the next line; None: a sync."""
    with pytest.MonkeyPatch.context() as patch:
        take = narrow(patch)
        file = tmp_path_factory.mktemp("j") / "metrics.jsonl"
        journal, wanted = Journal(file), []
        for size in rooms:
            if size is None:
                try:
                    journal.sync()
                except OSError:
                    continue
                assert not wanted or steps_in(file) == wanted
            else:
                take(size)
                wanted.append(len(wanted) + 1)
                journal.append({"step": len(wanted)})
        take(1 << 30)
        journal.append({"step": len(wanted) + 1})
        assert steps_in(file) == [*wanted, len(wanted) + 1]


def test_what_a_failed_sync_may_have_lost_is_written_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(file)
    journal.append({"step": 1})
    journal.sync()
    journal.append({"step": 2})

    def fails(_: int) -> None:
        content = file.read_bytes()
        file.write_bytes(content[:-5] + b"\0" * 5)  # the kernel has dropped the page
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="Input/output"):
            journal.sync()
    assert b"\0" in file.read_bytes()
    journal.append({"step": 3})
    journal.sync()
    assert steps_in(file) == [1, 2, 3]


def test_a_line_appended_while_a_sync_runs_is_not_forgotten(file: Path, monkeypatch: pytest.MonkeyPatch, room: Room) -> None:
    journal, real = Journal(file), os.fsync
    journal.append({"step": 1})

    def appended_meanwhile(handle: int) -> None:
        room(0)
        journal.append({"step": 2})
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", appended_meanwhile)
        journal.sync()
    assert steps_in(file) == [1]
    room(1 << 30)
    journal.sync()
    assert steps_in(file) == [1, 2]


def test_what_is_held_is_written_with_the_next(file: Path) -> None:
    journal = Journal(file)
    journal.append({"step": 1}, hold=True)
    assert not file.exists()
    journal.append({"step": 2})
    assert steps_in(file) == [1, 2]
    journal.sync()


def test_what_waits_is_bounded(file: Path, room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 100)
    journal = Journal(file)
    room(0)
    for step in range(8):
        journal.append({"step": step})
    with pytest.raises(MachineError, match=r"metrics\.jsonl: No space left on device; 108 bytes of it wait in memory.*make room"):
        journal.append({"step": 8})


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200)), max_size=40),
    st.integers(0, 60),
    st.integers(0, 41),
    st.booleans(),
    st.integers(16, 300),
)
def test_a_cut_keeps_exactly_the_lines_up_to_a_step(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[int, int]], step: int, synced: int, half: bool, block: int
) -> None:
    """Any steps that never fall, lines of any length, any part of them on the disk, with half a line at the end or not."""
    file = tmp_path_factory.mktemp("j") / "metrics.jsonl"
    journal, now, wanted = Journal(file), 0, []
    for number, (more, length) in enumerate(lines):
        now += more
        journal.append({"step": now, "ids": "x" * length})
        wanted += [now] if now <= step else []
        if number == synced:
            journal.sync()
    if half:
        journal.sync()
        with open(file, "a") as stream:
            stream.write('{"step": 1')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        journal.cut_back(step)
    assert (steps_in(file) if file.exists() else []) == wanted
    journal.append({"step": step + 1})
    journal.sync()
    assert steps_in(file) == [*wanted, step + 1]


def test_a_cut_reads_the_end_alone(file: Path) -> None:
    journal = Journal(file)
    for step in range(1, 5001):
        journal.append({"step": step, "loss": 0.1})
    journal.sync()
    with open(file, "r+b") as stream:
        stream.write(b"\xff\xff")  # were the beginning read, it would be no line
    size = len(file.read_bytes())
    journal.cut_back(4990)
    assert size - file.stat().st_size == 10 * len('{"step": 5000, "loss": 0.1}\n')


def test_how_far_a_file_reaches(file: Path) -> None:
    assert reached(file) == 0
    file.write_text('{"step": 1}\n' * 20_000 + '{"step": 7}\n{"step": 7, "eval": {}}\n{"step": 8')
    assert reached(file) == 7.5, "the last whole line"
    file.write_text('{"step": 3}\n\0\0\n')
    assert reached(file) == 3, "not what a machine that went down has left"
