"""`accelerate launch`: the line, the children, how they end.

One way to start workers for everything: training and evaluation, one process or many, GPU or not. The launcher is the
parent of the elastic agent, which is the parent of the workers; when it ends, all of them do.
"""

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

from mistral_dist.runtime import process

GRACE = 30.0
"""Seconds that workers have to end by themselves after their agent has gone."""


@dataclass(frozen=True)
class Line:
    """One `accelerate launch` line."""

    config: Path
    processes: int
    module: str
    words: tuple[str, ...]
    deepspeed: Path | None = None
    gpus: bool = False

    def arguments(self) -> list[str]:
        """What follows `accelerate`."""
        stage = [] if self.deepspeed is None else ["--deepspeed_config_file", str(self.deepspeed)]
        # port 0: any free one, so that two runs on one machine never meet
        return [
            "launch", "--config_file", str(self.config), "--num_processes", str(self.processes), *stage,
            "--main_process_port", "0", "-m", self.module, *self.words,
        ]  # fmt: skip

    def __str__(self) -> str:
        return shlex.join(["accelerate", *self.arguments()])


def visible_gpus() -> int:
    """The number of CUDA devices that this process may use."""
    import torch

    return torch.cuda.device_count()


def threads_per_process(processes: int) -> int:
    """CPU threads for each worker: the cores of this machine, shared out."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def run(line: Line, log: Path, tick: Callable[[], None]) -> int:
    """Run a line to its end, its output in `log`; return its exit code (0 or not, see Accelerate).

    `tick` is called several times a second. A stop signal goes on to the workers, once; they save and end by themselves.
    """
    environment = {**os.environ, process.LAUNCHER: process.identity()}
    if not line.gpus:
        environment.setdefault("OMP_NUM_THREADS", str(threads_per_process(line.processes)))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *line.arguments()]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output, process.StopRequest() as stop:
        output.write(f"\n$ {line}\n".encode())
        output.flush()
        # a session of its own: Ctrl-C reaches this process alone, which then asks the workers
        agent = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True,
            preexec_fn=process.ask_for_death_with_parent,
        )  # fmt: skip
        try:
            return _wait(agent, line, stop, tick)
        finally:
            _end(agent)


def _wait(agent: "subprocess.Popen[bytes]", line: Line, stop: process.StopRequest, tick: Callable[[], None]) -> int:
    asked = False
    while agent.poll() is None:
        if stop.signal is not None and not asked:
            asked = bool(_ask(agent, line.module))
        tick()
        time.sleep(0.1)
    tick()
    return agent.returncode


def _ask(agent: "subprocess.Popen[bytes]", module: str) -> list[psutil.Process]:
    """Send SIGTERM to the workers, not to their agent, which would kill them 30 seconds later."""
    workers = [child for child in _descendants(agent.pid) if module in " ".join(_command(child))]
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    return workers


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


def _command(child: psutil.Process) -> list[str]:
    try:
        return child.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return []
