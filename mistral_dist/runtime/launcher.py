"""`accelerate launch`: the line, the children, how they end.

One way to start workers for everything: training and evaluation, one process or many, GPU or not. The launcher is the
parent of the elastic agent, which is the parent of the workers; when it ends, all of them do.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from mistral_dist.errors import STOPPED, MachineError, RecipeError
from mistral_dist.runtime import process
from mistral_dist.runtime.nodes import Nodes, interface

GRACE = 30.0
"""Seconds that workers have to end by themselves after their agent has gone."""


@dataclass(frozen=True)
class Line:
    """One `accelerate launch` line."""

    config: Path
    module: str
    words: tuple[str, ...]
    processes: int | None = None
    """On all nodes together; None leaves it to `config`."""
    deepspeed: Path | None = None
    nodes: Nodes | None = None
    """None for this machine alone."""
    port: int | None = 0
    """Where the workers meet. 0: any free one, so that two runs on one machine never meet; None leaves it to `config`."""
    join_seconds: int | None = None
    """How long machines wait for each other at the start; None: as long as torchrun does by itself, 10 minutes."""
    gpus: bool = False
    saves: bool = True
    """Whether the workers answer a stop signal by saving and ending; else they are simply ended."""

    def arguments(self) -> list[str]:
        """What follows `accelerate launch`."""
        count = [] if self.processes is None else ["--num_processes", str(self.processes)]
        stage = [] if self.deepspeed is None else ["--deepspeed_config_file", str(self.deepspeed)]
        nodes, port = [], []
        if self.nodes is not None:
            nodes = ["--num_machines", self.nodes.count, "--machine_rank", self.nodes.rank, "--main_process_ip", self.nodes.address]
        if self.port is not None:
            port = ["--main_process_port", self.port]
        join = [] if self.join_seconds is None else ["--rdzv_conf", f"timeout={self.join_seconds}"]
        return ["--config_file", str(self.config), *map(str, [*count, *stage, *nodes, *port, *join]), "-m", self.module, *self.words]

    def __str__(self) -> str:
        return shlex.join(["accelerate", "launch", *self.arguments()])


OLD_DRIVER = "the NVIDIA driver is older than its CUDA; update the driver, or install a torch for that driver (nvidia-smi names its CUDA)"


def visible_gpus() -> int:
    """The number of CUDA devices that this process may use. Raises MachineError for a driver that is too old for this torch."""
    if not process.has_gpu():
        return 0
    import torch

    count = torch.cuda.device_count()
    if count and not torch.cuda.is_available():  # NVML counts the cards, CUDA cannot use them
        raise MachineError(f"{count} GPUs are here, and torch {torch.__version__} cannot use them: {OLD_DRIVER}")
    return count


def join_seconds() -> int | None:
    """How long machines wait for each other at the start, where the environment says so (MISTRAL_DIST_JOIN_SECONDS).

    Raises RecipeError for what is no number.
    """
    told = process.environment("MISTRAL_DIST_JOIN_SECONDS")
    if told and not told.isdigit():
        raise RecipeError(f"MISTRAL_DIST_JOIN_SECONDS={told}: a whole number of seconds is wanted")
    return int(told) if told else None


def threads_per_process(processes: int) -> int:
    """CPU threads for each worker: the cores of this machine, shared out."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def run(line: Line, log: Path, tick: Callable[[], None], say: Callable[[str], None], started: float | None = None) -> int:
    """Run a line to its end, its output in `log`; return its exit code (0 or not, see Accelerate), STOPPED where a stop came before
    there were workers, or they are of those that are simply ended.

    `started`: when the user asked for it, on the monotonic clock; train.max_seconds counts from there. `tick` is called several
    times a second. A stop signal goes on to the workers, once, and `say` is told; they save and end by themselves.
    """
    environment = _environment(line, started or time.monotonic())
    # `accelerate launch`, without what the other commands of `accelerate` import: 1 of 2.5 s of CPU time
    command = [sys.executable, "-m", "accelerate.commands.launch", *line.arguments()]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output, process.StopRequest() as stop:
        output.write(f"\n$ {line}\n".encode())
        output.flush()
        # a session of its own: Ctrl-C reaches this process alone, which then asks the workers
        agent = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True,
            preexec_fn=process.become_agent,
        )  # fmt: skip
        try:
            return _wait(agent, line, stop, tick, say)
        finally:
            _end(agent)


def _environment(line: Line, started: float) -> dict[str, str]:
    """For the agent and its workers."""
    environment = {**os.environ, process.LAUNCHER: process.identity(), process.STARTED: str(started)}
    environment["PET_SIGNALS_TO_HANDLE"] = "SIGHUP"  # torchrun would put its own handlers where the agent ignores a signal
    if not line.gpus:
        here = (line.processes or 1) // (line.nodes.count if line.nodes else 1)
        environment.setdefault("OMP_NUM_THREADS", str(threads_per_process(here)))
    reaching = interface(line.nodes) if line.nodes else None
    if reaching is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", reaching)
    return environment


def _wait(
    agent: "subprocess.Popen[bytes]", line: Line, stop: process.StopRequest, tick: Callable[[], None], say: Callable[[str], None]
) -> int:
    asked: set[int] = set()
    told = has_begun = False
    while agent.poll() is None:
        has_begun = has_begun or any(_is_worker(child, line) for child in _descendants(agent.pid))
        if stop.signal is not None:
            if not line.saves or not has_begun:  # without workers the agent waits for other nodes, which may take minutes
                return STOPPED
            if not told:
                told = True
                say(f"{stop.signal.name}: stopping; the workers leave the step, or end the stage of loading, that they are in, and save")
            _ask(agent, stop.signal, asked)
        with contextlib.suppress(OSError):  # a file server that is away for a moment must not end a healthy run
            tick()
        time.sleep(0.1)
    with contextlib.suppress(OSError):
        tick()
    return agent.returncode


def _is_worker(child: psutil.Process, line: Line) -> bool:
    """Whether a process below the agent is no helper of it."""
    with contextlib.suppress(psutil.Error):
        return line.module in child.cmdline()
    return False


def _ask(agent: "subprocess.Popen[bytes]", number: signal.Signals, asked: set[int]) -> None:
    """Pass a signal on, once to each worker that can take it, not to their agent, which would kill them 30 seconds later."""
    for child in _descendants(agent.pid):
        if child.pid not in asked and process.catches(child.pid, process.STOP_SIGNALS[-1]):
            asked.add(child.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)


def _end(agent: "subprocess.Popen[bytes]") -> None:
    """Leave nothing behind, however this ends."""
    rest = _descendants(agent.pid)
    if agent.poll() is None:
        agent.kill()
        agent.wait()
    _, alive = psutil.wait_procs(rest, timeout=GRACE)
    for child in alive:
        child.kill()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
