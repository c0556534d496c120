"""One connection: its owner thread shakes hands, verifies, then pumps frames both ways until either side ends it.

Only the owner thread touches the TLS object, or the sealed stream that takes its place on a bulk connection. It sleeps
in poll() on the socket and on a pipe through which senders wake it; nothing is polled on a clock. Sending never waits
for receiving or the reverse, so two large bodies may cross.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from OpenSSL import SSL

from smartnodes_core.errors import ConnectionLostError, ProtocolError, SmartnodesError
from smartnodes_core.transport.base import LINGER_S, SEND_TIMEOUT_S, Peer
from smartnodes_core.transport.handshake import ALPN_BULK, ALPN_CALLS, Handshake, Terms
from smartnodes_core.transport.outbox import Outbox, OutFrame
from smartnodes_core.transport.sealed import MAX_RECORD_BYTES, SealedStream, secrets_of
from smartnodes_core.transport.welcome import no_body
from smartnodes_core.usage import USAGE
from smartnodes_core.wire import Buffer, FrameReader, Header, byte_views, encode_prefix_and_header

logger = logging.getLogger(__name__)

_RECORD_BYTES = 16 << 10  # a TLS record: what one read can give
_WRITE_BYTES = MAX_RECORD_BYTES  # handed on at a time, so that reading gets its turn
_STALL_S = 120.0  # a frame that is begun brings _STALL_BYTES, or its end, in as much waiting
_STALL_BYTES = 64 << 10
_READ_BYTES = 1 << 20  # read in a row, so that writing gets its turn


class TlsConnection:
    """A `transport.base.Connection` over a connected TCP socket.

    `on_ready(connection, error)` is called once: admitted by both sides (None), or failed. `on_ended` is called last.
    """

    def __init__(
        self,
        tcp: socket.socket,
        context: SSL.Context,
        terms: Terms,
        *,
        dialled: bool,
        endpoint: str,
        on_ready: Callable[[TlsConnection, Exception | None], None],
        on_ended: Callable[[TlsConnection], None],
    ) -> None:
        self.dialled = dialled
        self._tcp, self._terms, self._endpoint = tcp, terms, endpoint
        self._on_ready, self._on_ended = on_ready, on_ended
        self._tls = SSL.Connection(context, tcp)
        if dialled:
            self._tls.set_connect_state()
            self._tls.set_alpn_protos([ALPN_BULK if terms.bulk else ALPN_CALLS])
        else:
            self._tls.set_accept_state()
        self._stream: SSL.Connection | SealedStream = self._tls
        self._peer: Peer | None = None
        self._reader = FrameReader(self._allocate)
        self._open = False
        self._ended = False
        self._outbox = Outbox()
        self._sending: list[OutFrame] = []  # small ones go out together
        self._unsent: list[memoryview] = []  # of `_sending`
        self._record = memoryview(bytearray(_RECORD_BYTES))
        self._max_read_bytes = _RECORD_BYTES
        self._stalled_s = 0.0  # waited within a frame
        self._stalled_bytes = 0  # and what came meanwhile
        self._close_by_s: float | None = None
        self._asleep = True  # so that closing interrupts the handshake
        self._wake_lock = threading.Lock()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poll = select.poll()
        self._poll.register(self._wake_read, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name=f"tls {endpoint}", daemon=True)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open" if self._open else "handshake"
        return f"TlsConnection({self._peer or self._endpoint}, {state}, {len(self._outbox)} queued, {self._reader!r})"

    @property
    def peer(self) -> Peer:
        if self._peer is None:
            raise ConnectionLostError(f"{self._endpoint} has not shown who it is")
        return self._peer

    @property
    def introduced(self) -> bool:
        """Whether this connection came about by introduction: it carries tensors too."""
        return self._terms.introduced

    @property
    def local_address(self) -> tuple[str, int] | None:
        """Host and port from which this connection goes out; None once it has ended."""
        try:
            host, port = self._tcp.getsockname()[:2]
        except OSError:
            return None
        return str(host), int(port)

    @property
    def closed(self) -> bool:
        return self._ended or self._close_by_s is not None

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
        self._wake()

    def close(self, reason: str) -> None:
        if self._close_by_s is None:
            self._close_by_s = time.monotonic() + LINGER_S
        self._outbox.close(reason)
        self._wake()

    def join(self, timeout_s: float) -> bool:
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        # the owner sets `_asleep` before its last look at the queue, and here it is read after the queue was filled
        if not self._asleep:
            return
        with self._wake_lock:
            if self._ended:
                return
            try:
                os.write(self._wake_write, b"\0")
            except BlockingIOError:
                return  # a full pipe wakes as well

    # -- the owner thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: Exception | None = None
        try:
            self._tcp.setblocking(False)
            self._poll.register(self._tcp, select.POLLIN)
            handshake = Handshake(self._tcp, self._tls, self._poll, self._terms, self._endpoint, lambda: self.closed)
            self._peer = handshake.run(self._reader)
            if self._peer.bulk:
                self._stream = SealedStream(self._tcp, secrets_of(self._tls), dialled=self.dialled)
                self._max_read_bytes = MAX_RECORD_BYTES
            self._asleep = False
            self._open = True
            self._on_ready(self, None)
            self._terms.sink.on_open(self)
            self._pump()
        except SmartnodesError as found:
            error = found
        except (OSError, SSL.Error) as found:
            error = _lost(found, self._peer or self._endpoint)
        except Exception as found:
            logger.exception("connection to %s: a frame's receiver failed", self._peer or self._endpoint)
            error = found
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if error is not None and self._close_by_s is not None:
            error = None  # we were closing anyway
        try:
            self._stream.shutdown()
        except (SSL.Error, OSError):
            logger.debug("%s was gone before the goodbye", self._endpoint)
        self._tcp.close()
        with self._wake_lock:
            self._ended = True
            os.close(self._wake_read)
            os.close(self._wake_write)
        self._outbox.close(str(error) if error else "closed by this side")
        self._finish_sending()
        self._outbox.clear()
        try:
            if self._open:
                self._terms.sink.on_closed(self, error)
            else:
                self._on_ready(self, error or ConnectionLostError(f"{self._endpoint}: closed during the handshake"))
        except Exception:
            logger.exception("connection to %s: a receiver failed at its end", self._peer or self._endpoint)
        self._on_ended(self)

    def _pump(self) -> None:
        while True:
            more_to_read = self._read_some()
            blocked = self._write_some()
            idle = blocked or not len(self._outbox)
            if self._close_by_s is not None and (not len(self._outbox) or time.monotonic() >= self._close_by_s):
                return
            if more_to_read or not idle:
                continue
            self._sleep(blocked)

    def _sleep(self, blocked: bool) -> None:
        """Until the socket is ready or a sender wakes us."""
        self._poll.modify(self._tcp, select.POLLIN | select.POLLOUT if blocked else select.POLLIN)
        self._asleep = True
        try:
            if len(self._outbox) and not blocked:
                return  # put between the last look and `_asleep`
            closing = self._close_by_s
            began_s = time.monotonic()
            timeout_ms = None if closing is None else max(0.0, closing - began_s) * 1000
            if closing is not None and not len(self._outbox):
                return
            if closing is None and not self._reader.between_frames:
                timeout_ms = max(0.0, _STALL_S - self._stalled_s) * 1000
            ready = self._poll.poll(timeout_ms)
        finally:
            self._asleep = False
        self._watch_stall(time.monotonic() - began_s)
        if any(descriptor == self._wake_read for descriptor, _ in ready):
            os.read(self._wake_read, 4096)

    def _watch_stall(self, waited_s: float) -> None:
        """Ends a connection that holds the memory of a frame which hardly comes on."""
        if self._reader.between_frames or self._stalled_bytes >= _STALL_BYTES:
            self._stalled_s, self._stalled_bytes = 0.0, 0
            return
        self._stalled_s += waited_s
        if self._stalled_s >= _STALL_S:
            raise ProtocolError(f"{self._peer} began a frame and sent {self._stalled_bytes} bytes in {_STALL_S:g} s")

    def _read_some(self) -> bool:
        """Reads what has arrived, delivering whole frames. True when it stopped only to let writing have its turn."""
        num_bytes = 0
        reader, sink = self._reader, self._terms.sink
        while num_bytes < _READ_BYTES:
            target = reader.target()
            few = len(target) < _RECORD_BYTES  # more of the record may follow what is expected next
            room = self._record if few else target
            try:
                with USAGE.timed("encryption"):
                    count = self._stream.recv_into(room, min(len(room), self._max_read_bytes))
            except SSL.WantReadError:
                return False
            USAGE.add("received_bytes", count)
            self._stalled_bytes += count
            num_bytes += count
            if few:
                for frame in reader.feed(self._record[:count]):
                    sink.on_frame(self, frame.header, frame.body)
            elif (whole := reader.advance(count)) is not None:
                sink.on_frame(self, whole.header, whole.body)
        return True

    def _write_some(self) -> bool:
        """Sends up to _READ_BYTES. True when the socket takes no more for now."""
        num_bytes = 0
        while num_bytes < _READ_BYTES:
            if not self._sending:
                self._sending = self._outbox.take_together(_RECORD_BYTES)
                if not self._sending:
                    return False
                self._unsent = _pieces(self._sending)
            piece = self._unsent[0][:_WRITE_BYTES]
            try:
                with USAGE.timed("encryption"):
                    count = self._stream.send(piece)
            except SSL.WantWriteError:
                return True  # the same piece comes again: its first records are sealed already
            USAGE.add("sent_bytes", count)
            num_bytes += count
            if count == len(self._unsent[0]):
                del self._unsent[0]
                if not self._unsent:
                    self._finish_sending()
            else:
                self._unsent[0] = self._unsent[0][count:]
        return False

    def _finish_sending(self) -> None:
        frames, self._sending, self._unsent = self._sending, [], []
        for frame in frames:
            self._outbox.finish(frame)

    def _allocate(self, header: Header, num_bytes: int) -> memoryview | None:
        if not self._open:
            return no_body(header, num_bytes)
        return self._terms.sink.allocate(self, header, num_bytes)


def _pieces(frames: list[OutFrame]) -> list[memoryview]:
    """Small frames in one piece, hence one packet; of large ones, which go alone, no byte is copied."""
    parts: list[Buffer] = []
    for frame in frames:
        parts += [frame.head, *frame.body]
    if len(parts) > 1 and sum(frame.num_bytes for frame in frames) <= _RECORD_BYTES:
        return [memoryview(b"".join(parts))]
    return [memoryview(part) for part in parts]


def _lost(error: Exception, peer: Peer | str) -> Exception:
    """What a failed socket or TLS call means to us."""
    if isinstance(error, SSL.ZeroReturnError):
        return ConnectionLostError(f"{peer} closed the connection")
    if isinstance(error, SSL.SysCallError):
        return ConnectionLostError(f"the connection to {peer} broke: {error.args[-1]}")
    if isinstance(error, SSL.Error):
        reasons = ", ".join(str(reason[-1]) for reason in (error.args[0] if error.args else []))
        return ProtocolError(f"{peer} broke the rules of TLS: {reasons or 'no reason given'}")
    return ConnectionLostError(f"the connection to {peer} broke: {error}")
