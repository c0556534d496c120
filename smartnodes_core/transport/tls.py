"""Connections over TCP with TLS 1.3, both sides proving their node keys (see `certificate.py`).

Neighbours: `tls_connection.py` is one connection, `sealed.py` what a bulk one sends once its TLS handshake is done,
`memory.py` the twin that most tests use. No resumption, no early data: every handshake proves its keys afresh.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from OpenSSL import SSL

from smartnodes_core.counters import COUNTERS
from smartnodes_core.errors import ConfigError, DeadlineError, PortInUseError
from smartnodes_core.identity import Identity
from smartnodes_core.records import SignedBinding
from smartnodes_core.transport.base import Admit, FrameSink, join_endpoint, split_endpoint
from smartnodes_core.transport.certificate import Expectations, make_certificate
from smartnodes_core.transport.handshake import ALPN_BULK, ALPN_CALLS, Terms
from smartnodes_core.transport.sockets import check_congestion_control, tune
from smartnodes_core.transport.tcp import open_tcp
from smartnodes_core.transport.tls_connection import TlsConnection

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0
MAX_PENDING_HANDSHAKES = 128
MAX_PENDING_PER_HOST = 32  # so that a flood from one address leaves room for others
_SUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
_SSL_MODE_ENABLE_PARTIAL_WRITE = 1


class TlsTransport:
    """Dials and listens as `identity`, showing `signed_binding`; peers' bindings must be for the same chain and
    network.
    """

    def __init__(
        self,
        identity: Identity,
        signed_binding: SignedBinding | None,
        *,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        max_pending_handshakes: int = MAX_PENDING_HANDSHAKES,
        max_pending_per_host: int = MAX_PENDING_PER_HOST,
        congestion_control: str = "",
    ) -> None:
        """`congestion_control` is TCP's, by its name in the kernel; empty leaves the system's. Raises ConfigError."""
        check_congestion_control(congestion_control)
        self.congestion_control = congestion_control
        self.handshake_timeout_s = handshake_timeout_s
        self.max_pending_handshakes = max_pending_handshakes
        self.max_pending_per_host = max_pending_per_host
        self._identity = identity
        self.renew(signed_binding)

    def renew(self, signed_binding: SignedBinding | None) -> None:
        """See `transport.base.Transport.renew`. The TLS key is a new one too."""
        self.expectations = Expectations.of(signed_binding)
        self.context = _make_context(self._identity, signed_binding)

    def listen(self, endpoint: str, sink: FrameSink, admit: Admit) -> TlsListener:
        """See `transport.base.Transport.listen`."""
        host, port = split_endpoint(endpoint)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            if os.name == "posix":
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((host, port))
            server.listen(256)
        except OSError as error:
            server.close()
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(
                    f"port {port} on {host} is taken by another program: "
                    "end it, or choose another port (0 takes any free one)"
                ) from None
            raise ConfigError(f"cannot listen on {endpoint}: {error.strerror or error}") from None
        listener = TlsListener(self, server, sink, admit)
        listener.start()
        return listener

    def dial(
        self,
        endpoint: str,
        sink: FrameSink,
        admit: Admit,
        expected_node_key: bytes | None = None,
        timeout_s: float = 10.0,
        *,
        bulk: bool = False,
    ) -> TlsConnection:
        """See `transport.base.Transport.dial`."""
        deadline_s = time.monotonic() + timeout_s
        tcp = open_tcp(endpoint, timeout_s)
        terms = Terms(sink, admit, self.expectations, expected_node_key, deadline_s, bulk)
        return self._over(tcp, endpoint, terms, dialled=True)

    def adopt(
        self,
        tcp: socket.socket,
        sink: FrameSink,
        admit: Admit,
        expected_node_key: bytes | None,
        *,
        dialled: bool,
        endpoint: str,
        deadline_s: float,
    ) -> TlsConnection:
        """A connection for calls over a TCP connection that came about in some other way: through a hole that was
        punched, or a relay. Of the two sides one has `dialled`. Ends by `deadline_s` of the monotonic clock. Raises as
        `dial` does.
        """
        terms = Terms(sink, admit, self.expectations, expected_node_key, deadline_s, bulk=False, introduced=True)
        return self._over(tcp, endpoint, terms, dialled=dialled)

    def _over(self, tcp: socket.socket, endpoint: str, terms: Terms, *, dialled: bool) -> TlsConnection:
        tune(tcp, self.congestion_control)
        ready: Future[TlsConnection] = Future()
        connection = TlsConnection(
            tcp,
            self.context,
            terms,
            dialled=dialled,
            endpoint=endpoint,
            on_ready=lambda made, error: ready.set_exception(error) if error else ready.set_result(made),
            on_ended=lambda _: None,
        )
        connection.start()
        try:
            # the owner thread keeps the deadline
            return ready.result(timeout=max(0.0, terms.deadline_s - time.monotonic()) + 1.0)
        except FutureTimeout:
            connection.close("not admitted in time")
            raise DeadlineError(f"the checks on {endpoint} did not end in time") from None


class TlsListener:
    """Accepts connections until closed; each shakes hands on its own thread, at most `max_pending_handshakes` at
    once, and `max_pending_per_host` from one address.
    """

    def __init__(self, transport: TlsTransport, server: socket.socket, sink: FrameSink, admit: Admit) -> None:
        self._transport, self._server, self._sink, self._admit = transport, server, sink, admit
        self.endpoint = join_endpoint(*server.getsockname()[:2])
        self._closed = False
        self._pending: dict[TlsConnection, str] = {}  # with the addresses that they come from
        self._lock = threading.Lock()
        self.num_refused = 0
        self._thread = threading.Thread(target=self._accept_all, name=f"listen {self.endpoint}", daemon=True)

    def __repr__(self) -> str:
        return f"TlsListener({self.endpoint}, {len(self._pending)} handshakes, {self.num_refused} refused)"

    def start(self) -> None:
        """Starts accepting."""
        self._thread.start()

    def close(self) -> None:
        """Stops accepting and drops unfinished handshakes; established connections stay. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # not connected, says the kernel, and wakes accept() all the same
            self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()
        with self._lock:
            pending = list(self._pending)
        for connection in pending:
            connection.close("no longer listening")
        for connection in pending:
            connection.join(2.0)

    def _accept_all(self) -> None:
        while not self._closed:
            try:
                tcp, address = self._server.accept()
            except OSError as error:
                if self._closed:
                    return
                logger.warning("accepting on %s: %s", self.endpoint, error)
                if error.errno in (errno.EBADF, errno.EINVAL):
                    return
                continue
            try:
                self.take(tcp, join_endpoint(*address[:2]))
            except (OSError, RuntimeError) as error:  # no descriptors or threads left, or the peer is gone again
                logger.warning("a connection from %s could not be taken: %s", address, error)
                tcp.close()

    def take(self, tcp: socket.socket, endpoint: str) -> None:
        """Has a connected socket shake hands as one that was accepted; `endpoint` is how messages call it."""
        host = endpoint.rpartition(":")[0]
        with self._lock:
            full = len(self._pending) >= self._transport.max_pending_handshakes
            crowded = list(self._pending.values()).count(host) >= self._transport.max_pending_per_host
        if full or crowded:
            self.num_refused += 1
            tcp.close()
            return
        tune(tcp, self._transport.congestion_control)
        deadline_s = time.monotonic() + self._transport.handshake_timeout_s
        connection = TlsConnection(
            tcp,
            self._transport.context,
            Terms(self._sink, self._admit, self._transport.expectations, None, deadline_s),
            dialled=False,
            endpoint=endpoint,
            on_ready=self._on_ready,
            on_ended=self._forget,
        )
        with self._lock:
            self._pending[connection] = host
        connection.start()

    def _on_ready(self, connection: TlsConnection, error: Exception | None) -> None:
        if error is None:
            self._forget(connection)
            return
        self.num_refused += 1
        COUNTERS.add("refused_peers", "in the handshake")
        logger.info("refused a connection: %s", error)

    def _forget(self, connection: TlsConnection) -> None:
        with self._lock:
            self._pending.pop(connection, None)


def _make_context(identity: Identity, signed_binding: SignedBinding | None) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(_SUITES)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION)
    # A whole slice per call instead of one record: fewer crossings into C, and the interpreter lock is free meanwhile
    context.clear_mode(_SSL_MODE_ENABLE_PARTIAL_WRITE)
    key, certificate = make_certificate(identity, signed_binding)
    context.use_privatekey(key)
    context.use_certificate(certificate)
    context.set_alpn_select_callback(_choose_kind)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _accept_self_signed)
    return context


def _accept_self_signed(
    connection: SSL.Connection, certificate: object, error_number: int, depth: int, preverified: int
) -> bool:
    """TLS proves possession of the key; who it belongs to is checked after the handshake, from the extension."""
    return depth == 0


def _choose_kind(connection: SSL.Connection, offered: list[bytes]) -> bytes | SSL._NoOverlappingProtocols:
    return next((kind for kind in offered if kind in (ALPN_CALLS, ALPN_BULK)), SSL.NO_OVERLAPPING_PROTOCOLS)
