"""This process: environment variables, stop signals, and death with its launcher."""

import ctypes
import functools
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""In the order in which they get their handlers: who catches the last one catches all."""
LAUNCHER = "MISTRAL_DIST_LAUNCHER"
"""The `identity` of the `mistral-dist` process that started a worker."""

STARTED = "MISTRAL_DIST_STARTED"
"""When the `mistral-dist` process that started a worker was asked to, on this machine's monotonic clock, in seconds."""

BOOT = Path("/proc/sys/kernel/random/boot_id")

_PR_SET_PDEATHSIG = 1
# loaded here: between fork and exec, where it is needed, no library may be
_LIBC = ctypes.CDLL(None, use_errno=True)


def environment(name: str, default: str = "") -> str:
    """An environment variable; no other room reads them."""
    return os.environ.get(name, default)


def default_environment(**values: str) -> None:
    """Set variables that the user has not set; libraries read them when they are imported."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def become(words: Sequence[str], variables: Mapping[str, str], **defaults: str) -> NoReturn:
    """Put another program in this process's place, with signals and terminal; `defaults` hold where the environment says nothing."""
    sys.stdout.flush()
    os.execve(words[0], list(words), {**defaults, **os.environ, **variables})


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA driver (Linux or WSL2), seen without importing torch."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def quiet_libraries() -> None:
    """Settings that the libraries take from the environment when they are imported."""
    default_environment(TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1", TRANSFORMERS_VERBOSITY="error")
    # it asks for a package that only its evaluation on some CPUs would use
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    default_environment(HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    default_environment(DS_LOG_LEVEL="error", BITSANDBYTES_NOWELCOME="1")
    # a server that is away holds a step up for a minute, not for the ten of its defaults, which the other ranks would not wait for
    default_environment(MLFLOW_HTTP_REQUEST_TIMEOUT="20", MLFLOW_HTTP_REQUEST_MAX_RETRIES="2")
    if not has_gpu():
        # DeepSpeed guesses its accelerator, with a warning, unless told
        default_environment(DS_ACCELERATOR="cpu")


def identity() -> str:
    """This process as `pid:start:boot`, which no later process shares, with the same pid or after a restart."""
    return _identity(os.getpid()) or ""


def is_alive(identity: str) -> bool:
    """Whether the process of an `identity` of this host still runs."""
    pid = identity.partition(":")[0]
    return pid.isdigit() and _identity(int(pid)) == identity


def _identity(pid: int) -> str | None:
    """From /proc, since a start time in seconds would move when the clock is set. None for a process that has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    started = rest[18]  # field 22 of proc(5): clock ticks from boot to start
    return None if state in "ZX" else f"{pid}:{started}:{boot()}"


def boot() -> str:
    """Which start of this machine it is: 8 hex digits."""
    return BOOT.read_text().strip()[:8]


def launched() -> float:
    """When this launch began, on the monotonic clock: told by the launcher, else when this process started."""
    told = environment(STARTED)
    now = time.monotonic()
    # a value of another machine, or of before its last start, says nothing here
    if environment(LAUNCHER) and told and float(told) <= now:
        return float(told)
    started = int(identity().split(":")[1]) / os.sysconf("SC_CLK_TCK")
    return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def ask_for_death_with_parent() -> None:
    """Have the kernel SIGKILL this process when the thread that started it ends (Linux, prctl(2))."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def become_agent() -> None:
    """For the process between a launcher and its workers: end with the launcher, and leave signals to it and to them.

    A scheduler signals every process of a job. torchrun would kill its workers 30 seconds after it got one; Accelerate, with one
    process, at once. SIGHUP is left alone: workers that inherit that it is ignored take it for nohup.
    """
    ask_for_death_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def leave_when_asked(code: int) -> None:
    """From here on SIGTERM and SIGUSR1 end this process at once with a code: for as long as there is nothing to save."""

    def leave(*_: object) -> None:
        raise SystemExit(code)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, leave)


def serve_parent() -> None:
    """For a helper process: end with the parent, and leave Ctrl-C to it."""
    ask_for_death_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_libraries()


@functools.cache  # once is enough
def die_with_launcher() -> None:
    """End this worker when its launcher ends, however that ends; `kill -9` included. To be called before torch is imported.

    The kernel's signal covers the direct parent (the elastic agent), from here on; a watch covers the `mistral-dist` process above
    the agent, at any time. A parent that ended before this call, under a bare launcher, is not known: there must be no seconds before.
    """
    parent, launcher = os.getppid(), environment(LAUNCHER)
    ask_for_death_with_parent()

    def watch() -> None:
        while os.getppid() == parent and (not launcher or is_alive(launcher)):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-launcher", daemon=True).start()


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, from proc(5); one that is still importing has not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


class StopRequest:
    """Remembers that a stop signal came. Handlers are in place while the context is open; to enter it again changes nothing."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS if not self._before else ():
            # under nohup the end of the terminal is to be ignored
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, StopRequest):
                outer.signal = outer.signal or self.signal
        self._before.clear()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)


def give_way() -> None:
    """Let the calling thread run only where a core has nothing else to do (Linux: SCHED_IDLE, which is a thread's own).

    A lower priority is not enough: a thread that wakes may have to wait until the slice of the other one is over, at each of the many
    places where the threads of a step wait for each other (a step 1.27 times as long on 2 cores, and 1.03 to 1.11 times as long so).
    One of SCHED_IDLE is put aside at once. Its weight is 3 to another's 1,024; who waits for a lock of its own leaves a core, which it
    may have unless another process takes that, too.
    """
    thread = threading.get_native_id()
    try:
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # where that is forbidden, a low priority at least
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + 15))


def peak_resident_bytes() -> int:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
