"""SLURM, as a process inside a job sees it: its task, its nodes, its job's state.

What is true of a task is read in the task: the batch script's own variables would say node 0 everywhere.
"""

import re
import shutil
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass

from mistral_dist.runtime.process import environment

ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "PREEMPTED")
"""States of a job that may still go on, or again."""
FIRST_PORT, PORTS = 10_000, 20_000
"""Below what Linux gives to outgoing connections (from 32,768)."""


@dataclass(frozen=True)
class Task:
    """A task that srun started."""

    job: str
    nodes: int
    """Of its step."""
    tasks: int
    """Of its step."""
    node: int
    """Which of the step's nodes it is on, from 0."""
    names: str
    """The step's nodes, in SLURM's own notation: n[1-2,7]."""
    submitter: str
    """The address of the machine on which srun runs: in a batch job the first node."""


def task() -> Task | None:
    """The task that this process belongs to; None outside of srun."""
    if not environment("SLURM_STEP_NODELIST"):
        return None
    return Task(
        job=environment("SLURM_JOB_ID"),
        nodes=int(environment("SLURM_STEP_NUM_NODES", "1")),
        tasks=int(environment("SLURM_STEP_NUM_TASKS", "1")),
        node=int(environment("SLURM_NODEID", "0")),
        names=environment("SLURM_STEP_NODELIST"),
        submitter=environment("SLURM_LAUNCH_NODE_IPADDR"),
    )


def job() -> str | None:
    """The id of the job that this process runs in; None outside of SLURM."""
    return environment("SLURM_JOB_ID") or None


def nodes_of_job() -> int:
    """How many nodes the job has that this process runs in; 0 outside of SLURM."""
    return int(environment("SLURM_JOB_NUM_NODES", "0"))


def port(task: Task) -> int:
    """Where the nodes of a job meet: another one for each job that may share a node."""
    return FIRST_PORT + int(task.job) % PORTS


def first_node(task: Task) -> str:
    """The host of node 0: by its name; where that cannot be resolved, the address from which srun started."""
    name = first_name(task.names)
    with suppress(OSError):
        socket.getaddrinfo(name, None)
        return name
    return task.submitter or name


def first_name(names: str) -> str:
    """The first of SLURM's `gpu[007-011,020],login1`: gpu007."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", names)
    return "".join(part or "" for part in found.groups()) if found else names


def state(job: str) -> str | None:
    """How the scheduler says that a job stands, in words: `RUNNING on n[1-2]`.

    Empty where it knows no such job, or there is none to ask; None where it does not answer.
    """
    if shutil.which("squeue") is None:
        return ""
    words = ["squeue", "--noheader", "--states=all", "--jobs", job, "--Format=State:|,NodeList:|,Reason:|"]
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
        what, where, why, *_ = [*done.stdout.strip().split("|"), "", "", ""]
        if what:
            return f"{what}{f' on {where}' if where else ''}{f' ({why})' if why not in ('', 'None') else ''}"
        if done.returncode == 0 or "Invalid job id" in done.stderr:
            return ""
    return None
