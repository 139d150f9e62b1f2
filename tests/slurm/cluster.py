"""A real SLURM of two nodes on this machine: slurmctld, two slurmd and munged from Debian's `slurm-wlm` and `munge`.

Everything is in one folder and ends with the context. Both nodes are this host under two names, told apart by their ports.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")
"""States of a job that do not change any more. Not NODE_FAIL and PREEMPTED, from which it may be requeued."""
UP = 30.0
"""Seconds that the daemons have to come up."""

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=1
SlurmdTimeout=20
KillWait=30
MinJobAge=3600
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
"""


@dataclass(frozen=True)
class Cluster:
    """A SLURM that is up."""

    folder: Path
    environment: Mapping[str, str]

    def call(self, *words: str | Path, cwd: Path | None = None, **more: str) -> str:
        """What a SLURM command answers."""
        done = subprocess.run(
            list(map(str, words)), env={**self.environment, **more}, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (words, done.stdout + done.stderr)
        return done.stdout.strip()

    def submit(self, *words: str | Path, cwd: Path | None = None, **more: str) -> str:
        """The id of a submitted job."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, **more)

    def job(self, id: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", id)))

    def wait_for(self, id: str, *states: str, seconds: float = 300.0) -> dict[str, str]:
        """The job once it is in one of the states. Fails where it ends in another."""

        def found() -> dict[str, str] | None:
            job = self.job(id)
            assert job["JobState"] in states or job["JobState"] not in ENDED, job
            return job if job["JobState"] in states else None

        return waited(found, seconds, lambda: str(self.job(id)))


def waited(condition: Callable[[], T | None], seconds: float, told: Callable[[], str] = str) -> T:
    """What a condition gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain: {told()}"
        time.sleep(0.2)
    return found


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    if lacking:
        return f"{', '.join(lacking)}: not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "the daemons of SLURM need root"


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Start the daemons, wait until both nodes are idle, and end them at the end."""
    ports = free_ports(1 + len(NODES))
    (folder / "state").mkdir(parents=True)
    host = socket.gethostname()
    lines = [CONFIGURATION.format(host=host, folder=folder, controller_port=ports[0])]
    lines += [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    # what is preempted gets SIGTERM, and a minute to save
    lines += [f"PartitionName=low Nodes={','.join(NODES)} Default=YES PriorityTier=1 GraceTime=60"]
    lines += [f"PartitionName=paid Nodes={','.join(NODES)} AllowAccounts=team"]
    lines += [f"PartitionName=high Nodes={','.join(NODES)} PriorityTier=10 PreemptMode=OFF"]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    folder.chmod(0o755)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    cluster = Cluster(folder, environment)
    files = [f"--{kind}={folder}/munge.{kind}" for kind in ("socket", "pid-file", "log-file", "seed-file")]
    with ExitStack() as daemons:
        daemons.enter_context(daemon(cluster, "munged", "--foreground", "--force", f"--key-file={key}", "--num-threads=2", *files))
        waited(lambda: (folder / "munge.socket").exists(), UP)
        daemons.enter_context(daemon(cluster, "slurmctld", "-D", "-c"))
        for node in NODES:
            daemons.enter_context(daemon(cluster, "slurmd", "-D", "-N", node))
        waited(lambda: cluster_is_idle(cluster), UP, lambda: "".join(file.read_text()[-2000:] for file in folder.glob("*.log")))
        yield cluster


def cluster_is_idle(cluster: Cluster) -> bool:
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-p", "low", "-o", "%T"], env=dict(cluster.environment), capture_output=True, text=True, check=False
    )
    return done.stdout.split() == ["idle"] * len(NODES)


@contextmanager
def daemon(cluster: Cluster, *words: str) -> Iterator[None]:
    with open(cluster.folder / f"{words[0]}{words[-1] if words[-1] in NODES else ''}.out", "wb") as output:
        process = subprocess.Popen(words, env=dict(cluster.environment), stdout=output, stderr=output, start_new_session=True)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    with ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
