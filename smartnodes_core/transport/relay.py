"""A relay: joins two connections of peers that cannot reach each other, and copies bytes between them.

The peers run their own handshake and encryption through it, so that it sees ciphertext, how much, and between whom. It
knows nothing of nodes: `offer` gives two tokens, each end begins with its own, then bytes flow. Everything is bounded:
what waits and how long, how many circuits a peer has, how many bytes and how fast. `nodes/introducing.py` gives tokens.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field

from smartnodes_core.errors import PeerUnreachableError, PortInUseError
from smartnodes_core.transport.base import join_endpoint, split_endpoint
from smartnodes_core.transport.relay_quotas import RelayAccounts, RelayQuotas
from smartnodes_core.transport.tcp import open_tcp

logger = logging.getLogger(__name__)

TOKEN_BYTES = 32
_MAGIC = b"SNR1"
_PREFACE_BYTES = len(_MAGIC) + TOKEN_BYTES
_CHUNK_BYTES = 64 << 10
_TICK_S = 0.02
DEFAULT_QUOTAS = RelayQuotas()


@dataclass(eq=False)
class _End:
    """One socket, with what was read from it and is still to be written to the other."""

    tcp: socket.socket
    host: str
    circuit: _Circuit | None = None
    other: _End | None = None
    preface: bytes = b""
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    ended: bool = False
    until_s: float = 0.0


@dataclass(eq=False)
class _Circuit:
    owner: bytes
    tokens: tuple[bytes, bytes]
    ends: list[_End | None] = field(default_factory=lambda: [None, None])
    until_s: float = 0.0


class Relay:
    """Listens at `endpoint` when started; one thread copies."""

    def __init__(self, endpoint: str, quotas: RelayQuotas = DEFAULT_QUOTAS) -> None:
        self.quotas, self.accounts = quotas, RelayAccounts(quotas)
        self._server = _listening(endpoint)
        self.port = int(self._server.getsockname()[1])
        self._lock = threading.Lock()
        self._waiting: dict[bytes, _Circuit] = {}
        self._circuits: set[_Circuit] = set()
        self._ends: set[_End] = set()
        self._selector = selectors.DefaultSelector()
        self._throttled = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def __repr__(self) -> str:
        return f"Relay(port {self.port}, {len(self._circuits)} circuits, {self.accounts.num_bytes} bytes)"

    def start(self) -> None:
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        self._thread.start()

    def stop(self) -> None:
        """Ends every circuit. Harmless when repeated."""
        self._stopping = True
        with contextlib.suppress(OSError):  # wakes the thread
            self._server.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(2.0)

    def offer(self, owner: bytes) -> tuple[bytes, bytes]:
        """The tokens of a new circuit that `owner` is charged for. Raises BusyError over a quota."""
        self.accounts.open_circuit(owner)
        tokens = (secrets.token_bytes(TOKEN_BYTES), secrets.token_bytes(TOKEN_BYTES))
        circuit = _Circuit(owner, tokens, until_s=time.monotonic() + self.quotas.wait_s)
        with self._lock:
            self._circuits.add(circuit)
            self._waiting |= dict.fromkeys(tokens, circuit)
        return tokens

    # -- the relay's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                for key, events in self._selector.select(_TICK_S if self._throttled else 1.0):
                    if key.fileobj is self._server:
                        self._accept()
                    else:
                        self._serve(key.data, events)
                self._tidy()
        finally:
            for end in list(self._ends):
                self._close(end)
            self._selector.close()
            self._server.close()

    def _accept(self) -> None:
        try:
            tcp, address = self._server.accept()
        except OSError:
            return
        unjoined = [end.host for end in self._ends if end.circuit is None]
        full = len(unjoined) >= self.quotas.num_unjoined
        if full or unjoined.count(address[0]) >= self.quotas.unjoined_per_host:
            tcp.close()
            return
        tcp.setblocking(False)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = _End(tcp, str(address[0]), until_s=time.monotonic() + self.quotas.wait_s)
        self._ends.add(end)
        self._selector.register(tcp, selectors.EVENT_READ, end)

    def _serve(self, end: _End, events: int) -> None:
        if end not in self._ends:
            return
        try:
            if end.circuit is None:
                self._read_preface(end)
            elif end.other is not None:
                if events & selectors.EVENT_WRITE:
                    self._write(end.other, end)
                if events & selectors.EVENT_READ:
                    self._read(end, end.other)
                self._watch(end)
                self._watch(end.other)
        except OSError as error:
            logger.debug("a relayed connection ended: %s", error)
            self._drop(end)

    def _read_preface(self, end: _End) -> None:
        data = end.tcp.recv(_PREFACE_BYTES - len(end.preface))
        end.preface += data
        if not data or not _MAGIC.startswith(end.preface[: len(_MAGIC)]):
            return self._close(end)
        if len(end.preface) < _PREFACE_BYTES:
            return None
        token = end.preface[len(_MAGIC) :]
        with self._lock:
            circuit = self._waiting.pop(token, None)
        if circuit is None:
            return self._close(end)
        place = circuit.tokens.index(token)
        end.circuit, circuit.ends[place] = circuit, end
        other = circuit.ends[1 - place]
        if other is not None:
            end.other, other.other = other, end
            circuit.until_s = time.monotonic() + self.quotas.idle_s
            self._watch(other)
        return self._watch(end)

    def _read(self, end: _End, other: _End) -> None:
        """As much as the owner may send now and as is not waiting already."""
        if end.ended or end.unsent or end.circuit is None:
            return
        allowed = self.accounts.allowed_bytes(end.circuit.owner)
        if allowed <= 0:
            self._throttled = True
            return
        data = end.tcp.recv(min(_CHUNK_BYTES, allowed))
        if not data:
            end.ended = True
            other.tcp.shutdown(socket.SHUT_WR)
            if other.ended:
                self._drop(end)
            return
        end.circuit.until_s = time.monotonic() + self.quotas.idle_s
        if not self.accounts.charge(end.circuit.owner, len(data)):
            raise OSError("its owner's bytes are used up")
        end.unsent = memoryview(data)
        self._write(end, other)

    def _write(self, end: _End, other: _End) -> None:
        """What was read from `end`, to `other`."""
        if end.unsent:
            with contextlib.suppress(BlockingIOError):
                end.unsent = end.unsent[other.tcp.send(end.unsent) :]

    def _watch(self, end: _End) -> None:
        """Which events of this socket matter now."""
        if end not in self._ends:
            return
        circuit, other = end.circuit, end.other
        reads = other is not None and not end.ended and not end.unsent
        if reads and circuit is not None and self.accounts.allowed_bytes(circuit.owner) <= 0:
            reads, self._throttled = False, True
        writes = other is not None and bool(other.unsent)
        events = (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if writes else 0)
        known = end.tcp in self._selector.get_map()
        if events and known:
            self._selector.modify(end.tcp, events, end)
        elif events:
            self._selector.register(end.tcp, events, end)
        elif known:
            self._selector.unregister(end.tcp)

    def _tidy(self) -> None:
        """Ends what has waited or idled too long; lets those go on that were throttled."""
        now_s = time.monotonic()
        for end in list(self._ends):
            if end.circuit is None and end.until_s < now_s:
                self._close(end)
        for circuit in [circuit for circuit in self._circuits if circuit.until_s < now_s]:
            self._end(circuit)
        if self._throttled:
            self._throttled = False
            for end in list(self._ends):
                if end.other is not None:
                    self._watch(end)

    def _drop(self, end: _End) -> None:
        if end.circuit is not None:
            self._end(end.circuit)
        else:
            self._close(end)

    def _end(self, circuit: _Circuit) -> None:
        with self._lock:
            if circuit not in self._circuits:
                return
            self._circuits.discard(circuit)
            for token in circuit.tokens:
                self._waiting.pop(token, None)
        self.accounts.close_circuit(circuit.owner)
        for end in circuit.ends:
            if end is not None:
                self._close(end)

    def _close(self, end: _End) -> None:
        if end not in self._ends:
            return
        self._ends.discard(end)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(end.tcp)
        end.tcp.close()


def join_circuit(relay: str, token: bytes, timeout_s: float) -> socket.socket:
    """A connection to whoever joins the same circuit. Raises PeerUnreachableError, DeadlineError."""
    tcp = open_tcp(relay, timeout_s)
    try:
        tcp.sendall(_MAGIC + token)
    except OSError as error:
        tcp.close()
        raise PeerUnreachableError(f"the relay at {relay} hung up: {error.strerror or error}") from None
    return tcp


def _listening(endpoint: str) -> socket.socket:
    host, port = split_endpoint(endpoint)
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(64)
    except OSError as error:
        server.close()
        where = join_endpoint(host, port)
        raise PortInUseError(f"the relay cannot listen on {where}: {error.strerror}; choose another port") from None
    return server
