"""How others reach a node is found out and said in words, whatever a validator or a router answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from smartnodes_core.errors import DeadlineError, PeerUnreachableError
from smartnodes_core.nodes.reachability import assess
from smartnodes_core.transport.mapping import PortMapping

VALIDATOR = b"v" * 32


class Plot:
    """A node at 192.168.1.2:9100, a validator that sees it at 203.0.113.7 and reaches `open_ports`, and a router."""

    def __init__(self, *open_ports, seen="203.0.113.7:51000", endpoint="192.168.1.2:9100"):
        self.open_ports, self.seen, self.endpoint = open_ports, seen, endpoint
        self.closed = 0
        self.node = SimpleNamespace(
            endpoint=endpoint,
            call=self.call,
            peers=lambda: [SimpleNamespace(node_key=VALIDATOR)],
            local_address_to=lambda node_key: ("192.168.1.2", 51000),
        )

    def call(self, node_key, method, params=None, timeout_s=0.0):
        if method == "observe":
            if self.seen is None:
                raise DeadlineError("no answer")
            return SimpleNamespace(params={"endpoint": self.seen})
        reached = params["port"] in self.open_ports
        return SimpleNamespace(params={"reached": reached, "why": "" if reached else "no answer in 2 s"})

    def gives(self, endpoint):
        def close():
            self.closed += 1

        return lambda port: PortMapping(endpoint, "NAT-PMP", lambda: None, close)

    def assess(self, mapper=None, **options):
        return assess(self.node, [VALIDATOR], mapper=mapper or refuses, **options)


def refuses(port):
    raise PeerUnreachableError("NAT-PMP: it does not answer; UPnP: no router answers")


def test_a_node_that_a_validator_reaches_is_reached_directly():
    found = Plot(9100).assess()
    assert (found.kind, found.endpoints) == ("direct", ("203.0.113.7:9100", "192.168.1.2:9100"))
    assert str(found) == "direct: a validator reached 203.0.113.7:9100"


def test_a_port_of_the_router_is_announced_when_it_helps():
    plot = Plot(40100)
    found = plot.assess(plot.gives("203.0.113.7:40100"))
    assert (found.kind, found.endpoints) == ("mapped", ("203.0.113.7:40100", "192.168.1.2:9100"))
    assert (
        "does not reach port 9100 there (no answer in 2 s); by NAT-PMP the router gave 203.0.113.7:40100" in found.why
    )
    found.close()
    found.close()
    assert plot.closed >= 1


@pytest.mark.parametrize(
    ("given", "why"), [("203.0.113.7:40100", "no answer in 2 s"), ("10.0.0.5:9200", "another router behind it")]
)
def test_a_port_that_does_not_help_is_given_back(given, why):
    plot = Plot(9200)
    found = plot.assess(plot.gives(given))
    assert (found.kind, found.endpoints, plot.closed) == ("introduced", ("192.168.1.2:9100",), 1)
    assert why in found.why


def test_without_a_port_peers_are_met_by_introduction_and_it_says_what_was_tried():
    found = Plot().assess()
    assert (found.kind, found.endpoints) == ("introduced", ("192.168.1.2:9100",))
    assert "the router gave no port: NAT-PMP: it does not answer; UPnP: no router answers" in found.why


def test_the_router_is_not_asked_against_the_settings():
    assert "was not asked" in Plot().assess(may_map=False).why


def test_a_node_that_listens_everywhere_announces_where_it_goes_out():
    assert Plot(endpoint="0.0.0.0:9100").assess().endpoints == ("192.168.1.2:9100",)


def test_a_node_on_loopback_is_not_asked_about():
    found = Plot(seen=None, endpoint="127.0.0.1:9100").assess()
    assert (found.kind, found.endpoints) == ("direct", ("127.0.0.1:9100",))


def test_a_validator_that_does_not_tell_is_said_and_the_first_of_a_network_has_none():
    plot = Plot(seen=None)
    assert "could not be asked: no answer" in plot.assess().why
    assert assess(plot.node, []).kind == "unknown"
