"""A node's connections: one for each peer, dialled when needed, dropped when the chain says so."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from smartnodes_core.errors import AuthorityError, ConfigError, PeerUnreachableError, Unavailable
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.base import Node
from smartnodes_core.rpc import allow
from smartnodes_core.transport.base import Peer

WAIT_S = 10.0


class Ping:
    @allow(passing=True)
    def rpc_glance(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        return {}

    def rpc_ping(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        return {"caller": caller.node_key}


def serving(party: Any, **options: Any) -> Node:
    node: Node = party.node(**options)
    node.serve(Ping())
    return node


def test_a_node_dials_by_itself_and_both_sides_use_one_connection(party: Any) -> None:
    a, b = serving(party), serving(party)
    a.add_address(b.node_key, b.endpoint)
    assert a.call(b.node_key, "ping").params == {"caller": a.node_key}
    assert b.call(a.node_key, "ping").params == {"caller": b.node_key}  # b knows no address of a
    assert len(a.peers()) == len(b.peers()) == 1


def test_connecting_to_an_endpoint_tells_who_is_there(party: Any) -> None:
    a, b = serving(party), serving(party, role="validator")
    peer = a.connect(b.endpoint)
    assert (peer.node_key, peer.role) == (b.node_key, "validator")
    assert a.connect(b.endpoint).node_key == b.node_key  # again, while the connection lives
    with pytest.raises(AuthorityError, match="expected was"):
        party.node().connect(b.endpoint, node_key=Identity.create().node_key)


def test_simultaneous_dials_end_in_one_connection_and_no_failed_call(party: Any) -> None:
    for _ in range(10):
        a, b = serving(party), serving(party)
        a.add_address(b.node_key, b.endpoint)
        b.add_address(a.node_key, a.endpoint)
        barrier = threading.Barrier(6)
        results: list[bytes] = []

        def call(caller: Node, callee: Node, barrier: threading.Barrier, results: list[Any]) -> None:
            barrier.wait()
            results.append(caller.call(callee.node_key, "ping", timeout_s=WAIT_S).params["caller"])

        pairs = [(a, b), (b, a)] * 3
        threads = [threading.Thread(target=call, args=(*pair, barrier, results)) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert len(results) == 6
        assert len(a.peers()) == len(b.peers()) == 1


def test_a_peer_without_an_address_is_unreachable_with_the_remedy(party: Any) -> None:
    with pytest.raises(PeerUnreachableError, match="no address is known"):
        serving(party).call(Identity.create().node_key, "ping")


def test_the_next_address_is_tried_when_one_is_dead(party: Any) -> None:
    a, b = serving(party), serving(party)
    a.add_address(b.node_key, b.endpoint)
    a.add_address(b.node_key, "127.0.0.1:1")
    assert a.call(b.node_key, "ping").params


def test_a_lost_peer_is_told_of_once_and_reached_again(party: Any) -> None:
    a, b = serving(party), serving(party)
    a.add_address(b.node_key, b.endpoint)
    a.call(b.node_key, "ping")
    lost: list[tuple[bytes, str]] = []
    told = threading.Event()

    def on_lost(node_key: bytes, reason: str) -> None:
        lost.append((node_key, reason))
        told.set()

    a.on_peer_lost(on_lost)
    b.drop(a.node_key, "a test")
    assert told.wait(WAIT_S)
    assert [key for key, _ in lost] == [b.node_key]
    assert a.call(b.node_key, "ping").params


def test_a_restarted_peer_takes_over_from_its_dead_connection(party: Any) -> None:
    a, identity = serving(party), Identity.create()
    b = serving(party, identity=identity)
    b.connect(a.endpoint)
    b.stop()
    again = serving(party, identity=identity)
    again.add_address(a.node_key, a.endpoint)
    assert again.call(a.node_key, "ping", timeout_s=WAIT_S).params == {"caller": identity.node_key}


def test_a_connection_that_only_passing_calls_used_is_closed_when_idle_and_dialled_again(party: Any) -> None:
    a, b = serving(party), serving(party)
    lost = threading.Event()
    b.on_peer_lost(lambda key, reason: lost.set())
    a.reach(b.node_key, hearsay=[b.endpoint], passing=True)
    a.call(b.node_key, "glance", passing=True)
    assert a.close_idle(3600.0) == 0  # used a moment ago
    assert a.close_idle(0.0, keep=lambda peer: peer.node_key == b.node_key) == 0
    assert b.close_idle(0.0) == 0  # it was dialled by the other
    assert a.close_idle(0.0) == 1
    assert lost.wait(WAIT_S)
    assert a.close_idle(0.0) == 0
    assert a.call(b.node_key, "glance", passing=True).params == {}
    assert a.close_idle(0.0) == 1


@pytest.mark.parametrize("use", ["connect", "call", "called", "reach", "stream"])
def test_what_somebody_else_uses_a_connection_for_keeps_it_open(party: Any, use: str) -> None:
    a, b = serving(party), serving(party)
    b.on_stream("t", lambda peer, header, size: memoryview(bytearray(size)), lambda *_: None)
    a.reach(b.node_key, hearsay=[b.endpoint], passing=True)
    uses = {
        "connect": lambda: a.connect(b.endpoint),
        "call": lambda: a.call(b.node_key, "ping"),
        "called": lambda: b.call(a.node_key, "ping"),
        "reach": lambda: a.reach(b.node_key),
        "stream": lambda: a.stream(b.node_key, "t", {}, [b"tensor"]),
    }
    uses[use]()
    a.call(b.node_key, "glance", passing=True)
    assert a.close_idle(0.0) == 0


def test_calls_go_on_while_idle_connections_are_closed_again_and_again(party: Any) -> None:
    a, b = serving(party), serving(party)
    a.add_address(b.node_key, b.endpoint)
    ended = threading.Event()

    def close() -> None:
        while not ended.wait(0.005):
            a.close_idle(0.1)

    closer = threading.Thread(target=close)
    closer.start()
    pause = threading.Event()
    try:
        for turn in range(10):
            assert a.call(b.node_key, "glance", passing=True, timeout_s=WAIT_S).params == {}
            pause.wait(0.02 * turn)
    finally:
        ended.set()
        closer.join(WAIT_S)


def test_a_node_does_not_dial_itself(party: Any) -> None:
    a = serving(party)
    with pytest.raises(AuthorityError, match="this node itself"):
        a.connect(a.endpoint)
    with pytest.raises(PeerUnreachableError, match="does not call itself"):
        a.call(a.node_key, "ping")


def test_stopping_is_quiet_complete_and_repeatable(party: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = set(threading.enumerate())
    nodes = [serving(party) for _ in range(4)]
    for node in nodes[1:]:
        node.connect(nodes[0].endpoint)
        node.call(nodes[0].node_key, "ping")
    for node in nodes:
        node.stop()
        node.stop()
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT_S)
        assert not thread.is_alive(), thread
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    with pytest.raises(Unavailable):
        nodes[1].call(nodes[0].node_key, "ping", timeout_s=2)


def test_a_node_that_does_not_listen_has_no_endpoint_and_still_calls(party: Any) -> None:
    b, identity = serving(party), Identity.create()
    binding = party.bind(identity, "user")
    from smartnodes_core.nodes.authority import OpenAuthority

    a = Node(identity, binding, party.transport(identity, binding), OpenAuthority(), endpoint=None)
    a.start()
    with pytest.raises(ConfigError, match="does not listen"):
        _ = a.endpoint
    a.connect(b.endpoint)
    assert a.call(b.node_key, "ping").params
    a.stop()


def test_addresses_are_checked(party: Any) -> None:
    a = serving(party)
    with pytest.raises(ConfigError):
        a.add_address(bytes(32), "nowhere")
    with pytest.raises(ConfigError, match="32 bytes"):
        a.add_address(b"short", "a:1")


def test_what_third_nodes_say_of_an_address_is_tried_last_and_kept_only_if_it_holds(party: Any) -> None:
    a, b, c = serving(party), serving(party), serving(party)
    with pytest.raises(AuthorityError):
        a.reach(b.node_key, hearsay=[c.endpoint])
    assert not a._addresses.knows(b.node_key)
    assert a.reach(b.node_key, hearsay=["127.0.0.1:9", b.endpoint]).node_key == b.node_key
    assert a._addresses.of(b.node_key) == [b.endpoint]
    c.add_address(b.node_key, b.endpoint)
    assert c.reach(b.node_key, hearsay=[a.endpoint]).node_key == b.node_key
    assert c._addresses.of(b.node_key) == [b.endpoint]


def test_an_address_that_nobody_knows_is_looked_up_when_it_is_needed(party: Any) -> None:
    a, b = serving(party), serving(party)
    asked: list[bytes] = []

    def find(node_key: bytes, timeout_s: float) -> None:
        asked.append(node_key)
        if node_key == b.node_key:
            a.add_address(node_key, b.endpoint)

    a.find_address = find
    assert a.call(b.node_key, "ping").params == {"caller": a.node_key}
    with pytest.raises(PeerUnreachableError, match="no address is known"):
        a.call(bytes(32), "ping")
    a.call(b.node_key, "ping")
    assert asked == [b.node_key, bytes(32)]


def test_a_node_listens_within_a_second_without_web3_or_torch() -> None:
    code = """
import sys, time
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.authority import OpenAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.transport.tls import TlsTransport
identity = Identity.create()
node = Node(identity, None, TlsTransport(identity, None), OpenAuthority())
node.start()
took_s = time.process_time()  # of the processor: others may be at work too
assert node.endpoint
heavy = [name for name in ("web3", "torch", "tensorlink", "eth_account") if name in sys.modules]
assert not heavy, heavy
assert took_s < 1.0, took_s
node.stop()
"""
    started_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - started_s < 20
