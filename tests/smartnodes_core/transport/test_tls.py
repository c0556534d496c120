"""What only sockets can suffer: strangers, slow handshakes, floods, stolen certificates, leaks."""

from __future__ import annotations

import gc
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from OpenSSL import SSL

from smartnodes_core.errors import ConfigError, DeadlineError, SmartnodesError
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.authority import OpenAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.rpc import RpcEndpoint
from smartnodes_core.transport.base import Peer, split_endpoint
from smartnodes_core.transport.certificate import make_certificate
from smartnodes_core.transport.tls import TlsListener, TlsTransport, _make_context
from smartnodes_core.wire import encode_prefix_and_header

WAIT_S = 10.0


def admit_all(peer: Peer) -> None:
    pass


class Server:
    def __init__(self, party: Any, **options: Any) -> None:
        self.identity = Identity.create()
        self.opened = threading.Semaphore(0)
        self.rpc = RpcEndpoint(opened=lambda connection: self.opened.release())
        self.binding = party.bind(self.identity)
        self.transport = TlsTransport(self.identity, self.binding, **options)
        self.listener: TlsListener = self.transport.listen("127.0.0.1:0", self.rpc, admit_all)
        self.address = split_endpoint(self.listener.endpoint)


@pytest.fixture
def server(tls_party: Any) -> Iterator[Server]:
    made = Server(tls_party, handshake_timeout_s=0.3, max_pending_handshakes=4)
    yield made
    made.listener.close()
    made.rpc.stop()


def wait_hung_up(tcp: socket.socket) -> bool:
    """Until the other side ends the connection."""
    tcp.settimeout(WAIT_S)
    try:
        while tcp.recv(4096):
            pass
    except ConnectionError:
        return True
    return True


def test_a_handshake_that_dawdles_is_dropped_at_its_deadline(server: Server) -> None:
    with socket.create_connection(server.address) as tcp:
        started_s = time.monotonic()
        assert wait_hung_up(tcp)
        assert time.monotonic() - started_s < 5


def test_a_handshake_fed_byte_by_byte_does_not_move_its_deadline(server: Server) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300)
    with socket.create_connection(server.address) as tcp:
        started_s = time.monotonic()
        for byte in hello:
            if select.select([tcp], [], [], 0.02)[0]:
                break
            tcp.sendall(bytes([byte]))
        assert wait_hung_up(tcp)
        assert time.monotonic() - started_s < 3


def test_what_is_no_tls_is_hung_up_on(server: Server) -> None:
    with socket.create_connection(server.address) as tcp:
        tcp.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        assert wait_hung_up(tcp)


def test_a_flood_of_handshakes_is_capped_and_passes(server: Server, tls_party: Any) -> None:
    flood = [socket.create_connection(server.address) for _ in range(12)]
    for tcp in flood:
        assert wait_hung_up(tcp)
        tcp.close()
    assert server.listener.num_refused >= 8
    identity = Identity.create()
    transport = TlsTransport(identity, tls_party.bind(identity))
    connection = transport.dial(server.listener.endpoint, RpcEndpoint(), admit_all)
    connection.close("done")
    assert connection.join(WAIT_S)


def dial_raw(server: Server, context: SSL.Context) -> tuple[SSL.Connection, socket.socket]:
    tcp = socket.create_connection(server.address, timeout=None)
    tls = SSL.Connection(context, tcp)
    tls.set_connect_state()
    tls.do_handshake()
    return tls, tcp


def read_until_ended(tls: SSL.Connection) -> bytes:
    """What the server says until it ends the connection with an alert, a goodbye or a reset."""
    told = b""
    try:
        while True:
            told += tls.recv(4096)
    except (SSL.Error, OSError):
        return told


def test_without_a_certificate_nobody_gets_in(server: Server) -> None:
    tls, tcp = dial_raw(server, SSL.Context(SSL.TLS_METHOD))
    read_until_ended(tls)
    tcp.close()
    assert not server.opened.acquire(timeout=0.1)


def test_a_stolen_certificate_is_useless_without_its_key(server: Server) -> None:
    _, certificate = make_certificate(server.identity, server.binding)
    other_key, _ = make_certificate(Identity.create(), None)
    context = SSL.Context(SSL.TLS_METHOD)
    context.use_certificate(certificate)
    with pytest.raises(SSL.Error, match="mismatch"):
        context.use_privatekey(other_key)


def test_an_extension_copied_onto_another_key_proves_nothing(server: Server) -> None:
    """The man in the middle: a certificate of the attacker's own key with the extension of somebody's certificate."""
    _, genuine = make_certificate(server.identity, server.binding)
    key, template = make_certificate(Identity.create(), None)
    forged = (
        x509.CertificateBuilder()
        .subject_name(template.subject)
        .issuer_name(template.issuer)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(template.not_valid_before_utc)
        .not_valid_after(template.not_valid_after_utc)
        .add_extension(genuine.extensions[0].value, critical=True)
        .sign(key, hashes.SHA256())
    )
    context = SSL.Context(SSL.TLS_METHOD)
    context.use_privatekey(key)
    context.use_certificate(forged)
    tls, tcp = dial_raw(server, context)
    told = read_until_ended(tls)
    tcp.close()
    assert b"signature" in told
    assert not server.opened.acquire(timeout=0.1)


def test_frames_sent_before_being_admitted_end_the_connection(server: Server) -> None:
    """A client of its own making that skips the welcome."""
    identity = Identity.create()
    context = _make_context(identity, None)
    tls, tcp = dial_raw(server, context)
    tls.send(encode_prefix_and_header({"kind": "call", "id": 1, "method": "x", "params": {}}, 0))
    read_until_ended(tls)
    tcp.close()
    assert not server.opened.acquire(timeout=0.1)


def test_older_tls_is_not_spoken(server: Server) -> None:
    context = _make_context(Identity.create(), None)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    with pytest.raises(SSL.Error):
        dial_raw(server, context)


def test_a_listener_that_never_answers_costs_the_dialler_its_deadline_only(tls_party: Any) -> None:
    identity = Identity.create()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started_s = time.monotonic()
        with pytest.raises(DeadlineError, match="handshake in time"):
            TlsTransport(identity, tls_party.bind(identity)).dial(
                f"127.0.0.1:{silent.getsockname()[1]}", RpcEndpoint(), admit_all, timeout_s=0.3
            )
        assert time.monotonic() - started_s < 3


OF_A_CONNECTION = ("smartnodes_core", "OpenSSL", "socket", "threading", "cryptography")


def test_connections_leave_no_threads_no_descriptors_and_no_memory(
    tls_party: Any, request: pytest.FixtureRequest
) -> None:
    """Of a node's: each with a call, a tensor on a bulk connection, and its end. `--connections` says how many."""
    far = tls_party.node("worker")
    far.on_stream("t", lambda peer, header, size: memoryview(bytearray(size)), lambda *_: got.release())
    got, gone = threading.Semaphore(0), threading.Semaphore(0)
    far.on_peer_lost(lambda key, reason: gone.release())
    identity = Identity.create()
    binding = tls_party.bind(identity, "user")

    def one() -> None:
        near = Node(identity, binding, TlsTransport(identity, binding), OpenAuthority(), endpoint=None)
        near.connect(far.endpoint)
        near.call(far.node_key, "binding")
        near.stream(far.node_key, "t", {}, [b"tensor"])
        assert got.acquire(timeout=WAIT_S)
        near.stop()
        assert gone.acquire(timeout=WAIT_S)

    lasting = set(threading.enumerate())  # the listener's, and those that other tests may have left

    def settle() -> tuple[set[threading.Thread], int]:
        for thread in set(threading.enumerate()) - lasting:
            if thread.name.startswith("tls "):
                thread.join(WAIT_S)
        gc.collect()
        return set(threading.enumerate()), len(os.listdir("/proc/self/fd"))

    def num_objects() -> int:
        """Of ours, of TLS, threads and sockets: others come and go with what else this process does."""
        return sum(str(type(each).__module__).partition(".")[0] in OF_A_CONNECTION for each in gc.get_objects())

    num_connections = request.config.getoption("--connections")
    for _ in range(num_connections // 4):  # caches and pools fill first
        one()
    before, memory_kb, objects = settle(), resident_kb(), num_objects()
    for _ in range(num_connections):
        one()
    after = settle()
    grown_kb, grown_objects = resident_kb() - memory_kb, num_objects() - objects
    print(f"{num_connections} connections, and as many bulk ones: {grown_kb} KB and {grown_objects} objects more")
    assert after[0] <= before[0]  # those of earlier tests may end meanwhile
    assert after[1] <= before[1]
    assert grown_objects < num_connections // 10  # each would leave several
    assert len(far._rpc._inbound._loads) == len(far._rpc._inbound._seen) == 0
    assert grown_kb < 32 << 10, f"{grown_kb} KB were not given back"  # the allocator itself keeps up to half of that


def resident_kb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 10


def test_closing_the_listener_does_not_wait_for_a_dawdling_handshake(tls_party: Any) -> None:
    slow = Server(tls_party, handshake_timeout_s=60)
    with socket.create_connection(slow.address) as tcp:
        deadline_s = time.monotonic() + WAIT_S
        while not slow.listener._pending and time.monotonic() < deadline_s:
            select.select([], [], [], 0.01)
        started_s = time.monotonic()
        slow.listener.close()
        assert time.monotonic() - started_s < 1
        assert wait_hung_up(tcp)


@pytest.mark.parametrize("endpoint", ["", "host", "host:", ":1", "host:x", "host:65536", "host:-1"])
def test_what_is_no_endpoint_is_a_config_error(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        split_endpoint(endpoint)


def test_listening_on_an_address_that_is_not_ours_is_a_config_error(tls_party: Any) -> None:
    with pytest.raises((ConfigError, SmartnodesError), match="cannot listen"):
        TlsTransport(Identity.create(), None).listen("203.0.113.7:0", RpcEndpoint(), admit_all)
