"""Why workers ended without a word: what the launcher and the kernel say about it, in one line."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"), Path("/proc/vmstat"))
"""Where the kernel counts the processes that it killed for memory: of this container (cgroup v2, v1), of the machine."""

SUBMIT = "in a SLURM job: submit it again"
LESS = "less memory: a smaller train.micro_batch_size or data.max_length, fewer processes, or nothing else on this machine"


def memory_kills() -> int:
    """Processes that the kernel has killed so far because memory was full, as far as this machine tells."""
    found = (re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE) for file in COUNTERS if file.is_file())
    return next((int(match[1]) for match in found if match is not None), 0)


def seen_from_here(log: str) -> str | None:
    """What the watch of this node's ranks said as it ended them, which need not be what another node has seen; None where it did not."""
    found = re.search(r"^watch: (.+)$", log, re.MULTILINE)
    return found and found[1]


def refused(log: str) -> str:
    """What workers said that found another process in their run directory; empty where they did not."""
    found = re.search(r"^error: (.+: in use by .+)$", log, re.MULTILINE)
    return found[1] if found else ""


def cause(log: str, kills: int = 0) -> str | None:
    """What ended the workers, from the log of their launch; None where nothing is recognised.

    `kills`: processes that the kernel killed for memory in the meantime.
    """
    return next((words for find in CAUSES if (words := find(log, kills))), None)


def _watched(log: str, _kills: int) -> str | None:
    return seen_from_here(log)


def _ended_by_signal(log: str, kills: int) -> str | None:
    """A worker that a signal ended, first of all: torchrun's summary, or Accelerate's own word on a single process."""
    alone = re.search(r"died with <Signals\.\w+: (\d+)>", log)
    summary = _first_signal(log)
    if summary is None and alone is None:
        return None
    who = f"rank {summary[0]} (process {summary[2]})" if summary is not None else "the worker"
    number = summary[1] if summary is not None else int(alone[1])  # type: ignore[index]
    if number != signal.SIGKILL:
        return f"{who} crashed ({signal.Signals(number).name}, signal {number})"
    if kills:
        return f"{who} was killed (signal 9) by the kernel, because memory was full; it needs {LESS}"
    return f"{who} was killed (signal 9); where nobody did that, memory was full: it needs {LESS}"


def _first_signal(log: str) -> tuple[int, int, int] | None:
    """(rank, signal, process) of the worker that a signal ended first, from torchrun's summary.

    The summary names one root cause; of two that ended within a second, that may be the other one, which lost its neighbour.
    Later ones were ended by torchrun itself.
    """
    entry = r"time\s+: \S+_(\d+):(\d+):(\d+)\s+host\s+: \S+\s+rank\s+: (\d+) .*?exitcode\s+: (-?\d+)\s+\(pid: (\d+)\)"
    before, _, root = log.rpartition("Root Cause")
    found = [tuple(map(int, match)) for part in (root, before) for match in re.findall(entry, part, re.DOTALL)]
    seconds = [hours * 3600 + minutes * 60 + rest for hours, minutes, rest, *_ in found]
    ended = [
        (rank, -code, pid)
        for (*_, rank, code, pid), when in zip(found, seconds, strict=True)
        if code < 0 and -code != signal.SIGTERM and abs(when - seconds[0]) <= 1
    ]
    return ended[0] if root and ended else None


def _port_in_use(log: str, _kills: int) -> str | None:
    found = re.search(r"port:? `?(\d+)`?[^\n]*(?:already in use|EADDRINUSE|another process is utilizing)", log, re.IGNORECASE)
    told = f"is in use on this machine; name another one on all nodes: --main-address HOST:PORT ({SUBMIT})"
    return found and f"port {found[1]} {told}"


def _machine_missing(log: str, _kills: int) -> str | None:
    found = re.search(r"Timed out after (\d+) seconds waiting for clients\. (\d+)/(\d+) clients joined", log)
    if found is None:
        return None
    came = f"only {found[2]} of {found[3]} nodes came within {found[1]} s"
    return f"{came}; start the same command on all of them, with the same --nodes, each with its own --node-rank ({SUBMIT})"


def _not_begun(log: str, _kills: int) -> str | None:
    found = re.search(r"wait timeout after (\d+)ms, keys: \S*assigned_ranks", log)
    return found and f"node 0 has not begun for {int(found[1]) // 1000} s: it waits for another node, or does not answer any more"


def _nobody_there(log: str, _kills: int) -> str | None:
    found = re.search(r"client socket has timed out after (\d+)ms while trying to connect to \(([^,]+), (\d+)\)", log)
    if found is None:
        return None
    where, seconds = f"{found[2]}, port {found[3]}", int(found[1]) // 1000
    asked = "is node 0 up, was it started with the same --main-address, and does no firewall stand between?"
    return f"nobody answers at {where}, for {seconds} s; {asked}"


def _no_memory(log: str, _kills: int) -> str | None:
    found = re.search(r"^(MemoryError\b.*|.*Cannot allocate memory.*)$", log, re.MULTILINE)
    return found and f"memory was refused to a worker ({found[1].strip()[:80]}); it needs {LESS}"


CAUSES: tuple[Callable[[str, int], str | None], ...] = (
    _no_memory,
    _watched,
    _ended_by_signal,
    _machine_missing,
    _not_begun,
    _nobody_there,
    _port_in_use,
)
"""In the order of what says more."""
