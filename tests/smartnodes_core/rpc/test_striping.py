"""Tensors in pieces over several connections: whole, once, and what a hostile sender can do."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from smartnodes_core.errors import ConnectionLostError, JobError, ProtocolError
from smartnodes_core.rpc.striping import (
    MAX_TRANSFERS_PER_PEER,
    MIN_STRIPED_BYTES,
    PIECE_BYTES,
    Transfers,
    send_striped,
)
from smartnodes_core.transport.base import Peer

WAIT_S = 10.0
PEER = Peer(node_key=bytes(32), binding=None, role=None, endpoint="a:1", bulk=True)


def header_of(number: Any, offset: Any, size: Any) -> dict[str, Any]:
    return {"kind": "stream", "topic": "t", "header": {"step": 1}, "piece": [number, offset, size]}


def new_memory(peer: Peer, fields: dict[str, Any], size: int) -> memoryview:
    return memoryview(bytearray(size))


@pytest.mark.parametrize("num_bytes", [MIN_STRIPED_BYTES - 1, MIN_STRIPED_BYTES, 7 * PIECE_BYTES + 13])
def test_tensors_arrive_whole_over_three_connections(party: Any, num_bytes: int) -> None:
    near, far = party.node("user", num_bulk_connections=3), party.node("worker")
    near.add_address(far.node_key, far.endpoint)
    memory, done, sent = memoryview(bytearray(num_bytes)), threading.Semaphore(0), threading.Semaphore(0)
    asked: list[int] = []

    def allocate(peer: Peer, header: dict[str, Any], size: int) -> memoryview:
        asked.append(size)
        return memory

    far.on_stream("t", allocate, lambda peer, header, body: done.release())
    parts = [bytes([number + 1]) * (num_bytes // 3) for number in range(3)]
    parts[2] += b"x" * (num_bytes - 3 * (num_bytes // 3))
    for _ in range(3):
        near.stream(far.node_key, "t", {}, parts, sent.release)
        assert done.acquire(timeout=WAIT_S)
        assert sent.acquire(timeout=WAIT_S)
        assert bytes(memory) == b"".join(parts)
        memory[:] = bytes(num_bytes)
    assert asked == [num_bytes] * 3
    assert len(near._bulk.all()) == len(far._bulk.all()) == 3
    assert len(far._rpc._transfers) == 0


def test_who_was_dialled_asks_for_the_connections_and_uses_all(party: Any) -> None:
    near, far = party.node("user", num_bulk_connections=2), party.node("worker")
    near.connect(far.endpoint)
    got: list[bytes] = []
    done = threading.Event()

    def receive(peer: Peer, header: dict[str, Any], body: memoryview) -> None:
        got.append(bytes(body))
        done.set()

    near.on_stream("t", new_memory, receive)
    body = bytes(range(256)) * (12 << 10)
    far.stream(near.node_key, "t", {}, [body])
    assert done.wait(WAIT_S)
    assert got == [body]
    assert len(far._bulk.all()) == 2


def test_a_striped_tensor_that_nobody_wants_is_skipped_once(party: Any) -> None:
    near, far = party.node("user", num_bulk_connections=2), party.node("worker")
    near.add_address(far.node_key, far.endpoint)
    gone, wanted = threading.Semaphore(0), threading.Event()

    def allocate(peer: Peer, header: dict[str, Any], size: int) -> memoryview:
        if header.get("late"):
            raise JobError("that job is over")
        return memoryview(bytearray(size))

    far.on_stream("t", allocate, lambda peer, header, body: wanted.set())
    near.stream(far.node_key, "t", {"late": True}, [bytes(5 * PIECE_BYTES)], gone.release)
    near.stream(far.node_key, "t", {}, [bytes(5 * PIECE_BYTES)], gone.release)
    assert wanted.wait(WAIT_S)
    assert far._rpc.num_refused_streams == 1
    assert gone.acquire(timeout=WAIT_S)
    assert gone.acquire(timeout=WAIT_S)


def test_a_connection_lost_on_the_way_gives_the_memory_back_and_forgets_the_tensor(memory_party: Any) -> None:
    near, far = memory_party.node("user", num_bulk_connections=2), memory_party.node("worker")
    near.add_address(far.node_key, far.endpoint)
    begun, release, sent = threading.Event(), threading.Event(), threading.Event()
    lost = threading.Event()
    far.on_peer_lost(lambda key, reason: lost.set())

    def allocate(peer: Peer, header: dict[str, Any], size: int) -> memoryview:
        begun.set()
        release.wait(WAIT_S)
        return memoryview(bytearray(size))

    far.on_stream("t", allocate, lambda peer, header, body: None)
    near.stream(far.node_key, "t", {}, [bytes(64 * PIECE_BYTES)], sent.set)
    assert begun.wait(WAIT_S)
    memory_party.hub.cut(near.node_key)
    release.set()
    assert sent.wait(WAIT_S)
    assert lost.wait(WAIT_S)
    for connection in [*near._bulk.all(), *far._bulk.all()]:
        assert connection.join(WAIT_S)
    assert len(far._rpc._transfers) == 0


class Refusing:
    """A connection that takes `room` frames."""

    def __init__(self, room: int) -> None:
        self.room, self.closed_because = room, ""

    def send(self, header: dict[str, Any], body: Any, on_sent: Any, timeout_s: float) -> None:
        if not self.room:
            raise ConnectionLostError("gone")
        self.room -= 1
        on_sent()

    def close(self, reason: str) -> None:
        self.closed_because = reason


def test_a_tensor_that_cannot_be_sent_whole_is_given_back_once_and_ends_the_connections() -> None:
    connections: list[Any] = [Refusing(2), Refusing(1)]
    given_back: list[int] = []
    send_striped(connections, header_of(0, 0, 0), [bytes(5 * PIECE_BYTES)], lambda: given_back.append(1), 1.0)
    assert given_back == [1]
    assert all("could not be sent whole" in connection.closed_because for connection in connections)
    with pytest.raises(ConnectionLostError):
        send_striped(connections[1:], {}, [bytes(5 * PIECE_BYTES)], lambda: given_back.append(2), 1.0)
    assert given_back == [1]


@pytest.mark.parametrize(
    ("piece", "num_bytes"),
    [
        ("x", 1),
        ([1, 2], 1),
        ([1, 0, "3"], 1),
        ([1, True, 3], 1),
        ([1, -PIECE_BYTES, 1], 1),
        ([1, 5, 10], 5),
        ([1, 0, 10], 9),
        ([1, PIECE_BYTES, PIECE_BYTES], 0),
        ([1, 0, 3 * PIECE_BYTES], PIECE_BYTES - 1),
    ],
)
def test_a_malformed_piece_is_the_peers_fault(piece: Any, num_bytes: int) -> None:
    with pytest.raises(ProtocolError, match="piece"):
        Transfers().allocate(PEER, {**header_of(1, 0, 1), "piece": piece}, num_bytes, new_memory)


def test_a_piece_sent_twice_or_of_another_size_is_the_peers_fault() -> None:
    transfers = Transfers()
    transfers.allocate(PEER, header_of(1, 0, 3 * PIECE_BYTES), PIECE_BYTES, new_memory)
    for offset, size in ((0, 3 * PIECE_BYTES), (PIECE_BYTES, 4 * PIECE_BYTES)):
        with pytest.raises(ProtocolError, match="twice, or of another"):
            transfers.allocate(PEER, header_of(1, offset, size), PIECE_BYTES, new_memory)


def test_tensors_that_are_begun_and_never_finished_are_bounded() -> None:
    transfers = Transfers()
    for number in range(MAX_TRANSFERS_PER_PEER):
        transfers.allocate(PEER, header_of(number, 0, 3 * PIECE_BYTES), PIECE_BYTES, new_memory)
    with pytest.raises(ProtocolError, match="finished none"):
        transfers.allocate(PEER, header_of(-1, 0, 3 * PIECE_BYTES), PIECE_BYTES, new_memory)
    transfers.forget(PEER)
    assert len(transfers) == 0


def test_the_memory_of_a_half_sent_tensor_is_held_by_nothing_when_its_peer_is_gone() -> None:
    import gc
    import weakref

    class Held:
        """What a receiver keeps with the header, and frees the memory when it goes."""

    transfers, held = Transfers(), []

    def allocate(peer: Peer, fields: dict[str, Any], size: int) -> memoryview:
        fields["reserved"] = Held()
        held.append(weakref.ref(fields["reserved"]))
        return memoryview(bytearray(size))

    first, second = header_of(1, 0, 3 * PIECE_BYTES), header_of(1, PIECE_BYTES, 3 * PIECE_BYTES)
    transfers.allocate(PEER, first, PIECE_BYTES, allocate)
    transfers.allocate(PEER, second, PIECE_BYTES, allocate)
    transfers.forget(PEER)
    del first
    gc.collect()
    assert held[0]() is not None  # the second piece is still being written
    del second
    gc.collect()
    assert held[0]() is None
