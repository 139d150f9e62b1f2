"""By which interface the nodes of a run reach each other."""

import socket

import psutil
import pytest

from mistral_dist.runtime.nodes import ANYWHERE, PORT, Nodes, interface


def nodes(address: str, rank: int = 1) -> Nodes:
    return Nodes(2, rank, address, PORT)


def outside() -> tuple[str, str]:
    """(interface, address) by which this machine reaches others."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ANYWHERE, PORT))
        except OSError as error:
            pytest.skip(f"this machine has no network: {error}")
        own = probe.getsockname()[0]
    return next(name for name, found in psutil.net_if_addrs().items() if own in [one.address for one in found]), own


def test_it_is_the_one_that_leads_to_node_0() -> None:
    name, own = outside()
    assert interface(nodes("192.0.2.7")) == name
    assert interface(nodes(own, rank=0)) == name, "node 0 itself"


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", "no-such-host.invalid"])
def test_it_is_not_known_on_one_machine_or_without_an_address(address: str) -> None:
    assert interface(nodes(address, rank=0)) is None
    assert interface(nodes(address)) is None


def test_a_name_that_is_127_on_its_own_host_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's installer writes it into /etc/hosts: node 0 takes the default route, any other would be on the same machine."""
    name, _ = outside()
    found = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", PORT))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: found if host == "gpu1" else [(*found[0][:4], (host, PORT))])
    assert interface(nodes("gpu1", rank=0)) == name
    assert interface(nodes("gpu1")) is None
