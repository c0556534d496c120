"""Bulk connections stand beside those for calls, live and end with them, and are taken from nobody else."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from smartnodes_core.config import MAX_BULK_CONNECTIONS
from smartnodes_core.errors import BusyError, ConnectionLostError, Unavailable
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.base import Node
from smartnodes_core.transport.base import Peer

WAIT_S = 10.0


def pair(party: Any) -> tuple[Node, Node, threading.Semaphore]:
    """Two connected nodes; the semaphore counts tensors that either got."""
    near, far, got = party.node("user"), party.node("worker"), threading.Semaphore(0)
    for node in (near, far):
        node.on_stream("t", lambda peer, header, size: memoryview(bytearray(size)), lambda *_: got.release())
    near.connect(far.endpoint)
    return near, far, got


def test_many_threads_that_need_one_share_it(party: Any) -> None:
    near, far, got = pair(party)
    senders = [(near, far), (far, near)] * 4
    threads = [threading.Thread(target=lambda a=a, b=b: a.stream(b.node_key, "t", {}, [b"tensor"])) for a, b in senders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert got.acquire(timeout=WAIT_S)
    assert len(near._bulk.all()) == len(far._bulk.all()) == 1
    assert len(near.peers()) == 1


def test_a_broken_one_loses_the_peer_and_says_why(party: Any) -> None:
    near, far, got = pair(party)
    near.stream(far.node_key, "t", {}, [b"tensor"])
    assert got.acquire(timeout=WAIT_S)
    reasons: list[str] = []
    lost = threading.Event()

    def on_lost(key: bytes, reason: str) -> None:
        reasons.append(reason)
        lost.set()

    near.on_peer_lost(on_lost)
    far._bulk.all()[0].close("a fault")
    assert lost.wait(WAIT_S)
    assert "closed the connection" in reasons[0]
    near.stream(far.node_key, "t", {}, [b"tensor"])  # reached again
    assert got.acquire(timeout=WAIT_S)


def test_they_end_with_the_connection_for_calls(party: Any) -> None:
    near, far, got = pair(party)
    near.stream(far.node_key, "t", {}, [b"tensor"])
    assert got.acquire(timeout=WAIT_S)
    connections = [*near._bulk.all(), *far._bulk.all()]
    near.drop(far.node_key, "no longer needed")
    for connection in connections:
        assert connection.join(WAIT_S)
    assert near._bulk.all() == far._bulk.all() == []


def test_nobody_gets_one_without_a_connection_for_calls(party: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartnodes_core.nodes.base.ARRIVAL_S", 0.05)
    far = party.node("worker")
    stranger = Identity.create()
    transport = party.transport(stranger, party.bind(stranger, "user"))
    with pytest.raises(ConnectionLostError, match="no connection for calls"):
        transport.dial(far.endpoint, far._rpc, lambda peer: None, bulk=True)


def test_nobody_gets_more_than_so_many(party: Any) -> None:
    near, far, _ = pair(party)

    def dial() -> None:
        near._transport.dial(far.endpoint, near._rpc, lambda peer: None, far.node_key, bulk=True)

    refused: list[Unavailable] = []
    for _ in range(MAX_BULK_CONNECTIONS + 3):
        try:
            dial()
        except BusyError as error:
            refused.append(error)
    assert refused
    assert len(far._bulk.all()) <= MAX_BULK_CONNECTIONS


def test_who_did_not_dial_does_not_dial_on_request(party: Any) -> None:
    near, far, _ = pair(party)
    with pytest.raises(BusyError, match="ask again"):
        near.call(far.node_key, "open_bulk")


@pytest.mark.parametrize("kind", ["notify", "stream"])
def test_notifications_and_tensors_keep_to_their_own_kind(party: Any, kind: str) -> None:
    near, far, got = pair(party)
    near.stream(far.node_key, "t", {}, [b"tensor"])
    assert got.acquire(timeout=WAIT_S)
    lost = threading.Event()
    far.on_peer_lost(lambda key, reason: lost.set())
    wrong = near._bulk.all()[0] if kind == "notify" else near._links.get(far.node_key)
    assert wrong is not None
    wrong.send({"kind": kind, "method": "x", "params": {}, "topic": "t", "header": {}})
    assert lost.wait(WAIT_S)


def test_stopping_ends_them_and_leaves_no_threads(party: Any) -> None:
    before = set(threading.enumerate())
    near, far, got = pair(party)
    far.stream(near.node_key, "t", {}, [b"tensor"])
    assert got.acquire(timeout=WAIT_S)
    near.stop()
    far.stop()
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT_S)
        assert not thread.is_alive(), thread
    with pytest.raises(Unavailable):
        near.stream(far.node_key, "t", {}, [b"x"], timeout_s=1)


def test_peers_with_one_show_as_one_peer(party: Any) -> None:
    near, far, got = pair(party)
    near.stream(far.node_key, "t", {}, [b"tensor"])
    assert got.acquire(timeout=WAIT_S)
    assert [type(peer) for peer in far.peers()] == [Peer]
    assert not far.peers()[0].bulk
