"""Peers are introduced by whom both are connected to: within quotas, and with all the checks of a dial."""

from __future__ import annotations

import threading

import pytest

from smartnodes_core.errors import AuthorityError, BusyError, PeerUnreachableError, ProtocolError
from smartnodes_core.identity import Identity
from smartnodes_core.nodes import introducing, meeting
from smartnodes_core.nodes.authority import OpenAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.introducing import IntroductionDesk
from smartnodes_core.nodes.meeting import MeetingDesk
from smartnodes_core.transport.base import Peer
from smartnodes_core.transport.relay import Relay
from smartnodes_core.transport.tls import TlsTransport


class Echo:
    def rpc_echo(self, caller, params, body):
        return {"from": caller.node_key}, [bytes(body)]


class Choosy(OpenAuthority):
    def __init__(self, refused):
        self.refused = refused

    def admit(self, peer: Peer) -> None:
        if peer.node_key in self.refused:
            raise AuthorityError("not this one")


class Town:
    """A public node that relays, and others that only dial, hence cannot be dialled."""

    def __init__(self, monkeypatch, num=2, relays=True):
        monkeypatch.setattr(meeting, "MEET_S", 0.2)  # on loopback nobody meets: the first SYN is answered
        self.refused = set()
        self.relay = Relay("127.0.0.1:0") if relays else None
        if self.relay:
            self.relay.start()
        self.public, self.meetings = self.node(1, "127.0.0.1:0", self.relay)
        self.introductions = self.desk
        self.others = [self.node(number, None) for number in range(2, 2 + num)]
        for node, _ in self.others:
            node.connect(self.public.endpoint)

    def node(self, number, endpoint, relay=None):
        identity = Identity.from_seed(bytes([number] * 32))
        node = Node(identity, None, TlsTransport(identity, None), Choosy(self.refused), endpoint)
        self.desk = IntroductionDesk(node, relay)
        meetings = MeetingDesk(node)
        node.serve(Echo())
        node.start()
        return node, meetings

    def stop(self):
        for node, _ in [*self.others, (self.public, None)]:
            node.stop()
        if self.relay:
            self.relay.stop()


@pytest.fixture
def make_town(monkeypatch):
    made = []

    def make(**options):
        made.append(Town(monkeypatch, **options))
        return made[-1]

    yield make
    for town in made:
        town.stop()


def test_two_that_cannot_be_dialled_call_each_other_through_the_relay(make_town):
    town = make_town()
    (one, one_desk), (other, other_desk) = town.others
    reply = one.call(other.node_key, "echo", {}, [b"hello"])
    assert (bytes(reply.body), reply.params["from"]) == (b"hello", one.node_key)
    assert bytes(other.call(one.node_key, "echo", {}, [b"back"]).body) == b"back"
    assert town.relay.accounts.num_circuits == 1
    route = one_desk.route_to(other.node_key)
    assert route.kind == "relayed"
    assert "no address is known" in route.why
    assert "punch through" in route.why
    assert other_desk.route_to(one.node_key).kind == "relayed"
    assert one_desk.route_to(town.public.node_key).kind == "direct"


def test_both_may_want_each_other_at_once(make_town):
    town = make_town()
    (one, _), (other, _) = town.others
    found = []
    threads = [
        threading.Thread(target=lambda a=a, b=b: found.append(bytes(a.call(b.node_key, "echo", {}, [b"x"]).body)))
        for a, b in ((one, other), (other, one))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [b"x", b"x"]


def test_without_anybody_who_relays_the_error_says_what_was_tried(make_town):
    town = make_town(relays=False)
    with pytest.raises(PeerUnreachableError, match=r"no address is known.*punch through.*does not relay"):
        town.others[0][0].call(town.others[1][0].node_key, "echo")


def test_who_is_not_connected_is_not_introduced(make_town):
    town = make_town()
    with pytest.raises(PeerUnreachableError, match="is not connected here"):
        town.others[0][0].call(b"n" * 32, "echo")
    assert town.relay.accounts.num_circuits == 0


def test_an_introduced_peer_is_admitted_as_any_other(make_town):
    town = make_town()
    (one, _), (other, _) = town.others
    town.refused.add(one.node_key)
    with pytest.raises(AuthorityError):
        one.call(other.node_key, "echo")


def test_a_relay_that_joins_another_than_was_asked_for_is_found_out(make_town, monkeypatch):
    town = make_town(num=3)
    (one, _), (other, _), (third, _) = town.others
    connected = town.introductions._connected
    monkeypatch.setattr(town.introductions, "_connected", lambda key: connected(third.node_key))
    with pytest.raises(AuthorityError, match="expected was"):
        one.call(other.node_key, "echo")


def test_circuits_are_charged_to_who_asks(make_town):
    town = make_town()
    (one, _), (other, _) = town.others
    most = town.relay.quotas.circuits_per_peer
    for _ in range(most):
        town.relay.offer(one.node_key)
    with pytest.raises(PeerUnreachableError, match=f"{most} of your circuits"):
        one.call(other.node_key, "echo")
    assert bytes(other.call(one.node_key, "echo", {}, [b"y"]).body) == b"y"


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("punch", {}),
        ("circuit", {"node": b"short"}),
        ("meet", {"node": b"n" * 32, "endpoint": 5}),
        ("join_circuit", {"node": b"n" * 32, "port": 0, "token": b""}),
        ("join_circuit", {"node": b"n" * 32, "port": 70_000, "token": bytes(32)}),
        ("dial_back", {"port": -1}),
    ],
)
def test_what_is_out_of_shape_is_refused(make_town, method, params):
    town = make_town(num=1)
    with pytest.raises(ProtocolError):
        town.others[0][0].call(town.public.node_key, method, params)


def test_only_validators_name_addresses_to_be_dialled(make_town):
    town = make_town()
    worker = Peer(b"w" * 32, None, "worker", "127.0.0.1:9")
    with pytest.raises(AuthorityError, match="only validators"):
        town.meetings.rpc_meet(worker, {"node": b"n" * 32, "endpoint": "192.0.2.1:80"}, memoryview(b""))


def test_a_port_is_looked_at_at_the_callers_own_address_and_not_often(make_town):
    town = make_town(num=1)
    node = town.others[0][0]
    port = int(town.public.endpoint.rpartition(":")[2])
    assert node.call(town.public.node_key, "observe").params["endpoint"].startswith("127.0.0.1:")
    assert node.call(town.public.node_key, "dial_back", {"port": port}).params["reached"] is True
    told = node.call(town.public.node_key, "dial_back", {"port": 9}).params
    assert (told["reached"], "nobody can be reached at 127.0.0.1:9" in told["why"]) == (False, True)
    for _ in range(introducing.MAX_DIALS_BACK - 2):
        node.call(town.public.node_key, "dial_back", {"port": 9})
    with pytest.raises(BusyError, match="ports were looked at"):
        node.call(town.public.node_key, "dial_back", {"port": 9})
