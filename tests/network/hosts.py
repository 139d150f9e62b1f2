"""Two hosts on this machine: each with a network stack, a host name and a hosts file of its own, and one cable between them.

Linux network namespaces joined by a veth pair, from iproute2. Files and processes are shared, as if on a file server.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERFACE = "eth0"
NOBODY = "02:00:00:00:00:99"
"""A hardware address that no interface here has."""
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && mount --bind /dev/null /etc/resolv.conf && shift 2 && exec "$@"'
"""In a mount namespace of its own, which `ip netns exec` makes. There is no name server that could be asked, and waited for."""


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    address: str
    namespace: str
    hosts: Path
    """Its /etc/hosts."""

    def words(self, *command: str | Path) -> list[str]:
        """A command, to be run there: the process that is started is the command itself."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", ENTER, "sh", self.name, str(self.hosts)]
        return [*enter, *map(str, command)]

    def ip(self, *words: str) -> None:
        """Run `ip` there."""
        _call("ip", "-n", self.namespace, *words)

    def route(self) -> None:
        """Everything goes through the cable."""
        self.ip("route", "replace", "default", "dev", INTERFACE)


class Cable:
    """What joins two hosts, and can be cut."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = hosts

    def lose(self, *senders: Host) -> None:
        """What these send is lost, and nobody is told: all interfaces stay up."""
        for host in senders:
            for other in self.hosts:
                if other is not host:
                    host.ip("neigh", "replace", other.address, "lladdr", NOBODY, "dev", INTERFACE, "nud", "permanent")

    def unplug(self, host: Host) -> None:
        """Its interface is down, and the other's has nobody to talk to."""
        host.ip("link", "set", INTERFACE, "down")

    def mend(self) -> None:
        """As at the beginning."""
        for host in self.hosts:
            host.ip("link", "set", INTERFACE, "up")
            host.ip("neigh", "flush", "dev", INTERFACE, "nud", "permanent")
            host.route()


def missing() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    lacking = [program for program in ("ip", "unshare") if shutil.which(program) is None]
    if lacking:
        return f"{', '.join(lacking)}: not installed (apt-get install iproute2 util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = _namespace("probe")
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"no network namespace can be made here: {done.stderr.strip()}"
    try:
        pair = ["ip", "-n", probe, "link", "add", "one", "type", "veth", "peer", "name", "other"]
        done = subprocess.run(pair, capture_output=True, text=True, check=False)
    finally:
        _call("ip", "netns", "del", probe)
    return f"no veth pair can be made here: {done.stderr.strip()}" if done.returncode else None


@contextmanager
def connected(folder: Path, as_debian: bool = False) -> Iterator[Cable]:
    """Two hosts, hosta and hostb, for as long as the context is open.

    `as_debian`: each knows its own name as 127.0.1.1, as Debian and Ubuntu write it into /etc/hosts; else by its address.
    """
    addresses = {"hosta": "10.77.0.1", "hostb": "10.77.0.2"}
    made = []
    _clear()
    try:
        for name, address in addresses.items():
            names = {**addresses, **({name: "127.0.1.1"} if as_debian else {})}
            file = folder / f"hosts-{name}"
            file.write_text("".join(f"{where} {what}\n" for what, where in {"localhost": "127.0.0.1", **names}.items()))
            host = Host(name, address, _namespace(name), file)
            _call("ip", "netns", "add", host.namespace)
            made.append(host)
        first, second = (host.namespace for host in made)
        _call("ip", "link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for host in made:
            host.ip("link", "set", "lo", "up")
            host.ip("address", "add", f"{host.address}/24", "dev", INTERFACE)
        cable = Cable(made)
        cable.mend()
        yield cable
    finally:
        for host in made:
            _call("ip", "netns", "del", host.namespace)


def _namespace(name: str) -> str:
    return f"mistral-dist-{os.getpid()}-{name}"


def _clear() -> None:
    """Remove what a test has left that was killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for name, pid in re.findall(r"^(mistral-dist-(\d+)-\w+)", listed, re.MULTILINE):
        if not psutil.pid_exists(int(pid)):
            _call("ip", "netns", "del", name)


def _call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr)
