"""What both transports promise: the same tests over TLS on loopback and over memory, for both kinds of connection."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    ConnectionLostError,
    PeerUnreachableError,
    PortInUseError,
    ProtocolError,
    SignatureError,
    SmartnodesError,
)
from smartnodes_core.identity import Identity
from smartnodes_core.transport.base import MAX_QUEUED_BYTES, Connection, FrameSink, Listener, Peer, Transport
from smartnodes_core.wire import Header

WAIT_S = 10.0


class TooMany(SmartnodesError):
    """A class that the core does not know of."""

    code = "too-many-test-peers"


class Recorder:
    """A sink that keeps what happens; `accept` may refuse a body or choose its memory."""

    def __init__(self, accept: Callable[[Header, int], memoryview | None] | None = None) -> None:
        self.accept = accept or (lambda header, num_bytes: memoryview(bytearray(num_bytes)))
        self.opened: queue.Queue[Connection] = queue.Queue()
        self.frames: queue.Queue[tuple[Header, bytes]] = queue.Queue()
        self.ended: queue.Queue[Exception | None] = queue.Queue()
        self.threads: set[str] = set()

    def on_open(self, connection: Connection) -> None:
        self.opened.put(connection)

    def allocate(self, connection: Connection, header: Header, num_bytes: int) -> memoryview | None:
        return self.accept(header, num_bytes)

    def on_frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        self.threads.add(threading.current_thread().name)
        self.frames.put((header, bytes(body)))

    def on_closed(self, connection: Connection, error: Exception | None) -> None:
        self.ended.put(error)


def admit_all(peer: Peer) -> None:
    pass


class Pair:
    """A listening and a dialling side."""

    def __init__(
        self, party: Any, bulk: bool, far: Recorder | None = None, far_admit: Callable[[Peer], None] = admit_all
    ) -> None:
        self.party, self.bulk = party, bulk
        self.far, self.near = far or Recorder(), Recorder()
        self.server, self.dialler = Identity.create(), Identity.create()
        self.server_binding = party.bind(self.server, "worker")
        self.transport: Transport = party.transport(self.dialler, party.bind(self.dialler, "user"))
        self.server_transport: Transport = party.transport(self.server, self.server_binding)
        self.listener: Listener = self.server_transport.listen("127.0.0.1:0", self.far, far_admit)
        self.connections: list[Connection] = []

    def dial(
        self, sink: FrameSink | None = None, admit: Callable[[Peer], None] = admit_all, **options: Any
    ) -> Connection:
        transport = options.pop("transport", self.transport)
        made = transport.dial(self.listener.endpoint, sink or self.near, admit, bulk=self.bulk, **options)
        self.connections.append(made)
        return made  # type: ignore[no-any-return]

    def close(self) -> None:
        self.listener.close()
        self.connections += list(self.far.opened.queue)
        for connection in self.connections:
            connection.close("the test is over")
        for connection in self.connections:
            assert connection.join(WAIT_S)


@pytest.fixture(params=["calls", "bulk"])
def pair_of(party: Any, request: pytest.FixtureRequest) -> Callable[..., Pair]:
    """Over both kinds of connection in turn."""

    def make(**options: Any) -> Pair:
        pair = Pair(party, request.param == "bulk", **options)
        request.addfinalizer(pair.close)
        return pair

    return make


def test_both_sides_learn_who_the_other_is(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    near = pair.dial()
    far = pair.far.opened.get(timeout=WAIT_S)
    pair.connections.append(far)
    assert (near.peer.node_key, near.peer.role, near.dialled) == (pair.server.node_key, "worker", True)
    assert (far.peer.node_key, far.peer.role, far.dialled) == (pair.dialler.node_key, "user", False)
    assert (near.peer.bulk, far.peer.bulk) == (pair.bulk, pair.bulk)
    assert near.peer.binding is not None
    assert near.peer.binding.node_key == pair.server.node_key


def test_frames_arrive_whole_in_order_on_one_thread(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    near = pair.dial()
    for number in range(200):
        near.send({"n": number}, [b"ab", bytes([number]) * number])
    got = [pair.far.frames.get(timeout=WAIT_S) for _ in range(200)]
    assert [header["n"] for header, _ in got] == list(range(200))
    assert all(body == b"ab" + bytes([n]) * n for n, (_, body) in enumerate(got))
    assert len(pair.far.threads) == 1


def test_large_bodies_cross_in_both_directions_at_once(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    near = pair.dial()
    far = pair.far.opened.get(timeout=WAIT_S)
    pair.connections.append(far)
    body = bytes(range(256)) * (40 << 12)  # 40 MiB: more than any socket's buffer
    sent = threading.Semaphore(0)
    for connection in (near, far):
        connection.send({}, [body], sent.release)
    assert pair.far.frames.get(timeout=WAIT_S)[1] == body
    assert pair.near.frames.get(timeout=WAIT_S)[1] == body
    assert sent.acquire(timeout=WAIT_S)
    assert sent.acquire(timeout=WAIT_S)


def test_the_receiver_decides_where_a_body_goes(pair_of: Callable[..., Pair]) -> None:
    memory = memoryview(bytearray(1000))
    pair = pair_of(far=Recorder(lambda header, num_bytes: memory[100 : 100 + num_bytes]))
    pair.dial().send({}, [b"x" * 50])
    pair.far.frames.get(timeout=WAIT_S)
    assert bytes(memory) == bytes(100) + b"x" * 50 + bytes(850)


def test_an_oversize_body_is_refused_before_it_is_read_and_ends_the_connection(pair_of: Callable[..., Pair]) -> None:
    def accept(header: Header, num_bytes: int) -> memoryview:
        raise ProtocolError(f"{num_bytes} bytes are too many")

    pair = pair_of(far=Recorder(accept))
    near = pair.dial()
    near.send({}, [bytes(1 << 20)])
    error = pair.far.ended.get(timeout=WAIT_S)
    assert isinstance(error, ProtocolError)
    assert isinstance(pair.near.ended.get(timeout=WAIT_S), ConnectionLostError)
    assert pair.far.frames.empty()


def test_a_skipped_body_leaves_the_connection_usable(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of(far=Recorder(lambda header, num_bytes: None if num_bytes > 10 else memoryview(bytearray(num_bytes))))
    near = pair.dial()
    near.send({"n": 1}, [bytes(1 << 20)])
    near.send({"n": 2}, [b"ok"])
    assert pair.far.frames.get(timeout=WAIT_S) == ({"n": 2}, b"ok")


def test_a_peer_that_the_listener_does_not_admit_is_told_why_before_any_frame(pair_of: Callable[..., Pair]) -> None:
    def refuse(peer: Peer) -> None:
        raise AuthorityError(f"{peer} is not registered")

    pair = pair_of(far_admit=refuse)
    with pytest.raises(AuthorityError, match=r"refused us: user .* is not registered"):
        pair.dial()
    assert pair.far.opened.empty()
    assert pair.near.opened.empty()


def test_a_listener_that_the_dialler_does_not_admit_gets_no_frame(pair_of: Callable[..., Pair]) -> None:
    def refuse(peer: Peer) -> None:
        raise AuthorityError("blacklisted")

    pair = pair_of()
    with pytest.raises(AuthorityError, match="blacklisted"):
        pair.dial(admit=refuse)
    pair.listener.close()
    assert pair.far.opened.empty()


def test_who_answers_must_be_who_was_dialled(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    pair.dial(expected_node_key=pair.server.node_key)
    with pytest.raises(AuthorityError, match="expected was"):
        pair.dial(expected_node_key=Identity.create().node_key)


@pytest.mark.parametrize(
    "change", [{"chain_id": 1}, {"registry": b"\x99" * 20}, {"network_id": 8}, {"expires_at_s": 1}]
)
def test_a_binding_for_elsewhere_or_expired_is_refused(pair_of: Callable[..., Pair], change: dict[str, Any]) -> None:
    pair = pair_of()
    stranger = Identity.create()
    transport = pair.party.transport(stranger, pair.party.bind(stranger, "worker", **change))
    with pytest.raises(AuthorityError):
        pair.dial(transport=transport)
    assert pair.far.opened.empty()


def test_the_binding_of_another_is_refused(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    thief = Identity.create()
    transport = pair.party.transport(thief, pair.server_binding)
    with pytest.raises((AuthorityError, SignatureError), match="binding of another"):
        pair.dial(transport=transport)
    assert pair.far.opened.empty()


def test_a_peer_without_an_account_has_no_role(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    stranger = Identity.create()
    pair.dial(transport=pair.party.transport(stranger, None))
    far = pair.far.opened.get(timeout=WAIT_S)
    pair.connections.append(far)
    assert (far.peer.node_key, far.peer.binding, far.peer.role) == (stranger.node_key, None, None)


def test_nobody_listening_is_unreachable(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    pair.listener.close()
    with pytest.raises(PeerUnreachableError, match="nobody can be reached"):
        pair.dial()


def test_a_port_in_use_says_which_and_what_to_do(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    port = pair.listener.endpoint.rpartition(":")[2]
    with pytest.raises(PortInUseError, match=f"port {port} .*choose another port"):
        pair.server_transport.listen(pair.listener.endpoint, pair.far, admit_all)


def test_closing_delivers_what_was_queued_and_tells_both_sides(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    near = pair.dial()
    for number in range(20):
        near.send({"n": number}, [bytes(100_000)])
    near.close("done")
    assert [pair.far.frames.get(timeout=WAIT_S)[0]["n"] for _ in range(20)] == list(range(20))
    assert isinstance(pair.far.ended.get(timeout=WAIT_S), ConnectionLostError)
    assert pair.near.ended.get(timeout=WAIT_S) is None
    with pytest.raises(ConnectionLostError, match="done"):
        near.send({})


def test_a_full_queue_is_busy_and_every_body_is_given_back_at_the_end(pair_of: Callable[..., Pair]) -> None:
    release = threading.Event()

    def stall(header: Header, num_bytes: int) -> memoryview:
        release.wait(WAIT_S)
        return memoryview(bytearray(num_bytes))

    pair = pair_of(far=Recorder(stall))
    near = pair.dial()
    given, complaint, returned = 0, "", threading.Semaphore(0)
    body = bytes(MAX_QUEUED_BYTES // 4)
    try:
        for _ in range(20):
            near.send({}, [body], returned.release, timeout_s=0.2)
            given += 1
    except BusyError as error:
        complaint = str(error)
    assert "wait to be sent" in complaint
    assert given >= 3
    near.close("enough")
    release.set()
    for _ in range(given):
        assert returned.acquire(timeout=WAIT_S)


def test_a_receiver_that_fails_ends_only_its_connection(
    pair_of: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(header: Header, num_bytes: int) -> memoryview:
        if header.get("fail"):
            raise ZeroDivisionError("a bug of ours")
        return memoryview(bytearray(num_bytes))

    pair = pair_of(far=Recorder(fail))
    pair.dial().send({"fail": True})
    assert isinstance(pair.far.ended.get(timeout=WAIT_S), ZeroDivisionError)
    assert "a bug of ours" in caplog.text
    pair.dial().send({"fail": False})
    assert pair.far.frames.get(timeout=WAIT_S)[0] == {"fail": False}


def test_a_broken_link_ends_both_sides(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    near = pair.dial()
    pair.connections.append(pair.far.opened.get(timeout=WAIT_S))
    if pair.party.kind == "memory":
        assert pair.party.hub.cut(pair.server.node_key) == 2
    else:
        near._tcp.shutdown(2)  # type: ignore[attr-defined]
    for sink in (pair.near, pair.far):
        assert isinstance(sink.ended.get(timeout=WAIT_S), ConnectionLostError)


def test_many_connections_leave_no_threads_behind(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    before = set(threading.enumerate())
    for _ in range(30):
        connection = pair.dial(sink=Recorder())
        connection.close("next")
        assert connection.join(WAIT_S)
        assert pair.far.opened.get(timeout=WAIT_S).join(WAIT_S)
        pair.connections.clear()
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT_S)
        assert not thread.is_alive(), thread


def test_sending_from_many_threads_keeps_frames_whole(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    near = pair.dial()

    def send(value: int) -> None:
        for _ in range(50):
            near.send({"v": value}, [bytes([value]) * 3000, bytes([value]) * 30_000])

    threads = [threading.Thread(target=send, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        header, body = pair.far.frames.get(timeout=WAIT_S)
        assert body == bytes([header["v"]]) * 33_000
    for thread in threads:
        thread.join()


def test_a_connection_prints_its_state(pair_of: Callable[..., Pair]) -> None:
    near = pair_of().dial()
    assert "open" in repr(near)
    near.close("over")
    assert near.join(WAIT_S)
    assert "closed" in repr(near)


def test_errors_of_admission_other_than_authority_pass_too(pair_of: Callable[..., Pair]) -> None:
    def refuse(peer: Peer) -> None:
        raise TooMany("come back later")

    started_s = time.monotonic()
    with pytest.raises(TooMany, match="come back later"):
        pair_of(far_admit=refuse).dial()
    assert time.monotonic() - started_s < 5
