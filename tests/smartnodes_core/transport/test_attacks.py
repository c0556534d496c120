"""Attackers on real sockets: who replays, stands in between, floods, dawdles, or fills memory. See docs/security.md.

Those whom the chain does not admit are played in `nodes/test_authority.py`, forged and stolen certificates in
`test_tls.py`, bindings in `test_transport.py`, changed records in `test_sealed.py`.
"""

from __future__ import annotations

import gc
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from OpenSSL import SSL

from smartnodes_core.errors import AuthorityError, BusyError, SmartnodesError
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.base import Node
from smartnodes_core.rpc import RpcEndpoint
from smartnodes_core.transport import tls_connection
from smartnodes_core.transport.base import Connection, Peer, split_endpoint
from smartnodes_core.transport.tls import TlsTransport, _make_context
from smartnodes_core.transport.welcome import welcome
from smartnodes_core.wire import MAX_HEADER_BYTES, PREFIX_BYTES, encode_prefix_and_header

WAIT_S = 10.0
SECRET = b"the weights of somebody's model " * 4


def admit_all(peer: Peer) -> None:
    pass


class Middle:
    """Stands between a dialler and a listener, carries all bytes on and keeps what the dialler said."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.said = b""
        self.heard = b""
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        near, _ = self._server.accept()
        far = socket.create_connection(self._address)
        with near, far:
            ends = {near: far, far: near}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(1 << 20)
                    if not data:
                        return
                    if end is near:
                        self.said += data
                    else:
                        self.heard += data
                    ends[end].sendall(data)

    def close(self) -> None:
        self._server.close()
        self._thread.join(WAIT_S)


def wait_hung_up(tcp: socket.socket) -> bool:
    tcp.settimeout(WAIT_S)
    try:
        while tcp.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    return True


@pytest.fixture
def far(tls_party: Any) -> Node:
    return tls_party.node("worker")  # type: ignore[no-any-return]


@pytest.fixture
def middle(far: Node) -> Iterator[Middle]:
    made = Middle(split_endpoint(far.endpoint))
    yield made
    made.close()


@pytest.mark.parametrize("bulk", [False, True])
def test_who_carries_the_bytes_sees_nothing_of_what_is_said(
    tls_party: Any, far: Node, middle: Middle, bulk: bool
) -> None:
    identity = Identity.create()
    sent = threading.Event()
    transport = TlsTransport(identity, tls_party.bind(identity, "user"))
    if bulk:  # the connection for calls goes directly
        tls_party.node("user", identity=identity).connect(far.endpoint)
    connection = transport.dial(middle.endpoint, RpcEndpoint(), admit_all, far.node_key, bulk=bulk)
    connection.send({"kind": "secret-kind", "note": "secret-note"}, [SECRET * 1000], sent.set)
    assert sent.wait(WAIT_S)
    connection.close("done")
    assert connection.join(WAIT_S)
    deadline_s = time.monotonic() + WAIT_S
    while len(middle.said) <= len(SECRET) * 1000 and time.monotonic() < deadline_s:
        select.select([], [], [], 0.01)  # it may still be carrying
    assert len(middle.said) > len(SECRET) * 1000
    for word in (SECRET, b"secret-kind", b"secret-note", identity.node_key, far.node_key):
        assert word not in middle.said
        assert word not in middle.heard


def test_a_recorded_handshake_opens_nothing_when_it_is_replayed(tls_party: Any, far: Node, middle: Middle) -> None:
    identity = Identity.create()
    transport = TlsTransport(identity, tls_party.bind(identity, "user"))
    connection = transport.dial(middle.endpoint, RpcEndpoint(), admit_all, far.node_key)
    connection.close("recorded")
    assert connection.join(WAIT_S)
    deadline_s = time.monotonic() + WAIT_S
    while far.peers() and time.monotonic() < deadline_s:
        select.select([], [], [], 0.01)
    with socket.create_connection(split_endpoint(far.endpoint)) as tcp:
        tcp.sendall(middle.said)
        assert wait_hung_up(tcp)
    assert far.peers() == []


def test_who_stands_in_between_with_an_identity_of_its_own_is_not_who_was_dialled(tls_party: Any, far: Node) -> None:
    """The man in the middle ends TLS himself, as a registered member even: his key is not the one that was dialled."""
    attacker, victim = tls_party.node("worker"), tls_party.node("user")
    victim.add_address(far.node_key, attacker.endpoint)  # a forged address record, or a hijacked route
    with pytest.raises(AuthorityError, match="somebody stands in for it"):
        victim.call(far.node_key, "binding", timeout_s=WAIT_S)
    assert victim.peers() == []


def admitted(tls_party: Any, far: Node) -> tuple[SSL.Connection, socket.socket]:
    """A client of the attacker's own making, whom the node has admitted: it may send what it likes."""
    identity = Identity.create()
    tcp = socket.create_connection(split_endpoint(far.endpoint))
    tls = SSL.Connection(_make_context(identity, tls_party.bind(identity, "user")), tcp)
    tls.set_connect_state()
    tls.do_handshake()
    tls.send(welcome())
    assert b"transport" in tls.recv(4096)
    return tls, tcp


BOMBS = {
    "header over its cap": struct.pack(">IQ", MAX_HEADER_BYTES + 1, 0),
    "header of four gigabytes": struct.pack(">IQ", (1 << 32) - 1, 0),
    "empty header": struct.pack(">IQ", 0, 0),
    "brackets": struct.pack(">IQ", MAX_HEADER_BYTES, 0) + b"\x91" * MAX_HEADER_BYTES,
    "a map that claims four thousand million keys": struct.pack(">IQ", 5, 0) + b"\xdf\xff\xff\xff\xff",
    "a body without end, for nobody": encode_prefix_and_header({"kind": "reply", "id": 1}, (1 << 64) - 1),
    "a tensor where calls go": encode_prefix_and_header({"kind": "stream", "topic": "t", "header": {}}, 1 << 40),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_of_an_admitted_peer_end_its_connection_and_nothing_else(tls_party: Any, far: Node, bomb: bytes) -> None:
    tls, tcp = admitted(tls_party, far)
    tls.send(bomb)
    tcp.settimeout(WAIT_S)
    assert wait_hung_up(tcp)
    tcp.close()
    assert tls_party.node("user").connect(far.endpoint).node_key == far.node_key


def test_a_call_with_a_body_without_end_is_refused_from_its_header(tls_party: Any, far: Node) -> None:
    tls, tcp = admitted(tls_party, far)
    call = {"kind": "call", "id": 1, "method": "binding", "params": {}}
    tls.send(encode_prefix_and_header(call, 1 << 20))
    told = tls.recv(4096)
    assert b"takes a body of at most 0 bytes" in told
    tcp.close()


def test_a_peer_that_begins_a_frame_and_dawdles_is_dropped(
    tls_party: Any, far: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_connection, "_STALL_S", 0.3)
    tls, tcp = admitted(tls_party, far)
    frame = encode_prefix_and_header({"kind": "call", "id": 1, "method": "binding", "params": {}}, 0)
    started_s = time.monotonic()
    for byte in frame[: PREFIX_BYTES + 8]:
        tls.send(bytes([byte]))
        if select.select([tcp], [], [], 0.05)[0]:
            break
    assert wait_hung_up(tcp)
    tcp.close()
    assert time.monotonic() - started_s < 5


def test_a_peer_that_says_nothing_between_frames_stays(
    tls_party: Any, far: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_connection, "_STALL_S", 0.05)
    near = tls_party.node("user")
    near.connect(far.endpoint)
    assert not threading.Event().wait(0.2)
    assert len(near.peers()) == len(far.peers()) == 1


def test_a_flood_from_one_address_leaves_room_for_others(tls_party: Any) -> None:
    identity = Identity.create()
    transport = TlsTransport(identity, tls_party.bind(identity), max_pending_per_host=3, handshake_timeout_s=60)
    listener = transport.listen("0.0.0.0:0", RpcEndpoint(), admit_all)
    port = split_endpoint(listener.endpoint)[1]
    flood = [socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0)) for _ in range(8)]
    deadline_s = time.monotonic() + WAIT_S
    while listener.num_refused < 5 and time.monotonic() < deadline_s:
        select.select([], [], [], 0.01)
    assert listener.num_refused == 5
    other = Identity.create()
    connection = TlsTransport(other, tls_party.bind(other)).dial(f"127.0.0.1:{port}", RpcEndpoint(), admit_all)
    connection.close("done")
    assert connection.join(WAIT_S)
    for tcp in flood:
        tcp.close()
    listener.close()


class Held:
    """What a receiver reserves memory with, and gives it back when it goes."""


def test_many_half_sent_tensors_leave_no_memory_behind(tls_party: Any, far: Node) -> None:
    lasting = set(threading.enumerate())  # the listener's, and those that other tests may have left
    held: list[weakref.ref[Held]] = []
    limit_bytes = 64 << 20

    def allocate(peer: Peer, header: dict[str, Any], num_bytes: int) -> memoryview:
        alive = sum(1 for each in held if each() is not None)
        if (alive + 1) * num_bytes > limit_bytes:
            raise BusyError("enough of yours is on its way")
        reserved = Held()
        header["reserved"] = reserved
        held.append(weakref.ref(reserved))
        return memoryview(bytearray(num_bytes))

    far.on_stream("t", allocate, lambda peer, header, body: None)
    for _ in range(3):  # again and again: what was taken before has to be free by then
        identity = Identity.create()
        near = tls_party.node("user", identity=identity)
        near.connect(far.endpoint)
        attack: list[Connection] = []
        for _ in range(6):
            connection = near._transport.dial(far.endpoint, near._rpc, admit_all, far.node_key, bulk=True)
            attack.append(connection)
            head = encode_prefix_and_header({"kind": "stream", "topic": "t", "header": {}}, 16 << 20)
            # the attacker's own sealing: a frame that announces 16 MiB and brings 100 bytes
            connection._outbox.put(  # type: ignore[attr-defined]
                tls_connection.OutFrame(head, [memoryview(bytes(100))], None, len(head) + 100), 1.0, "far"
            )
            connection._wake()  # type: ignore[attr-defined]
        deadline_s = time.monotonic() + WAIT_S
        while len([each for each in held if each() is not None]) < 4 and time.monotonic() < deadline_s:
            select.select([], [], [], 0.01)
        assert sum(1 for each in held if each() is not None) <= 4
        near.stop()
        while far.peers() and time.monotonic() < deadline_s:
            select.select([], [], [], 0.01)
        for thread in set(threading.enumerate()) - lasting:
            if thread.name.startswith("tls "):
                thread.join(WAIT_S)
        gc.collect()
        assert [each for each in held if each() is not None] == []


def test_peers_that_come_and_go_as_fast_as_they_can_keep_nobody_out(tls_party: Any, far: Node) -> None:
    identity = Identity.create()
    churner = TlsTransport(identity, tls_party.bind(identity, "user"))
    stop = threading.Event()
    num_made = [0]

    def churn() -> None:
        while not stop.is_set():
            try:
                churner.dial(far.endpoint, RpcEndpoint(), admit_all, timeout_s=1.0).close("again")
                num_made[0] += 1
            except SmartnodesError:
                continue

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            near = tls_party.node("user")
            assert near.connect(far.endpoint, timeout_s=WAIT_S).node_key == far.node_key
            assert near.call(far.node_key, "binding", timeout_s=WAIT_S).body
            near.stop()
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert num_made[0]
