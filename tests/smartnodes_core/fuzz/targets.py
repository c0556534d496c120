"""What strangers' bytes reach first: each target takes any bytes and raises only what is meant for bad ones.

`test_corpus.py` replays the committed corpus and tries some mutations of it; `fuzz.py` searches on, guided by coverage.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Any

from OpenSSL import SSL

from smartnodes_core import audit, records
from smartnodes_core.chain.proposal import Equivocation, RoundProposal
from smartnodes_core.errors import PeerFault, SmartnodesError
from smartnodes_core.evidence import case_of, check_draw, signed_verdict, split
from smartnodes_core.identity import Identity, make_binding
from smartnodes_core.nesting import bounded_json
from smartnodes_core.nodes.rewards import decode_totals
from smartnodes_core.pipe import Pipe
from smartnodes_core.remote_errors import from_wire
from smartnodes_core.rpc import RpcEndpoint
from smartnodes_core.transport import certificate
from smartnodes_core.transport.base import Peer, split_endpoint
from smartnodes_core.transport.certificate import Expectations, check_certificate, check_peer, read_certificate
from smartnodes_core.transport.sealed import SealedStream
from smartnodes_core.transport.tls import _make_context
from smartnodes_core.transport.welcome import check_welcome
from smartnodes_core.wire import FrameReader, decode_header

MAX_BODY_BYTES = 1 << 16
IDENTITY = Identity.from_seed(bytes(range(32)))
BINDING = make_binding(IDENTITY, bytes([7] * 32), "worker", 31337, bytes([17] * 20), 7, 4102444800)
EXPECTATIONS = Expectations(31337, bytes([17] * 20), 7)
PEER = Peer(node_key=IDENTITY.node_key, binding=None, role="user", endpoint="203.0.113.1:1")
RECORDS: list[type[records.Record]] = sorted(
    {
        found
        for module in (records, audit, certificate)
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, records.Record) and found is not records.Record
    },
    key=lambda found: found.__name__,
)


def allocate(header: dict[str, Any], num_bytes: int) -> memoryview | None:
    return memoryview(bytearray(num_bytes)) if num_bytes <= MAX_BODY_BYTES else None


def frames(data: bytes) -> None:
    """A stream of frames."""
    with contextlib.suppress(PeerFault):
        for _ in FrameReader(allocate).feed(memoryview(data)):
            pass


def header(data: bytes) -> None:
    """The header of a frame, then as a welcome and as an error."""
    with contextlib.suppress(PeerFault):
        decoded = decode_header(data)
        from_wire(decoded, "a peer", bytes(32))
        with contextlib.suppress(SmartnodesError):
            check_welcome(decoded, PEER)


def record(data: bytes) -> None:
    """Those records whose kind occurs in the bytes, or any one. What decodes is canonical."""
    named = [found for found in RECORDS if str(found.__struct_config__.tag).encode() in data]
    for expected in named or RECORDS[:1]:
        with contextlib.suppress(PeerFault):
            assert expected.decode(data).encode() == data


def evidence_file(data: bytes) -> None:
    """Evidence of fraud as a stranger hands it to somebody."""
    with contextlib.suppress(PeerFault):
        file = split(memoryview(data))
        with contextlib.suppress(PeerFault):
            signed_verdict(file.verdict)
        check_draw(file.evidence, case_of(file.evidence, file.body))


def proposal(data: bytes) -> None:
    """What validators show each other of rounds."""
    for expected in (RoundProposal, Equivocation):
        with contextlib.suppress(PeerFault):
            expected.decode(data)
    with contextlib.suppress(PeerFault):
        decode_totals(data)


def certificate_of_a_peer(data: bytes) -> None:
    """An X.509 certificate; the first byte says whether it is whole, or only our extension in it."""
    with contextlib.suppress(SmartnodesError):
        if data[:1] == b"\0":
            signed = records.SignedBinding.decode(data[1:])
            check_peer(IDENTITY.node_key, signed, EXPECTATIONS, "a:1")
            return
        check_certificate(read_certificate(data[1:]), EXPECTATIONS, "a:1")


class Connection:
    """What an endpoint may ask of a connection."""

    dialled = False

    def __init__(self, bulk: bool) -> None:
        self.peer = Peer(IDENTITY.node_key, None, "user", "a:1", bulk)
        self.closed = False

    def send(self, header: dict[str, Any], body: Any = (), on_sent: Any = None, timeout_s: float = 0.0) -> None:
        assert isinstance(header["kind"], str)

    def close(self, reason: str) -> None:
        self.closed = True

    def join(self, timeout_s: float) -> bool:
        return True


class Inline:
    """A pool that runs at once."""

    def run(self, job: Callable[[], None]) -> None:
        job()


def calls(data: bytes) -> None:
    """Frames of an admitted peer at an endpoint that serves something; the first byte says on which kind."""
    endpoint = RpcEndpoint("fuzz", max_threads=1)
    endpoint._inbound._pool = Inline()  # type: ignore[assignment]
    endpoint.serve(Served())
    endpoint.on_stream("t", lambda peer, header, size: memoryview(bytearray(min(size, 1 << 24))), lambda *_: None)
    connection = Connection(bulk=data[:1] == b"\1")

    def give(header: dict[str, Any], num_bytes: int) -> memoryview | None:
        memory = endpoint.allocate(connection, header, num_bytes)
        return None if memory is None or memory.nbytes != num_bytes else memory

    with contextlib.suppress(SmartnodesError):
        for frame in FrameReader(give).feed(memoryview(data[1:])):
            endpoint.on_frame(connection, frame.header, frame.body)
    endpoint.on_closed(connection, None)


class Served:
    def rpc_echo(self, caller: Peer, params: dict[str, Any], body: memoryview) -> tuple[dict[str, Any], list[bytes]]:
        return params, [bytes(body)]


def sealed(data: bytes) -> None:
    """What comes on a bulk connection after its handshake."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        stream = SealedStream(near, bytes(96), dialled=True)
        with contextlib.suppress(BlockingIOError):
            far.setblocking(False)
            far.send(data)
        memory = memoryview(bytearray(1 << 16))
        with contextlib.suppress(PeerFault, SSL.WantReadError, SSL.ZeroReturnError):
            while True:
                stream.recv_into(memory, len(memory))


_context = _make_context(IDENTITY, BINDING)


def first_bytes(data: bytes) -> None:
    """What a stranger sends to a node that listens, before anything is known of it."""
    tls = SSL.Connection(_context, None)
    tls.set_accept_state()
    tls.bio_write(data or b"\0")
    with contextlib.suppress(SSL.Error):
        tls.do_handshake()


def text(data: bytes) -> None:
    """JSON and endpoints that peers name."""
    with contextlib.suppress(ValueError):
        bounded_json(data)
    with contextlib.suppress(SmartnodesError):
        split_endpoint(data.decode(errors="replace"))


def message(data: bytes) -> None:
    """What a node reads from the process that computes, which a stranger may have taken over."""
    near, far = socket.socketpair()
    with near, far:
        far.sendall(data[: 64 << 10])
        far.shutdown(socket.SHUT_WR)
        near.settimeout(1.0)
        with contextlib.suppress(SmartnodesError, OSError, EOFError):
            pipe = Pipe(near)
            while pipe.receive() is not None:
                pass


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (
        frames,
        header,
        record,
        evidence_file,
        proposal,
        certificate_of_a_peer,
        calls,
        sealed,
        first_bytes,
        text,
        message,
    )
}
