"""Calls, notifications and streams between two nodes, over both transports."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any

import pytest

from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    CancelledError,
    ConnectionLostError,
    DeadlineError,
    JobError,
    ProtocolError,
    RemoteError,
    SmartnodesError,
)
from smartnodes_core.nodes.base import Node
from smartnodes_core.remote_errors import from_wire, raised_by, to_wire
from smartnodes_core.rpc import RpcEndpoint, allow, is_cancelled
from smartnodes_core.rpc.inbound import MAX_CALLS_PER_PEER, MAX_WAITING_CALLS_PER_PEER
from smartnodes_core.rpc.pace import MAX_DEADLINE_S, MIN_DEADLINE_S
from smartnodes_core.transport.base import Peer

WAIT_S = 10.0


class PictureError(SmartnodesError):
    """An error of a network built on this layer."""

    code = "test-picture"


class Service:
    """What the far node serves in these tests."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.told_cancelled: queue.Queue[bool] = queue.Queue()
        self.noted: list[int] = []
        self.all_noted = threading.Event()
        self.running = 0
        self.most_running = 0
        self.lock = threading.Lock()

    @allow(roles=("user",), max_body_bytes=64 << 20)
    def rpc_echo(
        self, caller: Peer, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[memoryview]]:
        return {**params, "role": caller.role}, [body]

    def rpc_nothing(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        return None

    @allow(roles=("validator",), max_body_bytes=1 << 40)
    def rpc_audit(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        raise AssertionError("reached by somebody who may not call it")

    @allow(max_body_bytes=10)
    def rpc_small(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        return {"num_bytes": len(body)}

    @allow(max_body_bytes=8 << 20, check="check_owner")
    def rpc_large(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        return {"num_bytes": len(body)}

    def check_owner(self, caller: Peer, params: dict[str, Any], num_body_bytes: int) -> None:
        if params.get("owner") != "me":
            raise AuthorityError(f"not yours: no memory for {num_body_bytes} bytes")

    def rpc_wait(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        with self.lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        self.entered.release()
        self.gate.wait(WAIT_S)
        self.told_cancelled.put(is_cancelled())
        with self.lock:
            self.running -= 1
        return {}

    def rpc_note(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        self.noted.append(params["n"])
        if params["n"] % 7 == 3:
            raise JobError("a notification that fails does not stop the next")
        if params["n"] == 299:
            self.all_noted.set()

    def rpc_fail(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        raise {"job": JobError, "picture": PictureError, "bug": ZeroDivisionError}[params["how"]](params["message"])

    def rpc_wrong_result(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Any:
        return 7


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def near(party: Any) -> Node:
    return party.node("user")  # type: ignore[no-any-return]


@pytest.fixture
def far(party: Any, near: Node, service: Service) -> Node:
    node: Node = party.node("worker")
    node.serve(service)
    near.add_address(node.node_key, node.endpoint)
    return node


def test_a_call_brings_back_params_and_body(near: Node, far: Node) -> None:
    reply = near.call(far.node_key, "echo", {"x": [1, b"2", None]}, [b"ab", bytearray(b"cd")])
    assert reply.params == {"x": [1, b"2", None], "role": "user"}
    assert bytes(reply.body) == b"abcd"
    assert near.call(far.node_key, "nothing").params == {}


def test_calls_run_side_by_side_within_the_quota_of_a_peer(near: Node, far: Node, service: Service) -> None:
    num_allowed = MAX_CALLS_PER_PEER + MAX_WAITING_CALLS_PER_PEER
    results: list[object] = []

    def call() -> None:
        try:
            results.append(near.call(far.node_key, "wait", timeout_s=WAIT_S).params)
        except BusyError as error:
            results.append(error)

    threads = [threading.Thread(target=call) for _ in range(num_allowed)]
    for thread in threads:
        thread.start()
    for _ in range(MAX_CALLS_PER_PEER):
        assert service.entered.acquire(timeout=WAIT_S)
    refused = 0
    while not refused:  # until all of them have arrived
        try:
            near.call(far.node_key, "small", timeout_s=0.2)
        except BusyError:
            refused += 1
        except DeadlineError:
            continue
    service.gate.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert service.most_running <= MAX_CALLS_PER_PEER
    assert results.count({}) >= num_allowed - 20
    assert near.call(far.node_key, "nothing").params == {}


def test_a_deadline_names_method_peer_and_seconds_and_the_peer_is_told(near: Node, far: Node, service: Service) -> None:
    with pytest.raises(DeadlineError, match=r"worker [0-9a-f]{8} did not answer wait in 0\.\d+ s"):
        near.call(far.node_key, "wait", timeout_s=0.2)
    near.call(far.node_key, "nothing")  # behind the word that nobody waits
    service.gate.set()
    assert service.told_cancelled.get(timeout=WAIT_S) is True
    assert near._rpc.num_late_replies == 0


def test_a_reply_that_comes_late_all_the_same_is_dropped(near: Node, far: Node) -> None:
    near.call(far.node_key, "nothing")
    connection = far._links.get(near.node_key)
    assert connection is not None
    connection.send({"kind": "reply", "id": 77, "params": {}}, [b"late"])
    far.call(near.node_key, "binding")
    assert near._rpc.num_late_replies == 1


def test_a_cancelled_call_tells_the_handler_and_the_caller_at_once(near: Node, far: Node, service: Service) -> None:
    call = near.begin_call(far.node_key, "wait", timeout_s=60)
    assert service.entered.acquire(timeout=WAIT_S)
    call.cancel()
    call.cancel()
    with pytest.raises(CancelledError, match="wait of worker"):
        call.result()
    near.call(far.node_key, "nothing")  # behind the word that it was cancelled
    service.gate.set()
    assert service.told_cancelled.get(timeout=WAIT_S) is True


def test_a_call_cancelled_before_its_turn_is_never_begun(near: Node, far: Node, service: Service) -> None:
    running = [near.begin_call(far.node_key, "wait", timeout_s=60) for _ in range(MAX_CALLS_PER_PEER)]
    for _ in running:
        assert service.entered.acquire(timeout=WAIT_S)
    waiting = [near.begin_call(far.node_key, "wait", timeout_s=60) for _ in range(MAX_WAITING_CALLS_PER_PEER)]
    for call in waiting:
        call.cancel()
    again = near.begin_call(far.node_key, "nothing", timeout_s=60)  # there is room for it
    with pytest.raises(ProtocolError, match="no method"):
        near.call(far.node_key, "nonesuch")  # answered without a turn, behind all that was cancelled
    service.gate.set()
    assert again.result().params == {}
    for call in running:
        call.result()
    assert not service.entered.acquire(timeout=0.05)


def test_a_call_that_names_no_deadline_has_one_by_what_the_peer_took_before(near: Node, far: Node) -> None:
    assert near.begin_call(far.node_key, "nothing").timeout_s == MAX_DEADLINE_S
    near.call(far.node_key, "nothing")
    assert near.begin_call(far.node_key, "nothing").timeout_s == MIN_DEADLINE_S
    assert near.begin_call(far.node_key, "small").timeout_s == MAX_DEADLINE_S


def test_frames_of_a_later_version_are_skipped_and_unknown_fields_ignored(near: Node, far: Node) -> None:
    near.call(far.node_key, "nothing")
    connection = near._links.get(far.node_key)
    assert connection is not None
    connection.send({"kind": "gossip", "v": 2}, [bytes(100)])
    connection.send({"kind": "notify", "method": "note", "params": {"n": 1}, "priority": 3})
    assert near.call(far.node_key, "nothing").params == {}


@pytest.mark.parametrize("kind", [None, 7, b"call"])
def test_a_frame_of_no_kind_ends_the_connection(near: Node, far: Node, kind: Any) -> None:
    lost = threading.Event()
    near.on_peer_lost(lambda key, reason: lost.set())
    near.call(far.node_key, "nothing")
    connection = near._links.get(far.node_key)
    assert connection is not None
    connection.send({"kind": kind})
    assert lost.wait(WAIT_S)


def test_large_bodies_of_calls_go_over_a_bulk_connection(near: Node, far: Node) -> None:
    body = bytes(range(256)) * (8 << 10)
    reply = near.call(far.node_key, "echo", {"x": 1}, [body], bulk=True)
    assert reply.params == {"x": 1, "role": "user"}
    assert bytes(reply.body) == body
    assert len(near._bulk.all()) == 1


def test_a_lost_connection_fails_waiting_calls_at_once(near: Node, far: Node, service: Service) -> None:
    near.call(far.node_key, "nothing")
    errors: list[Exception] = []

    def call() -> None:
        try:
            near.call(far.node_key, "wait", timeout_s=60)
        except SmartnodesError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert service.entered.acquire(timeout=WAIT_S)
    started_s = time.monotonic()
    far.drop(near.node_key, "a test")
    thread.join(WAIT_S)
    service.gate.set()
    assert time.monotonic() - started_s < 3
    assert isinstance(errors[0], ConnectionLostError)
    assert "before wait was answered" in str(errors[0])


def test_notifications_are_handled_in_the_order_in_which_they_were_sent(
    near: Node, far: Node, service: Service
) -> None:
    for number in range(300):
        near.notify(far.node_key, "note", {"n": number}, [bytes(number)])
    assert service.all_noted.wait(WAIT_S)
    assert service.noted == list(range(300))


@pytest.mark.parametrize(("how", "kind"), [("job", JobError), ("picture", PictureError)])
def test_our_errors_cross_as_the_same_class_and_name_who_raised_them(
    near: Node, far: Node, how: str, kind: type[SmartnodesError]
) -> None:
    with pytest.raises(kind, match=r"worker .*: stage 2 is gone") as caught:
        near.call(far.node_key, "fail", {"how": how, "message": "stage 2 is gone"})
    assert raised_by(caught.value) == far.node_key
    assert raised_by(kind("here")) is None


def test_a_bug_in_a_handler_is_logged_there_and_tells_the_caller_nothing(
    near: Node, far: Node, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(RemoteError, match="internal error in fail") as caught:
        near.call(far.node_key, "fail", {"how": "bug", "message": "secret"})
    assert "secret" not in str(caught.value)
    assert "secret" in caplog.text
    with pytest.raises(RemoteError, match="internal error in wrong_result"):
        near.call(far.node_key, "wrong_result")


def test_an_error_of_unknown_code_is_a_remote_error() -> None:
    error = from_wire({"code": "of-tomorrow", "message": "m"}, "worker 1", b"k")
    assert isinstance(error, RemoteError)
    assert "of-tomorrow: m" in str(error)


def test_paths_are_removed_and_messages_capped() -> None:
    fields = to_wire(JobError("cannot read /etc/smartnodes/key.json" + "x" * 9000))
    assert "<path>" in fields["message"]
    assert "etc" not in fields["message"]
    assert len(fields["message"]) <= 2000
    assert to_wire(JobError("3/4 stages at 10 GB/s"))["message"] == "3/4 stages at 10 GB/s"


def test_every_class_of_the_core_comes_back_as_itself() -> None:
    def descend(kind: type[SmartnodesError]) -> list[type[SmartnodesError]]:
        return [kind, *(each for child in kind.__subclasses__() for each in descend(child))]

    for kind in descend(SmartnodesError):
        if kind.__module__ == "smartnodes_core.errors":
            assert type(from_wire({"code": kind.code, "message": ""}, "p", b"k")) is kind


def test_who_may_not_call_is_refused_before_the_body_is_allocated(
    near: Node, far: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    near.call(far.node_key, "nothing")
    reserved: list[int] = []
    monkeypatch.setattr(far._rpc._inbound, "reserve", lambda *_, **fields: reserved.append(fields["num_bytes"]))
    with pytest.raises(AuthorityError, match="it is for validator nodes"):
        near.call(far.node_key, "audit", {}, [bytes(4 << 20)])
    with pytest.raises(ProtocolError, match="at most 10 bytes, not 11"):
        near.call(far.node_key, "small", {}, [bytes(11)])
    with pytest.raises(ProtocolError, match="no method 'nonesuch'"):
        near.call(far.node_key, "nonesuch", {}, [bytes(100)])
    with pytest.raises(AuthorityError, match="no memory for 4194304 bytes"):
        near.call(far.node_key, "large", {"owner": "somebody"}, [bytes(4 << 20)])
    assert reserved == []


def test_a_large_body_is_taken_from_whom_the_methods_own_check_admits(near: Node, far: Node) -> None:
    assert near.call(far.node_key, "large", {"owner": "me"}, [bytes(4 << 20)]).params == {"num_bytes": 4 << 20}


def test_a_refused_call_leaves_the_connection_in_use(near: Node, far: Node) -> None:
    near.call(far.node_key, "nothing")
    peers = near.peers()
    with pytest.raises(AuthorityError):
        near.call(far.node_key, "audit", {}, [bytes(4 << 20)])
    assert near.call(far.node_key, "small", {}, [b"ok"]).params == {"num_bytes": 2}
    assert near.peers() == peers


def test_a_reply_over_the_callers_cap_is_refused(near: Node, far: Node) -> None:
    with pytest.raises(ProtocolError, match="at most 100 are taken"):
        near.call(far.node_key, "echo", {}, [bytes(101)], max_body_bytes=100)


def test_tensors_stream_into_the_memory_of_the_receiver(near: Node, far: Node) -> None:
    memory = memoryview(bytearray(8 << 20))
    got: list[tuple[dict[str, Any], bool]] = []
    done = threading.Event()

    def receive(peer: Peer, header: dict[str, Any], body: memoryview) -> None:
        got.append((header, body.obj is memory.obj and peer.node_key == near.node_key))
        done.set()

    far.on_stream("activation", lambda peer, header, num_bytes: memory[:num_bytes], receive)
    sent = threading.Event()
    near.stream(far.node_key, "activation", {"step": 3}, [b"\x07" * (8 << 20)], sent.set)
    assert done.wait(WAIT_S)
    assert sent.wait(WAIT_S)
    assert got == [({"step": 3}, True)]
    assert memory[0] == memory[-1] == 7


def test_a_stream_that_the_receiver_does_not_want_is_skipped(near: Node, far: Node) -> None:
    taken = threading.Event()

    def allocate(peer: Peer, header: dict[str, Any], num_bytes: int) -> memoryview:
        if num_bytes > 1:
            raise JobError("that job is over")
        return memoryview(bytearray(num_bytes))

    far.on_stream("activation", allocate, lambda peer, header, body: taken.set())
    near.stream(far.node_key, "activation", {}, [bytes(1 << 20)])
    near.stream(far.node_key, "activation", {}, [b"x"])
    assert taken.wait(WAIT_S)
    assert far._rpc.num_refused_streams == 1


def test_a_stream_of_unknown_topic_ends_the_connection(near: Node, far: Node) -> None:
    lost = threading.Event()
    near.on_peer_lost(lambda key, reason: lost.set())
    near.stream(far.node_key, "nonesuch", {}, [b"x"])
    assert lost.wait(WAIT_S)


def test_calls_whose_bodies_break_off_do_not_count_against_the_peer_for_ever(near: Node, far: Node) -> None:
    near.call(far.node_key, "nothing")
    connection = far._links.get(near.node_key)
    assert connection is not None
    inbound = far._rpc._inbound
    deadline_s = time.monotonic() + WAIT_S
    while inbound._loads and time.monotonic() < deadline_s:  # it answers before it counts the call as done
        threading.Event().wait(0.001)
    for is_call in (True, False):
        inbound.reserve(connection, is_call=is_call, num_bytes=1000)
        assert len(inbound._loads) == 1
        inbound.forget(connection)
        assert inbound._loads == {}
    assert near.call(far.node_key, "nothing").params == {}


def test_what_a_peer_has_been_served_is_not_kept(near: Node, far: Node, service: Service) -> None:
    for number in range(298, 300):
        near.notify(far.node_key, "note", {"n": number})
    near.call(far.node_key, "nothing")
    assert service.all_noted.wait(WAIT_S)
    deadline_s = time.monotonic() + WAIT_S
    while far._rpc._inbound._loads and time.monotonic() < deadline_s:
        threading.Event().wait(0.001)
    assert far._rpc._inbound._loads == {}


def test_names_are_served_once(far: Node, service: Service) -> None:
    with pytest.raises(ValueError, match="already served"):
        far.serve(service)
    endpoint = RpcEndpoint()
    endpoint.on_stream("t", lambda *_: memoryview(b""), lambda *_: None)
    with pytest.raises(ValueError, match="receiver already"):
        endpoint.on_stream("t", lambda *_: memoryview(b""), lambda *_: None)


def test_a_call_that_waited_past_its_deadline_is_not_begun(near: Node, far: Node, service: Service) -> None:
    threads = [
        threading.Thread(target=lambda: near.call(far.node_key, "wait", timeout_s=WAIT_S))
        for _ in range(MAX_CALLS_PER_PEER)
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert service.entered.acquire(timeout=WAIT_S)
    with pytest.raises(DeadlineError):
        near.call(far.node_key, "wait", timeout_s=0.05)
    service.gate.set()
    for thread in threads:
        thread.join(WAIT_S)
    near.call(far.node_key, "nothing")
    assert not service.entered.acquire(timeout=0.1)
