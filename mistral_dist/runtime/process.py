"""This process: environment variables, stop signals, and death with its launcher."""

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from types import FrameType

import psutil

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER = "MISTRAL_DIST_LAUNCHER"
"""pid and start time of the `mistral-dist` process that started a worker, as `pid:seconds`."""

_PR_SET_PDEATHSIG = 1


def environment(name: str, default: str = "") -> str:
    """An environment variable; no other room reads them."""
    return os.environ.get(name, default)


def default_environment(**values: str) -> None:
    """Set variables that the user has not set; libraries read them when they are imported."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def quiet_libraries(has_gpu: bool) -> None:
    """Settings that the libraries below take from the environment, before they are imported."""
    default_environment(TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1", TRANSFORMERS_VERBOSITY="error")
    default_environment(HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    default_environment(DS_LOG_LEVEL="error", BITSANDBYTES_NOWELCOME="1")
    if not has_gpu:
        # DeepSpeed guesses its accelerator, with a warning, unless told
        default_environment(DS_ACCELERATOR="cpu")


def identity() -> str:
    """This process as `pid:start time`, which a later process with the same pid does not share."""
    return f"{os.getpid()}:{psutil.Process().create_time():.2f}"


def is_alive(identity: str) -> bool:
    """Whether the process of an `identity` of this host still runs."""
    pid, _, started = identity.partition(":")
    try:
        process = psutil.Process(int(pid))
        return f"{process.create_time():.2f}" == started and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
        return False


def ask_for_death_with_parent() -> None:
    """Have the kernel SIGKILL this process when the thread that started it ends (Linux, prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def die_with_launcher() -> None:
    """End this worker when its launcher ends, however that ends; `kill -9` included.

    The kernel's signal covers the direct parent (the elastic agent). A watch covers the moment before it was asked for
    and the `mistral-dist` process above the agent.
    """
    parent, launcher = os.getppid(), environment(LAUNCHER)
    ask_for_death_with_parent()

    def watch() -> None:
        while os.getppid() == parent and (not launcher or is_alive(launcher)):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-launcher", daemon=True).start()


class StopRequest:
    """Remembers that a stop signal came. Handlers are in place while the context is open."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)


def peak_resident_bytes() -> int:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
