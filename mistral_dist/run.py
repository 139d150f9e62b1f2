"""The run directory: one writer at a time, a status that other tools read, metrics that only grow.

    recipe.yaml          resolved
    status.json          state, exit code, message, step, steps, checkpoint, launches so far, SLURM's job, updated
    metrics.jsonl        one object for each step, and one ("eval") for each validation, after that of its step
    data_order.jsonl     with log.data_order
    untrained.jsonl      steps that changed nothing, why, and the ids of the examples that may be to blame
    quarantine.jsonl     of a stream: every row that was dropped, with place and reason, as of the last checkpoint
    debug.jsonl          of the debug mode: what was looked at, and found
    log.txt              what the workers and their libraries printed; log-node1.txt: those of another node than the first
    lease.json           who writes here now
    checkpoints/ adapter/ evaluation/

Steps count from 1 in everything that is written.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mistral_dist.config import Recipe, changed_fields
from mistral_dist.errors import MachineError, RunError, TrainingError
from mistral_dist.files import describe, read_json, remedy, replace_text, write_text
from mistral_dist.journal import Journal, step_of
from mistral_dist.runtime import process
from mistral_dist.runtime.nodes import Nodes

PROGRESS = ("step", "steps", "checkpoint")
"""Of a status; null where nothing is known of them yet."""
BEGINNING = ("launches", "job", "base", "held_out")
"""What is told at the start of a launch; base, held_out: the fingerprints of the base, and of the data that are kept from the training."""
FREE_IT = "wait for it, stop it, or start another run with run.dir=..."
State = Literal["running", "finished", "stopped", "failed"]
STARTING = "starting"
"""The message of a run whose workers are waited for."""


class RunDirectory:
    """The files of one run. The holder of the lease writes: its main thread, its saver the checkpoints; any thread may `sync`.

    Why it ended may be noted in the status by any rank of the holder's group, also by its watch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.log = path / "log.txt"
        self.lease: Lease | None = None
        self.token = ""
        """Of the lease of this group of ranks; empty in a process that belongs to none."""
        self.saved = 0
        """The step of the newest checkpoint, for what is told after the session has ended; 0 where this process has written none."""
        self.closing = contextlib.ExitStack()
        """What must have ended before the lease is given back."""
        self._journals: dict[str, Journal] = {}

    def log_of(self, nodes: Nodes | None) -> Path:
        """Where this node's workers print."""
        return self.log if nodes is None or nodes.is_first else self.path / f"log-node{nodes.rank}.txt"

    def recipe(self) -> Recipe:
        """The recipe that the run was started with. Raises RunError where there is no run."""
        file = self.path / "recipe.yaml"
        if not file.is_file():
            raise RunError(f"{self.path}: no run there (recipe.yaml is missing); start one with `mistral-dist train RECIPE`")
        return Recipe.load(file)

    def begin(self, recipe: Recipe) -> None:
        """Write down the recipe, or check that it is the one that the run began with. Raises RunError naming a changed field."""
        file = self.path / "recipe.yaml"
        if file.is_file():
            check_same(recipe, self.recipe(), self.path)
        write_text(file, recipe.dump())

    def status(self) -> dict[str, Any] | None:
        """The content of status.json, or None where there is none yet."""
        return read_json(self.path / "status.json")

    def set_status(self, state: State, exit_code: int | None, message: str, **progress: Any) -> None:
        """Replace status.json; PROGRESS and BEGINNING keep their values unless given. Works on a full disk.

        Raises OSError where the folder cannot be written, or may not because the lease has expired.
        """
        if self._is_expired() or (self.lease is not None and self.lease.lost) or self._is_anothers():
            raise OSError(errno.ETIMEDOUT, "the lease could not be renewed, or another holds it", str(self.path))
        before = self.status() or {}
        kept = {**dict.fromkeys(PROGRESS), **{key: before[key] for key in (*PROGRESS, *BEGINNING) if key in before}}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        status = {"state": state, "exit_code": exit_code, "message": message, **kept, **progress, "updated": now}
        replace_text(self.path / "status.json", json.dumps(status, indent=2) + "\n")

    def check_lease(self) -> None:
        """Raise TrainingError where another process has taken the run over."""
        if self.lease is not None and self.lease.lost:
            raise TrainingError(f"{self.path}: another process has taken this run over; this one stops without writing")

    def check_publishing(self) -> None:
        """Look at the lease itself: raise TrainingError where it is another's, OSError where it has expired or cannot be read."""
        if self.lease is not None:
            self.lease.look()
        self.check_lease()
        if self._is_expired():
            raise OSError(errno.ETIMEDOUT, "the lease could not be renewed", str(self.path))

    def append(self, name: str, entry: dict[str, Any]) -> None:
        """Add one line to a .jsonl file of the run: at once, or, where the disk is full or away, as soon as it can be."""
        self._journal(name).append(entry, hold=self._is_expired())

    def sync(self) -> None:
        """Put what was appended on the disk: before a checkpoint claims that those steps were made. Raises OSError."""
        for journal in list(self._journals.values()):
            journal.sync()

    def cut_back(self, step: float) -> None:
        """Drop the lines of metrics, data order, untrained steps and quarantine that lie after a step: they will be made again.

        That of the step's own validation lies half a step after it.
        """
        for name in ("metrics.jsonl", "data_order.jsonl", "untrained.jsonl", "quarantine.jsonl"):
            self._journal(name).cut_back(step)

    def _journal(self, name: str) -> Journal:
        return self._journals.setdefault(name, Journal(self.path / name))

    def _is_anothers(self) -> bool:
        """Whether the lease bears the token of another group, as a rank that does not hold it itself sees it.

        Where it is gone, the first rank of this group has given it back.
        """
        found = read_json(self.path / "lease.json") if self.token and self.lease is None else None
        return found is not None and found.get("token") != self.token

    def _is_expired(self) -> bool:
        return self.lease is not None and self.lease.expired

    def recent_metrics(self, steps: int) -> list[dict[str, Any]]:
        """The metrics of the last steps, oldest first; a line half written is left out. Costs the same at any length."""
        entries = [json.loads(line) for line in self._last_metrics(1024 * (steps + 1)) if step_of(line) < float("inf")]
        return [entry for entry in entries if "eval" not in entry][-steps:]

    def last_validation(self) -> dict[str, Any] | None:
        """The "eval" object of the last validation, with its step; None where there was none in the last 1,000 steps or so."""
        lines = (line for line in reversed(self._last_metrics(2**19)) if '"eval": ' in line and step_of(line) < float("inf"))
        return next(({"step": entry["step"], **entry["eval"]} for entry in map(json.loads, lines)), None)

    def _last_metrics(self, size: int) -> list[str]:
        """The lines in the last bytes of the metrics, oldest first; the first and the last may be parts of one."""
        try:
            with open(self.path / "metrics.jsonl", "rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - size))
                return stream.read().decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return []


def check_same(recipe: Recipe, began: Recipe, path: Path) -> None:
    """Raise RunError where a recipe differs from the one a run began with in what it must not change."""
    changed = changed_fields(began, recipe)
    if changed:
        key, old, new = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise RunError(
            f"{path}: began with {key}={old!r}, the recipe now says {new!r}{more}; start another run with run.dir=..., or --fresh to"
            " move the old one aside"
        )


class Lease:
    """The right to write in a run directory, held by one process anywhere on a shared file system.

    A file made exclusively, renewed in the background. A holder on this host is asked after directly; one on another
    host counts as gone when whoever wants the run has seen no renewal for `EXPIRES` seconds.
    """

    RENEW = 15.0
    EXPIRES = 120.0
    FAR = 1800.0
    """Seconds that the clocks of two machines never differ: a lease that was renewed longer ago is nobody's."""
    PATIENCE = 10.0
    """Seconds that giving it back waits for a renewal under way."""

    def __init__(self, run: RunDirectory) -> None:
        run.lease = self
        self._file = run.path / "lease.json"
        self.token = uuid.uuid4().hex
        """By which its holder knows it."""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = False
        """Another process holds the run now."""
        self.renewed = time.monotonic()
        """When the lease was last renewed. A process that was stopped and goes on sees at once how long ago that is."""

    @property
    def expired(self) -> bool:
        """Not renewed for so long that another host may have taken the run over: nothing may be written until it is."""
        return time.monotonic() - self.renewed > self.EXPIRES

    def __enter__(self) -> "Lease":
        """Raises RunError where another holds the run, MachineError where the folder cannot be written."""
        try:
            self._take()
        except OSError as error:
            told = describe(error, "who writes there", self._file.parent)
            raise MachineError(f"{told}; {remedy(error)} and run the same command again") from error
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(self.PATIENCE)  # or it would put back what is removed here
        with contextlib.suppress(OSError):  # where it cannot be seen whose it is, it is left to expire
            self.look()
            if not self.lost:
                self._file.unlink(missing_ok=True)

    def _take(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        while not self._try():
            wait_until_free(self._file.parent, lambda line: print(line, flush=True))

    def _content(self) -> str:
        started_by = process.environment(process.LAUNCHER) or process.identity()
        holder = {"host": _host(), "process": process.identity(), "started_by": started_by}
        return json.dumps({**holder, "token": self.token, "renewed": time.time()})

    def _try(self) -> bool:
        aside = self._file.with_name(f".lease-{self.token}")
        try:
            aside.write_text(self._content(), encoding="utf-8")
            os.link(aside, self._file)  # fails where the file exists; the content is there from the first moment
            return True
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)

    def look(self) -> None:
        """Whether the run is still ours. Raises OSError where that cannot be seen."""
        try:
            found = read_json(self._file)
        except RunError as error:  # half a file: a disk that is full or away may mend
            raise OSError(errno.EIO, "the lease cannot be read", str(self._file)) from error
        self.lost = self.lost or (found or {}).get("token") != self.token

    def _renew(self) -> None:
        while not self._over.wait(self.RENEW):
            # a file server that is away for a moment costs nothing; for longer, another may take over
            with contextlib.suppress(OSError):
                self.look()
                if self.lost:
                    return
                replace_text(self._file, self._content())
                self.renewed = time.monotonic()


def holder(path: Path) -> str | None:
    """Who writes in a run directory now, in words; None where nobody does."""
    lease = read_json(path / "lease.json")
    if lease is None:
        return None
    if not {"host", "process", "renewed"} <= lease.keys():
        return None
    pid = _pid(lease)
    if lease["host"] == _host():
        return f"process {pid} on this machine" if process.is_alive(lease["process"]) else None
    age = time.time() - lease["renewed"]
    return f"process {pid} on {lease['host'].split('/')[0]}, {age:.0f} s ago" if age < Lease.EXPIRES else None


def _pid(lease: dict[str, Any]) -> str:
    """Of the command that a person started, which is not the worker that writes."""
    return str(lease.get("started_by", lease["process"])).partition(":")[0]


def _host() -> str:
    """This machine: its name, which another may have, too, its last start, and the process namespace, which containers do not share."""
    return f"{socket.gethostname()}/{process.boot()}/{os.readlink('/proc/self/ns/pid')}"


def check_free(path: Path) -> None:
    """Raise RunError, naming the holder, where another process writes in a run directory."""
    who = holder(path)
    if who is not None:
        raise RunError(f"{path}: in use by {who}; {FREE_IT}")


def check_writable(path: Path) -> None:
    """Raise RunError where a run directory cannot be made or written to, as far as can be seen without doing so."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    why = "is no folder" if not there.is_dir() else "" if os.access(there, os.W_OK | os.X_OK) else "cannot be written to"
    if why:
        raise RunError(f"run.dir: {path}: {there} {why}; set run.dir=... to a place that can be written to")


def wait_until_free(path: Path, say: Callable[[str], None]) -> None:
    """Raise RunError, naming the holder, where another process writes in a run directory; remove the lease of one that has ended.

    Whether one on another machine has ended only time can tell, on this machine's own clock, since two machines' clocks may differ: it
    is given EXPIRES seconds to renew its lease.
    """
    file = path / "lease.json"
    lease = read_json(file)
    if lease is None:
        return
    if lease.get("host") == _host():
        check_free(path)
    elif abs(time.time() - lease.get("renewed", 0.0)) < Lease.FAR:
        _watch_for_renewal(path, lease, say)
    remove_lease(file, lease.get("token"))


def _watch_for_renewal(path: Path, lease: dict[str, Any], say: Callable[[str], None]) -> None:
    who = f"process {_pid(lease)} on {lease['host'].split('/')[0]}"
    say(f"{path}: in use by {who}, or left so by one that is gone: waiting for its next sign, {Lease.EXPIRES:.0f} s at most")
    end = time.monotonic() + Lease.EXPIRES
    while (now := read_json(path / "lease.json")) is not None and time.monotonic() < end:
        if (now.get("token"), now.get("renewed")) != (lease.get("token"), lease.get("renewed")):
            raise RunError(f"{path}: in use by {who}; {FREE_IT}")
        time.sleep(0.5)


def remove_lease(file: Path, token: Any) -> None:
    """Remove a dead holder's lease, but not that of another who has taken over from it in the meantime."""
    grave = file.with_name(f".lease-old-{uuid.uuid4().hex}")
    try:
        file.rename(grave)
    except FileNotFoundError:
        return
    if (read_json(grave) or {}).get("token") != token:
        with contextlib.suppress(FileExistsError):
            os.link(grave, file)
    grave.unlink()


def move_aside(path: Path) -> Path | None:
    """Rename a run directory to the first free `<name>.old-N`; None where there is none."""
    if not path.exists():
        return None
    check_free(path)
    target = next(p for n in range(1, 10_000) if not (p := path.with_name(f"{path.name}.old-{n}")).exists())
    path.rename(target)
    return target
