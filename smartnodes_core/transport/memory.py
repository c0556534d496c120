"""The in-process twin of `tls.py`: the same checks, threads, order, caps and errors, no sockets. Most tests run on it.

Bodies are copied once, into the memory that the receiving sink allocates, as a socket would. `MemoryHub` is the
network: it knows who listens where, and can cut connections.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from smartnodes_core.errors import (
    ConnectionLostError,
    DeadlineError,
    PeerUnreachableError,
    PortInUseError,
    SmartnodesError,
)
from smartnodes_core.identity import Identity
from smartnodes_core.records import SignedBinding
from smartnodes_core.remote_errors import from_wire, to_wire
from smartnodes_core.transport.base import LINGER_S, SEND_TIMEOUT_S, Admit, FrameSink, Peer, split_endpoint
from smartnodes_core.transport.certificate import Expectations, check_expected, check_peer
from smartnodes_core.transport.faults import Cut, Faults, FaultyLine
from smartnodes_core.transport.outbox import Outbox, OutFrame
from smartnodes_core.wire import Buffer, FrameReader, Header, byte_views, encode_prefix_and_header

logger = logging.getLogger(__name__)


class MemoryHub:
    """A network inside one process; with `faults` a bad one."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults
        self._lock = threading.Lock()
        self._listeners: dict[str, MemoryListener] = {}
        self._ports = itertools.count(40000)
        self._connections: list[MemoryConnection] = []

    def _add_listener(self, endpoint: str, listener: MemoryListener) -> str:
        host, port = split_endpoint(endpoint)
        with self._lock:
            taken = f"{host}:{port or next(self._ports)}"
            if taken in self._listeners:
                raise PortInUseError(f"port {port} on {host} is taken: choose another port (0 takes any free one)")
            self._listeners[taken] = listener
        return taken

    def _remove_listener(self, endpoint: str) -> None:
        with self._lock:
            self._listeners.pop(endpoint, None)

    def _find(self, endpoint: str) -> MemoryListener:
        split_endpoint(endpoint)
        with self._lock:
            listener = self._listeners.get(endpoint)
        if listener is None:
            raise PeerUnreachableError(f"nobody can be reached at {endpoint}: Connection refused")
        return listener

    def _add_connection(self, connection: MemoryConnection) -> None:
        with self._lock:
            self._connections = [each for each in self._connections if not each.closed]
            self._connections.append(connection)

    def cut(self, node_key: bytes) -> int:
        """Breaks all connections of a node, as a pulled cable would; returns how many ends were cut."""
        with self._lock:
            cut = [each for each in self._connections if node_key in (each.peer.node_key, each.own_key)]
        for connection in cut:
            connection.break_off(ConnectionLostError(f"the connection to {connection.peer} broke: cut"))
        return len(cut)


class MemoryTransport:
    """A node's access to a `MemoryHub`; see `transport.base.Transport`."""

    def __init__(self, hub: MemoryHub, identity: Identity, signed_binding: SignedBinding | None) -> None:
        self.hub, self.node_key = hub, identity.node_key
        self.renew(signed_binding)

    def renew(self, signed_binding: SignedBinding | None) -> None:
        """See `transport.base.Transport.renew`."""
        self.signed_binding, self.expectations = signed_binding, Expectations.of(signed_binding)

    def listen(self, endpoint: str, sink: FrameSink, admit: Admit) -> MemoryListener:
        """See `transport.base.Transport.listen`."""
        return MemoryListener(self, endpoint, sink, admit)

    def dial(
        self,
        endpoint: str,
        sink: FrameSink,
        admit: Admit,
        expected_node_key: bytes | None = None,
        timeout_s: float = 10.0,
        *,
        bulk: bool = False,
    ) -> MemoryConnection:
        """See `transport.base.Transport.dial`."""
        deadline_s = time.monotonic() + timeout_s
        listener = self.hub._find(endpoint)
        server = listener.transport
        peer = check_peer(server.node_key, server.signed_binding, self.expectations, endpoint, bulk=bulk)
        check_expected(peer, expected_node_key)
        admit(peer)
        answer: Future[Peer] = Future()
        threading.Thread(target=self._knock, args=(listener, bulk, answer), name="memory admit", daemon=True).start()
        try:
            dialler = answer.result(max(0.0, deadline_s - time.monotonic()))
        except SmartnodesError as error:
            raise from_wire(dict(to_wire(error)), f"{peer} at {endpoint} refused us", peer.node_key) from None
        except FutureTimeout:
            raise DeadlineError(f"the checks on {endpoint} did not end in {timeout_s:g} s") from None
        faults = self.hub.faults
        near = MemoryConnection(self.node_key, peer, sink, dialled=True, line=faults.line() if faults else None)
        far = MemoryConnection(
            server.node_key, dialler, listener.sink, dialled=False, line=faults.line() if faults else None
        )
        near.attach(far)
        far.attach(near)
        for connection in (near, far):
            self.hub._add_connection(connection)
        far.start()
        near.start()
        return near

    def _knock(self, listener: MemoryListener, bulk: bool, answer: Future[Peer]) -> None:
        """The other side's checks, which may take longer than the dialler waits."""
        try:
            own_endpoint, expectations = f"memory:{self.node_key.hex()[:8]}", listener.transport.expectations
            dialler = check_peer(self.node_key, self.signed_binding, expectations, own_endpoint, bulk=bulk)
            listener.admit(dialler)
            answer.set_result(dialler)
        except BaseException as error:
            answer.set_exception(error)


class MemoryListener:
    """See `transport.base.Listener`."""

    def __init__(self, transport: MemoryTransport, endpoint: str, sink: FrameSink, admit: Admit) -> None:
        self.transport, self.sink, self.admit = transport, sink, admit
        self.endpoint = transport.hub._add_listener(endpoint, self)

    def close(self) -> None:
        """Stops accepting. Harmless when repeated."""
        self.transport.hub._remove_listener(self.endpoint)


class MemoryConnection:
    """One end. What this end sends waits in `_outbox` until the other end's owner thread has copied it."""

    def __init__(
        self, own_key: bytes, peer: Peer, sink: FrameSink, *, dialled: bool, line: FaultyLine | None = None
    ) -> None:
        self.own_key, self.peer, self.dialled, self._line = own_key, peer, dialled, line
        self._sink = sink
        self._outbox = Outbox()
        self._reader = FrameReader(self._allocate)
        self._other: MemoryConnection = self
        self._closing = False
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"memory {peer}", daemon=True)

    def __repr__(self) -> str:
        return f"MemoryConnection({self.peer}, {'closed' if self.closed else 'open'}, {len(self._outbox)} queued)"

    @property
    def closed(self) -> bool:
        return self._closing

    def attach(self, other: MemoryConnection) -> None:
        """Names the other end."""
        self._other = other

    def start(self) -> None:
        """Starts the owner thread."""
        self._thread.start()

    def send(
        self,
        header: dict[str, Any],
        body: Sequence[Buffer] = (),
        on_sent: Callable[[], None] | None = None,
        timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        views = byte_views(body)
        num_body_bytes = sum(view.nbytes for view in views)
        head = encode_prefix_and_header(header, num_body_bytes)
        frame = OutFrame(head, views, on_sent, len(head) + num_body_bytes)
        on_owner = threading.current_thread() is self._thread
        self._outbox.put(frame, 0.0 if on_owner else timeout_s, str(self.peer))

    def close(self, reason: str) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._ended.set()
        self._outbox.close(reason)
        incoming = self._other._outbox  # wakes our owner thread, which lets the other end read what is queued
        incoming.close(f"{self._other.peer} closed the connection")
        incoming.clear()

    def break_off(self, error: Exception) -> None:
        """Ends this end with `error`, dropping what is queued both ways; the other end sees a broken connection."""
        with self._lock:
            if self._closing:
                return
            self._closing, self._error = True, error
        self._ended.set()
        for outbox in (self._outbox, self._other._outbox):
            outbox.close(str(error))
            outbox.clear()

    def join(self, timeout_s: float) -> bool:
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _allocate(self, header: Header, num_bytes: int) -> memoryview | None:
        return self._sink.allocate(self, header, num_bytes)

    def _run(self) -> None:
        incoming = self._other._outbox
        try:
            self._sink.on_open(self)
            while (frame := incoming.take(wait=True)) is not None:
                # a frame that is overtaken is delivered behind the next, if there is one by now
                behind = incoming.take() if self._line is not None and self._line.overtaken() else None
                for each in (frame,) if behind is None else (behind, frame):
                    self._deliver_frame(each)
            if self._closing and self._error is None:
                self._outbox.wait_empty(LINGER_S)
            else:
                self.break_off(ConnectionLostError(f"{self.peer} closed the connection"))
        except SmartnodesError as error:
            self.break_off(error)
        except Exception as error:
            logger.exception("connection to %s: a frame's receiver failed", self.peer)
            self.break_off(error)
        self._outbox.clear()
        try:
            self._sink.on_closed(self, self._error)
        except Exception:
            logger.exception("connection to %s: a receiver failed at its end", self.peer)

    def _deliver_frame(self, frame: OutFrame) -> None:
        pieces = [memoryview(frame.head), *frame.body]
        try:
            if self._line is None:
                self._deliver(pieces)
                return
            for _ in range(self._line.copies(frame.num_bytes, self._ended)):
                self._deliver(pieces)
        except Cut as cut:
            self._deliver([memoryview(b"".join(pieces))[: cut.num_bytes]])
            raise ConnectionLostError(f"the connection to {self.peer} broke: {cut}") from None
        finally:
            self._other._outbox.finish(frame)

    def _deliver(self, pieces: list[memoryview]) -> None:
        """Copies a frame as if it came from a socket, so that caps and refusals are the reader's own."""
        for piece in pieces:
            done = 0
            while done < len(piece):
                target = self._reader.target()
                count = min(len(target), len(piece) - done)
                target[:count] = piece[done : done + count]
                done += count
                frame = self._reader.advance(count)
                if frame is not None:
                    self._sink.on_frame(self, frame.header, frame.body)
