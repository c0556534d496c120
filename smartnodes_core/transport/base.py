"""What a transport is: authenticated connections that carry frames. `tls.py` is the real one, `memory.py` its twin.

Both sides verify the other's node key and binding and run `admit` before either may send or receive a frame. Each
connection has one owner thread, on which the sink's methods run; frames arrive in the order in which they were sent.

Connections are of two kinds, proven and admitted alike: those for calls, and bulk ones, which move large bodies with
less work. What a kind is used for is up to the sink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from smartnodes_core.errors import ConfigError, Unavailable
from smartnodes_core.records import Binding, Role, SignedBinding
from smartnodes_core.wire import Buffer, Header

MAX_QUEUED_BYTES = 64 << 20
SEND_TIMEOUT_S = 30.0
LINGER_S = 1.0


class DuplicateConnectionError(Unavailable):
    """The other side already has, or is just making, a connection with us: that one is to be used."""

    code = "duplicate-connection"


@dataclass(frozen=True)
class Peer:
    """The other end of a connection, as proven in its handshake.

    `binding` and `role` are None for a peer without an account; `bulk` is the kind of the connection.
    """

    node_key: bytes
    binding: Binding | None
    role: Role | None
    endpoint: str
    bulk: bool = False

    @property
    def name(self) -> str:
        """Short and printable, for messages and logs."""
        return f"{self.role or 'peer'} {self.node_key.hex()[:8]}"

    def __str__(self) -> str:
        return self.name


Admit = Callable[[Peer], None]


class Connection(Protocol):
    """One authenticated, ordered, two-way stream of frames."""

    @property
    def peer(self) -> Peer: ...

    @property
    def dialled(self) -> bool:
        """True when this side dialled."""
        ...

    @property
    def closed(self) -> bool: ...

    def send(
        self,
        header: dict[str, Any],
        body: Sequence[Buffer] = (),
        on_sent: Callable[[], None] | None = None,
        timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        """Queues a frame. The memory of `body` must not change until `on_sent` is called.

        Waits while more than MAX_QUEUED_BYTES are queued (one larger frame is taken when the queue is empty).
        `on_sent` runs exactly once, on a transport thread, when `body` is no longer read: sent, or the connection
        ended. It is not a receipt. Raises BusyError when there was no room for `timeout_s` (at once on an owner
        thread, which must not wait), ConnectionLostError when the connection is closed, ProtocolError when the header
        is over its cap; then `on_sent` never runs.
        """
        ...

    def close(self, reason: str) -> None:
        """Ends the connection after what is queued, or LINGER_S later. Returns at once; harmless when repeated."""
        ...

    def join(self, timeout_s: float) -> bool:
        """Waits until the owner thread has ended; False when it has not in `timeout_s`."""
        ...


class FrameSink(Protocol):
    """Where a connection's frames go.

    All methods run on the connection's owner thread: what blocks here holds up the peer.
    """

    def on_open(self, connection: Connection) -> None:
        """Both sides have admitted each other; called once, before the first frame."""
        ...

    def allocate(self, connection: Connection, header: Header, num_bytes: int) -> memoryview | None:
        """Memory for a body, exactly `num_bytes` long and writable; None to have the body skipped and the frame
        dropped. Raises ProtocolError to end the connection."""
        ...

    def on_frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        """A whole frame; `body` is what `allocate` returned. A SmartnodesError raised here ends the connection."""
        ...

    def on_closed(self, connection: Connection, error: Exception | None) -> None:
        """Called once, last; `error` is None when this side closed, else says why the connection ended."""
        ...


class Listener(Protocol):
    """A listening address; `endpoint` has the port that was really taken."""

    @property
    def endpoint(self) -> str: ...

    def close(self) -> None: ...


class Transport(Protocol):
    """Makes connections, each verified on both sides before the first frame."""

    def renew(self, signed_binding: SignedBinding | None) -> None:
        """Shows this binding from now on; connections that there are have shown the one before."""
        ...

    def listen(self, endpoint: str, sink: FrameSink, admit: Admit) -> Listener:
        """Listens on `host:port` (port 0: any). Raises PortInUseError, ConfigError."""
        ...

    def dial(
        self,
        endpoint: str,
        sink: FrameSink,
        admit: Admit,
        expected_node_key: bytes | None = None,
        timeout_s: float = 10.0,
        *,
        bulk: bool = False,
    ) -> Connection:
        """A connection to whoever listens at `endpoint`, who must own `expected_node_key` where that is given.

        Raises PeerUnreachableError, DeadlineError, AuthorityError (either side refused), SignatureError or RecordError
        (a certificate that is no proof), ProtocolError.
        """
        ...


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port". Raises ConfigError."""
    host, separator, port = endpoint.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not separator or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"{endpoint!r} is not an endpoint: write host:port, such as 127.0.0.1:9000")
    return host, int(port)


def join_endpoint(host: str, port: int) -> str:
    """The inverse of `split_endpoint`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
