"""Calls, notifications and streams over connections: the sink of a node's frames.

    {"kind": "call",   "version", "id", "method", "params", "timeout_ms"}  + body     answered by
    {"kind": "reply",  "version", "id", "params"}                          + body     or
    {"kind": "error",  "id", "code", "message"}
    {"kind": "cancel", "id"}                                      the caller waits no more; not answered
    {"kind": "notify", "version", "method", "params"}                      + body     not answered
    {"kind": "stream", "version", "topic", "header"}                       + body     not answered; with "piece": see
                                                                                      `striping.py`

Streams go over bulk connections (over the one for calls where there can be no other), notifications over those for
calls, calls over either. Calls from one peer run side by side; its notifications one after the other, as they came.
Unknown fields are ignored and frames of an unknown kind skipped, so that a later version may add some. `version` is
that of the message, method or topic (`versions.py`); what changes of frames themselves, the transport's welcome says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

from smartnodes_core.counters import COUNTERS
from smartnodes_core.errors import ConnectionLostError, PeerFault, ProtocolError, SmartnodesError, VersionError
from smartnodes_core.remote_errors import from_wire
from smartnodes_core.rpc.inbound import InboundCalls
from smartnodes_core.rpc.pace import Pace
from smartnodes_core.rpc.pending import PendingCall, PendingCalls, Reply
from smartnodes_core.rpc.pool import WorkerPool
from smartnodes_core.rpc.serving import Method, StreamReceiver, methods_of
from smartnodes_core.rpc.striping import MIN_STRIPED_BYTES, Transfers, send_striped
from smartnodes_core.rpc.uses import Uses
from smartnodes_core.rpc.versions import Versions, stream_of
from smartnodes_core.transport.base import SEND_TIMEOUT_S, Connection, Peer
from smartnodes_core.wire import Buffer, Header

logger = logging.getLogger(__name__)

MAX_REPLY_BODY_BYTES = 64 << 20
MAX_THREADS = 32


class CallOptions(TypedDict, total=False):
    """How a call is made. `timeout_s`: its deadline, by default one that follows from what the peer took before
    (`pace.py`); `max_body_bytes`: the most that the reply's body may have; `passing`: nobody needs the connection for
    longer than this call (`uses.py`).
    """

    timeout_s: float
    max_body_bytes: int
    passing: bool


class RpcEndpoint:
    """A `FrameSink` that serves peers' calls and makes our own.

    `opened` and `lost` are called on a connection's owner thread as it begins and ends; `lost` after all its calls
    have failed.
    """

    def __init__(
        self,
        name: str = "rpc",
        *,
        max_threads: int = MAX_THREADS,
        opened: Callable[[Connection], None] | None = None,
        lost: Callable[[Connection, Exception | None], None] | None = None,
    ) -> None:
        self._methods: dict[str, Method] = {}
        self._receivers: dict[str, StreamReceiver] = {}
        self._pending = PendingCalls()
        self._pool = WorkerPool(name, max_threads)
        self.versions = Versions()
        self._inbound = InboundCalls(self._pool, self.versions)
        self._transfers = Transfers()
        self.pace = Pace()
        self._uses = Uses()
        self._opened, self._lost = opened, lost
        self.num_late_replies = 0
        self.num_refused_streams = 0

    def __repr__(self) -> str:
        return f"RpcEndpoint({len(self._methods)} methods, {len(self._pending)} pending, {self.num_late_replies} late)"

    # -- our side -----------------------------------------------------------------------------------------------------

    def serve(self, obj: object) -> None:
        """Serves every method of `obj` named `rpc_x` as x. Raises ValueError for a name that is taken."""
        methods = methods_of(obj)
        taken = sorted(set(methods) & set(self._methods))
        if taken:
            raise ValueError(f"already served by another object: {', '.join(taken)}")
        self._methods |= methods

    def on_stream(
        self,
        topic: str,
        allocate: Callable[[Peer, dict[str, Any], int], memoryview],
        receive: Callable[[Peer, dict[str, Any], memoryview], None],
    ) -> None:
        """Takes the streams of `topic`; see `StreamReceiver`. Raises ValueError when the topic is taken."""
        if topic in self._receivers:
            raise ValueError(f"the stream {topic!r} has a receiver already")
        self._receivers[topic] = StreamReceiver(allocate, receive)

    def call(
        self,
        connection: Connection,
        method: str,
        params: dict[str, Any] | None = None,
        body: Sequence[Buffer] = (),
        **options: Unpack[CallOptions],
    ) -> Reply:
        """Calls `method` of the peer and waits for the reply. Not for owner threads.

        `body` must not change until the call returns. Raises DeadlineError at the deadline, ConnectionLostError as
        soon as the connection ends, BusyError, or what the peer raised (`remote_errors.raised_by` names it).
        """
        return self.begin_call(connection, method, params, body, **options).result()

    def begin_call(
        self,
        connection: Connection,
        method: str,
        params: dict[str, Any] | None = None,
        body: Sequence[Buffer] = (),
        **options: Unpack[CallOptions],
    ) -> PendingCall:
        """As `call`, but returns when the call is queued: `result` waits, and has to be called, or `cancel`.

        Several calls are so under way at once without a thread for each.
        """
        self.used(connection, passing=options.get("passing", False))
        peer, num_bytes = connection.peer.node_key, sum(memoryview(part).nbytes for part in body)
        timeout_s = options.get("timeout_s")
        if timeout_s is None:
            timeout_s = self.pace.deadline_s(peer, method, num_bytes)
        pending = PendingCall(connection, method, options.get("max_body_bytes", MAX_REPLY_BODY_BYTES), timeout_s)
        call_id = self._pending.add(pending)
        pending.forget = lambda: self._pending.remove(call_id)
        pending.give_up = lambda: _tell_cancelled(connection, call_id)
        pending.answered = lambda took_s: self.pace.answered(peer, method, took_s, num_bytes)
        pending.missed = lambda: self.pace.missed(peer, method)
        header = {
            "kind": "call",
            "version": self.versions.of(method),
            "id": call_id,
            "method": method,
            "params": params or {},
            "timeout_ms": max(1, int(timeout_s * 1000)),
        }
        try:
            connection.send(header, body, timeout_s=timeout_s)
        except BaseException:
            pending.forget()
            raise
        return pending

    def notify(
        self,
        connection: Connection,
        method: str,
        params: dict[str, Any] | None = None,
        body: Sequence[Buffer] = (),
        on_sent: Callable[[], None] | None = None,
        timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        """Calls `method` without an answer.

        `body` must not change until `on_sent`; see `Connection.send` for the errors.
        """
        version = self.versions.of(method)
        header = {"kind": "notify", "version": version, "method": method, "params": params or {}}
        connection.send(header, body, on_sent, timeout_s)

    def stream(
        self,
        connections: Sequence[Connection],
        topic: str,
        header: dict[str, Any],
        body: Sequence[Buffer],
        on_sent: Callable[[], None] | None = None,
        timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        """Sends a tensor to the peer's receiver of `topic` over bulk connections, a large one in pieces over all of
        them. `body` must not change until `on_sent`.
        """
        version = self.versions.of(stream_of(topic))
        frame = {"kind": "stream", "version": version, "topic": topic, "header": header}
        if len(connections) > 1 and sum(memoryview(part).nbytes for part in body) >= MIN_STRIPED_BYTES:
            send_striped(connections, frame, body, on_sent, timeout_s)
        else:
            connections[0].send(frame, body, on_sent, timeout_s)

    def used(self, connection: Connection, *, passing: bool) -> bool:
        """Takes note of what a connection is used for; False where it is closed: see `Uses`."""
        return self._uses.used(connection, passing=passing)

    def close_idle(self, connections: Sequence[Connection], idle_s: float, close: Callable[[Connection], None]) -> int:
        """See `Uses`."""
        return self._uses.close_idle(connections, idle_s, lambda each: bool(self._pending.of(each)), close)

    def stop(self, timeout_s: float = 2.0) -> None:
        """Drops waiting handlers and waits for running ones."""
        self._pool.stop(timeout_s)

    # -- the peers' side: FrameSink -----------------------------------------------------------------------------------

    def on_open(self, connection: Connection) -> None:
        """See FrameSink."""
        if self._opened is not None:
            self._opened(connection)

    def allocate(self, connection: Connection, header: Header, num_bytes: int) -> memoryview | None:
        """Checks a frame by its header alone; None, after an error reply where one is due, has the body skipped."""
        kind = header.get("kind")
        no_streams = not (connection.peer.bulk or getattr(connection, "introduced", False))
        if (kind == "notify" and connection.peer.bulk) or (kind == "stream" and no_streams):
            raise ProtocolError(f"{connection.peer} sent a {kind} on a connection of the other kind")
        if kind in ("call", "notify"):
            return self._allocate_call(connection, header, num_bytes)
        if kind == "stream":
            return self._allocate_stream(connection.peer, header, num_bytes)
        if kind in ("reply", "error"):
            return self._allocate_reply(connection, header, num_bytes)
        if kind == "cancel" and type(header.get("id")) is int:
            self._inbound.cancel(connection, header["id"])
        elif not isinstance(kind, str):
            raise ProtocolError(f"{connection.peer} sent a frame of no kind")
        return None

    def on_frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        """See FrameSink."""
        kind = header["kind"]
        if kind == "stream":
            self._receive_stream(connection.peer, header, body)
        elif kind in ("reply", "error"):
            self._settle(connection, header, body)
        else:
            method = self._methods[header["method"]]
            COUNTERS.add("calls_served", method.name)
            self.used(connection, passing=method.rule.passing)
            self._inbound.take(connection, method, header, body)

    def on_closed(self, connection: Connection, error: Exception | None) -> None:
        """See FrameSink."""
        reason = str(error) if error is not None else "closed by this side"
        for pending in self._pending.of(connection):
            message = f"the connection to {connection.peer} ended before {pending.method} was answered: {reason}"
            pending.settle(None, ConnectionLostError(message))
        self._inbound.forget(connection)
        if connection.peer.bulk:
            self._transfers.forget(connection.peer)
        if self._lost is not None:
            self._lost(connection, error)

    def _allocate_call(self, connection: Connection, header: Header, num_bytes: int) -> memoryview | None:
        name, params, is_call = header.get("method"), header.get("params"), header["kind"] == "call"
        if not isinstance(name, str) or not isinstance(params, dict) or (is_call and type(header.get("id")) is not int):
            raise ProtocolError(f"{connection.peer} sent a malformed {header['kind']}")
        if is_call and not self._inbound.is_new(connection, header["id"]):
            logger.info("%s sent the call %d of %s again: it runs once", connection.peer, header["id"], name[:64])
            return None
        try:
            method = self._methods.get(name)
            if method is None:
                raise ProtocolError(f"there is no method {name[:64]!r} here")
            self.versions.check(connection.peer, name, header)
            method.check(connection.peer, params, num_bytes)
            self._inbound.reserve(connection, is_call=is_call, num_bytes=num_bytes)
        except SmartnodesError as error:
            if not is_call:
                logger.warning("dropped a notification from %s: %s", connection.peer, error)
            else:
                self._inbound.reply_error(connection, header["id"], name, error)
            return None
        return memoryview(bytearray(num_bytes))

    def _allocate_stream(self, peer: Peer, header: Header, num_bytes: int) -> memoryview | None:
        topic, fields = header.get("topic"), header.get("header")
        if not isinstance(topic, str) or not isinstance(fields, dict):
            raise ProtocolError(f"{peer} sent a malformed stream frame")
        receiver = self._receivers.get(topic)
        try:
            if receiver is None:
                raise ProtocolError(f"nobody here takes the stream {topic[:64]!r}")
            self.versions.check(peer, stream_of(topic), header)
            if "piece" in header:
                return self._transfers.allocate(peer, header, num_bytes, receiver.allocate)
            return receiver.allocate(peer, fields, num_bytes)
        except ProtocolError:
            raise
        except SmartnodesError as error:
            self.num_refused_streams += 1
            level = logging.WARNING if isinstance(error, PeerFault) else logging.INFO
            logger.log(level, "skipped a tensor of %d bytes from %s: %s", num_bytes, peer, error)
            return None

    def _receive_stream(self, peer: Peer, header: Header, body: memoryview) -> None:
        receiver = self._receivers[header["topic"]]
        try:
            if "piece" in header:
                whole = self._transfers.arrived(peer, header)
                if whole is None or whole.memory is None:
                    return
                body = whole.memory
            receiver.receive(peer, header["header"], body)
        except ProtocolError:
            raise
        except SmartnodesError as error:
            self.num_refused_streams += 1
            logger.warning("a tensor of %d bytes from %s was refused: %s", body.nbytes, peer, error)

    def _allocate_reply(self, connection: Connection, header: Header, num_bytes: int) -> memoryview | None:
        pending = self._pending.get(connection, header.get("id"))
        if pending is None:
            self.num_late_replies += 1
            return None
        if num_bytes > pending.max_body_bytes:
            found = f"{connection.peer} answered {pending.method} with {num_bytes} bytes"
            pending.settle(None, ProtocolError(f"{found}, at most {pending.max_body_bytes} are taken"))
            return None
        return memoryview(bytearray(num_bytes))

    def _settle(self, connection: Connection, header: Header, body: memoryview) -> None:
        pending = self._pending.get(connection, header["id"])
        if pending is None:  # its deadline passed while the body came in
            self.num_late_replies += 1
            return
        if header["kind"] == "error":
            pending.settle(None, from_wire(header, str(connection.peer), connection.peer.node_key))
            return
        params = header.get("params")
        if not isinstance(params, dict):
            raise ProtocolError(f"{connection.peer} sent a malformed reply to {pending.method}")
        try:
            self.versions.check(connection.peer, pending.method, header)
        except VersionError as error:
            pending.settle(None, error)
            return
        pending.settle(Reply(params, body), None)


def _tell_cancelled(connection: Connection, call_id: int) -> None:
    try:
        connection.send({"kind": "cancel", "id": call_id}, timeout_s=0.0)
    except SmartnodesError as error:
        logger.debug("%s is not told that a call was given up: %s", connection.peer, error)
