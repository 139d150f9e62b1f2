"""Who is hung, who is slow: each rank says where it stands, and a thread of each reads what the others say.

The main thread notes its place (step, micro-step, phase) in memory, which costs nothing. A thread of the same rank carries
that to the key-value store of torchrun, in the launcher's process on the first machine, which outlives a hung rank; and reads
there what the others have said. Ranks make the same moves in the same order, so the one with the fewest moves is the one that
the others wait for. A process that is stopped, or whose machine is gone, says nothing any more.

The first rank that finds another hung puts its verdict into the store, and all obey it: they dump their stacks, one writes
the status, those on the machine of the hung rank kill it, all leave.

Where the store itself gives no answer any more (its machine is gone, or the network to it is cut), whoever asks it waits for as
long as TCP does, a quarter of an hour. So a second thread looks at when it last answered, and leaves by itself.
"""

import datetime
import faulthandler
import json
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from mistral_dist.errors import FAILED
from mistral_dist.runtime import process

PATIENCE = {"loading": 4.0, "saving": 4.0}
"""Phases in which one rank may work for long while the others wait, and how many times the limit they are given."""
VALIDATION = "validation"
"""The phase of a loss on the validation examples, which goes by batches."""
ONLY_WAITING = 5.0
"""Times the limit for which ranks wait for each other in a collective: the watch must have spoken before."""
SLOW = 1.5
"""Times the median of the others' seconds for a forward."""
ENOUGH = 20
"""Forwards behind a rank's seconds."""


class Place(NamedTuple):
    """Where the main thread of a rank stands."""

    moves: int = 0
    """Changes of place so far: the same number means the same place, on every rank."""
    phase: str = "loading"
    step: int | None = None
    """From 1."""
    micro: int | None = None
    """From 1; of a validation, the batch."""

    def __str__(self) -> str:
        words = ("step", "batch" if self.phase == VALIDATION else "micro-step")
        counted = ((word, number) for word, number in zip(words, (self.step, self.micro), strict=True) if number is not None)
        return ", ".join([*(f"{word} {number}" for word, number in counted), self.phase])


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself, every few seconds."""

    host: str
    process: str
    """Its `process.identity`."""
    beats: int
    place: Place
    pace: float | None = None
    """Median seconds of its forwards; None before there are enough."""

    def write(self) -> str:
        """As it stands in the store."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> "Beat":
        """As `write` wrote it."""
        found = json.loads(text)
        return cls(**{**found, "place": Place(*found["place"])})


@dataclass
class Seen:
    """The newest of a rank, and since when it is so on this rank's own clock."""

    beat: Beat
    alive: float
    moved: float

    def update(self, beat: Beat, now: float) -> None:
        """Another look at the store."""
        if beat.beats != self.beat.beats:
            self.alive = now
        if beat.place.moves != self.beat.place.moves:
            self.moved = now
        self.beat = beat


def hung(ranks: Mapping[int, Seen], now: float, limit: float) -> dict[int, str]:
    """The ranks that the others wait in vain for, each with what is known of it, in words; usually none.

    One that says nothing is hung; else those with the fewest moves, where another one is ahead of them. Ranks that stand at
    the same place for long may all be at work.
    """
    silent = {rank: now - seen.alive for rank, seen in ranks.items() if now - seen.alive >= _allowed(seen.beat.place, limit)}
    if silent:
        return {rank: f"has given no sign of life for {age:.0f} s; last seen at" for rank, age in silent.items()}
    moves = [seen.beat.place.moves for seen in ranks.values()]
    last = {rank: now - seen.moved for rank, seen in ranks.items() if seen.beat.place.moves == min(moves) < max(moves)}
    return {rank: f"has not moved for {age:.0f} s:" for rank, age in last.items() if age >= _allowed(ranks[rank].beat.place, limit)}


def _allowed(place: Place, limit: float) -> float:
    return limit * PATIENCE.get(place.phase, 1.0)


def sentence(found: Mapping[int, str], ranks: Mapping[int, Seen]) -> str:
    """The verdict, in words: which rank, where, doing what, for how long."""
    each = [f"{named(rank, ranks[rank].beat)} {words} {ranks[rank].beat.place}" for rank, words in found.items()]
    others = [rank for rank in ranks if rank not in found]
    waiting = f"; rank{'s'[: len(others) > 1]} {', '.join(map(str, others))} waited for it" if 0 < len(others) <= 8 else ""
    return f"{'; '.join(each)}{waiting}"


def named(rank: int, beat: Beat) -> str:
    """A rank, its machine and its process."""
    return f"rank {rank} (process {beat.process.partition(':')[0]} on {beat.host})"


def slow(paces: Mapping[int, float]) -> tuple[int, float] | None:
    """The slowest rank and how many times the others' median it takes for a forward, where that is too much."""
    if len(paces) < 2:
        return None
    slowest = max(paces, key=lambda rank: paces[rank])
    times = paces[slowest] / statistics.median(pace for rank, pace in paces.items() if rank != slowest)
    return (slowest, times) if times >= SLOW else None


class Board(Protocol):
    """Where ranks write what all can read: torchrun's store."""

    def set(self, key: str, value: str) -> object:
        """Write."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write where nothing is written yet (`expected` is empty); what stands there then."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of them are written."""

    def get(self, key: str) -> bytes:
        """Read what is written."""


class Watch:
    """One rank's threads that look after the others, and after the store by which they do."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        board: Board,
        limit: float,
        *,
        place: Callable[[], Place],
        pace: Callable[[], float | None],
        stacks: Path,
        report: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        """`report` writes the status; `say` a line into the log."""
        self._rank, self._world_size, self._board, self._limit = rank, world_size, board, limit
        self._place, self._pace, self._report, self._say = place, pace, report, say
        self._every = min(5.0, limit / 10)
        self._ranks: dict[int, Seen] = {}
        self._beats = 0
        self._told_slow: set[int] = set()
        self._answered = time.monotonic()
        """When the store last did."""
        self._over = threading.Event()
        self._stacks = stacks / f"rank-{rank}.txt"
        stacks.mkdir(parents=True, exist_ok=True)
        if self._stacks.is_file() and self._stacks.stat().st_size:  # of the launch before, which somebody may still want to read
            self._stacks.replace(stacks / f"rank-{rank}-before.txt")
        self._file = open(self._stacks, "w", encoding="utf-8")  # noqa: SIM115 - open for as long as it may be needed
        # answered by the signal handler itself, even where the main thread is deep in a library
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._look_after_store, name="watch-store", daemon=True).start()

    def close(self) -> None:
        """All is well: nobody is looked after any more."""
        self._over.set()
        self._thread.join(self._every)
        faulthandler.unregister(signal.SIGUSR2)
        self._file.close()
        with suppress(OSError):
            if self._stacks.stat().st_size == 0:
                self._stacks.unlink()
                self._stacks.parent.rmdir()

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self._every):
            now = time.monotonic()
            with suppress(RuntimeError):  # the connection to the store is broken: see _look_after_store
                self._look(now, self._was_away(looked, now))
            looked = time.monotonic()  # of many ranks a look takes seconds, in which this process was not away

    def _look_after_store(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self._every) and self._thread.is_alive():
            now = time.monotonic()
            if self._was_away(looked, now):
                self._answered = now
            looked, age = now, now - self._answered
            # as patient as the others are with this rank, and as this one is with rank 0, which works beside the store
            places = [self._place(), *(seen.beat.place for rank, seen in list(self._ranks.items()) if rank == 0)]
            if age >= max(_allowed(place, self._limit) for place in places):
                self._give_up(age)

    def _was_away(self, before: float, now: float) -> bool:
        """Whether this process was itself stopped between two looks: what it then missed says nothing about the others."""
        return now - before > 2 * self._every + 1

    def _look(self, now: float, was_away: bool) -> None:
        self._beats += 1
        own = Beat(socket.gethostname(), process.identity(), self._beats, self._place(), self._pace())
        self._board.set(_key(self._rank), own.write())
        for rank in range(self._world_size):
            is_known, self._answered = self._board.check([_key(rank)]), time.monotonic()
            if is_known:
                beat = Beat.read(self._board.get(_key(rank)).decode())
                seen = self._ranks.setdefault(rank, Seen(beat, now, now))
                seen.update(beat, now)
                if was_away:
                    seen.alive = seen.moved = now
        found = hung(self._ranks, now, self._limit)
        if found:
            verdict = json.dumps({"ranks": sorted(found), "message": sentence(found, self._ranks)})
            self._obey(json.loads(self._board.compare_set("verdict", "", verdict)))
        elif self._board.check(["verdict"]):
            self._obey(json.loads(self._board.get("verdict")))
        self._look_for_slow()

    def _look_for_slow(self) -> None:
        found = slow({rank: seen.beat.pace for rank, seen in self._ranks.items() if seen.beat.pace is not None})
        if self._rank == 0 and found is not None and found[0] not in self._told_slow:
            rank, times = found
            self._told_slow.add(rank)
            self._say(f"note: {named(rank, self._ranks[rank].beat)} is slow: a forward takes {times:.1f} times the others' median")

    def _obey(self, verdict: dict[str, object]) -> None:
        """Leave as the verdict says."""
        guilty, message = verdict["ranks"], str(verdict["message"])
        assert isinstance(guilty, list)
        if self._over.is_set():
            return
        self._begin_to_leave()
        # each by itself: what cannot be written must not keep a hung process alive
        if self._rank == min((rank for rank in self._ranks if rank not in guilty), default=self._rank):
            self._tell(message)
            with suppress(Exception):
                self._board.set("reported", "")
        else:
            with suppress(Exception):
                _wait(lambda: self._board.check(["reported"]), 10.0)
        with suppress(Exception):
            self._end([self._ranks[rank].beat for rank in guilty if rank != self._rank])
        os._exit(FAILED)

    def _give_up(self, age: float) -> None:
        """Leave without a verdict, which would be in the store."""
        if self._over.is_set():
            return
        self._begin_to_leave()
        what = f"node 0 at {process.environment('MASTER_ADDR')} does not answer any more, for {age:.0f} s"
        why = "it, or its launcher, is gone or stopped, or the network to it is cut"
        self._tell(f"{what}: {why}; rank {self._rank} on {socket.gethostname()} is at {self._place()}")
        os._exit(FAILED)

    def _begin_to_leave(self) -> None:
        """Stacks, and an end that is bounded, whatever does not answer."""
        threading.Timer(20.0, os._exit, [FAILED]).start()
        with suppress(OSError):
            faulthandler.dump_traceback(file=self._file, all_threads=True)

    def _tell(self, message: str) -> None:
        with suppress(Exception):
            self._say(f"watch: {message}")
        with suppress(Exception):
            self._report(f"{message}; stacks are in {self._stacks.parent}; run the same command to go on")

    def _end(self, beats: Sequence[Beat]) -> None:
        """Have hung processes of this machine show their stacks, if they still can, and kill them."""
        here = [beat for beat in beats if beat.host == socket.gethostname() and process.is_alive(beat.process)]
        for number in (signal.SIGUSR2, signal.SIGKILL):
            for beat in here:
                with suppress(ProcessLookupError):
                    os.kill(int(beat.process.partition(":")[0]), number)
            time.sleep(0.5)


def board() -> torch.distributed.Store:
    """A connection of its own to the store by which the ranks met: the main thread may wait in the other one."""
    address, port = process.environment("MASTER_ADDR"), int(process.environment("MASTER_PORT"))
    store = torch.distributed.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=30), wait_for_workers=False)
    attempt = process.environment("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.PrefixStore(f"mistral-dist/{attempt}", store)


def _key(rank: int) -> str:
    return f"rank-{rank}"


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
