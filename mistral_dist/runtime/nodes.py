"""The machines of one run, its nodes: how many, which one this is, and where they meet.

One `mistral-dist train` on each starts that node's workers; all name the same count, address and port. Inside a SLURM step
nothing need be named.
"""

import contextlib
import ipaddress
import socket
from dataclasses import dataclass

import psutil

from mistral_dist.errors import RecipeError
from mistral_dist.runtime import slurm

PORT = 29500
"""Where the nodes meet unless told otherwise; torchrun's own."""
ANYWHERE = "192.0.2.1"
"""An address that is kept for documentation (RFC 5737): whatever is meant for it takes the default route."""


@dataclass(frozen=True)
class Nodes:
    """Several machines that train one run."""

    count: int
    rank: int
    """Of this one, from 0; node 0 has rank 0 of the workers, which writes."""
    address: str
    """Of node 0."""
    port: int

    @property
    def is_first(self) -> bool:
        """Whether this is node 0: it says how the run goes, the others what concerns them."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"node {self.rank} of {self.count}, which meet at {self.address}, port {self.port}"


def nodes_of(count: int | None, rank: int | None, main: str | None) -> Nodes | None:
    """The nodes that the user names, else those of the SLURM step that this process is a task of; None for one machine alone.

    `main` is HOST or HOST:PORT, of node 0. Raises RecipeError where something is missing or cannot be.
    """
    task = slurm.task()
    _refuse_in_slurm(task, count, rank)
    if task is not None and task.nodes > 1 and count != 1:
        return Nodes(task.nodes, task.node, *_host_and_port(main or slurm.first_node(task), slurm.port(task)))
    if count is None and (rank is not None or main):
        raise RecipeError("--node-rank and --main-address go with --nodes, the number of machines; without it there is one")
    if count is None or (count == 1 and not rank):
        return None
    if rank is None:
        raise RecipeError(f"--nodes {count}: which of them is this machine? Add --node-rank 0 on the first, up to {count - 1} on the last")
    if rank >= count:
        raise RecipeError(f"--node-rank {rank}: of {count} nodes the last is {count - 1}; they count from 0")
    if not main:
        raise RecipeError(f"--nodes {count}: where do they meet? Add --main-address HOST[:PORT], the address of node 0, the same on all")
    return Nodes(count, rank, *_host_and_port(main, PORT))


def _refuse_in_slurm(task: slurm.Task | None, count: int | None, rank: int | None) -> None:
    """Raise RecipeError for what does not fit the SLURM job or step that this process is in, if any."""
    if task is None:
        if count is None and slurm.nodes_of_job() > 1:
            raise RecipeError(
                f"SLURM job {slurm.job()} has {slurm.nodes_of_job()} nodes, and this process would train on one alone: start it on"
                " each, with `srun --ntasks-per-node=1 mistral-dist train ...`; or say --nodes 1"
            )
    elif task.tasks != task.nodes:
        raise RecipeError(
            f"SLURM started {task.tasks} tasks on {task.nodes} node{'s'[: task.nodes > 1]}; each node needs one, which starts all its"
            " workers: srun --ntasks-per-node=1"
        )
    elif count not in (None, 1, task.nodes) or rank not in (None, task.node):
        raise RecipeError(
            f"--nodes, --node-rank: this is node {task.node} of the {task.nodes} of a SLURM step, which need not be named; leave both out,"
            " and say to sbatch how many there are: sbatch --nodes=2 slurm/train.sh RECIPE"
        )


def interface(nodes: Nodes) -> str | None:
    """The network interface of this node by which the nodes reach each other; None where that is not known, or is this machine alone.

    gloo would take the one that this host's own name stands for, which is 127.0.1.1 where Debian's or Ubuntu's installer has written
    /etc/hosts: nobody else could reach it there.
    """
    own = _source(nodes.address)
    if own is not None and own.is_loopback and nodes.is_first and _is_name(nodes.address):
        own = _source(ANYWHERE)  # the address is this node's own name, which says nothing here
    if own is None or own.is_loopback:
        return None
    having = {name: [address.address.partition("%")[0] for address in found] for name, found in psutil.net_if_addrs().items()}
    return next((name for name, addresses in having.items() if str(own) in addresses), None)


def _source(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address from which this machine would send to a host. Nothing is sent."""
    with contextlib.suppress(OSError):
        family, kind, _, _, where = socket.getaddrinfo(host, PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    return None


def _is_name(host: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return False
    return host != "localhost"


def _host_and_port(main: str, port_if_none: int) -> tuple[str, int]:
    """`HOST`, `HOST:PORT`, or an IPv6 address, with a port in brackets: `[ADDRESS]:PORT`."""
    host, colon, port = main.rpartition(":") if main.count(":") == 1 or "]:" in main else (main, "", "")
    if colon and not (port.isdigit() and 0 < int(port) < 65536):
        raise RecipeError(f"--main-address {main}: {port or 'nothing'} is no port; HOST[:PORT] is wanted")
    return host.strip("[]"), int(port) if port else port_if_none
