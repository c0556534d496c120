"""A relay copies bytes between two that know its tokens, no more than its quotas allow, and serves nobody else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from smartnodes_core.errors import BusyError, PortInUseError
from smartnodes_core.transport.relay import Relay, RelayQuotas, join_circuit

OWNER = b"o" * 32


@pytest.fixture
def relays() -> Iterator[Callable[..., Relay]]:
    made: list[Relay] = []

    def make(**quotas: float) -> Relay:
        made.append(Relay("127.0.0.1:0", RelayQuotas(**quotas)))  # type: ignore[arg-type]
        made[-1].start()
        return made[-1]

    yield make
    for relay in made:
        relay.stop()


def joined(relay: Relay, owner: bytes = OWNER) -> tuple[socket.socket, socket.socket]:
    ends = tuple(join_circuit(f"127.0.0.1:{relay.port}", token, 5.0) for token in relay.offer(owner))
    for end in ends:
        end.settimeout(10.0)
    return ends[0], ends[1]


def received(end: socket.socket, num_bytes: int) -> bytes:
    found = b""
    while len(found) < num_bytes and (data := end.recv(num_bytes - len(found))):
        found += data
    return found


def is_gone(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except ConnectionResetError:
        return True


def eventually(condition: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + 10.0, threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.01)


def test_bytes_go_both_ways_in_order_and_an_end_is_passed_on(relays):
    relay = relays()
    one, other = joined(relay)
    with one, other:
        payload = bytes(range(256)) * 4096
        one.sendall(payload[:1000])
        other.sendall(b"back")
        assert received(one, 4) == b"back"
        assert received(other, 1000) == payload[:1000]
        one.sendall(payload)
        one.shutdown(socket.SHUT_WR)
        assert received(other, len(payload) + 1) == payload
        other.sendall(b"last")
        assert received(one, 4) == b"last"
    assert relay.accounts.num_bytes == len(payload) + 1008


def test_what_comes_before_the_other_side_has_joined_waits(relays):
    relay = relays()
    first, second = relay.offer(OWNER)
    with join_circuit(f"127.0.0.1:{relay.port}", first, 5.0) as one:
        one.sendall(b"early")
        with join_circuit(f"127.0.0.1:{relay.port}", second, 5.0) as other:
            other.settimeout(10.0)
            assert received(other, 5) == b"early"


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n" + bytes(40), b"SNR1" + bytes(32), b"S", b"\x16\x03\x01"])
def test_who_shows_no_token_is_hung_up_on(relays, said):
    relay = relays(wait_s=0.2)
    with socket.create_connection(("127.0.0.1", relay.port), 5.0) as stranger:
        stranger.settimeout(10.0)
        stranger.sendall(said)
        assert is_gone(stranger)


def test_a_token_is_good_once(relays):
    relay = relays()
    first, _ = relay.offer(OWNER)
    with join_circuit(f"127.0.0.1:{relay.port}", first, 5.0):
        with join_circuit(f"127.0.0.1:{relay.port}", first, 5.0) as again:
            again.settimeout(10.0)
            assert again.recv(1) == b""


def test_a_circuit_that_only_one_side_joins_ends(relays):
    relay = relays(wait_s=0.2)
    first, _ = relay.offer(OWNER)
    with join_circuit(f"127.0.0.1:{relay.port}", first, 5.0) as one:
        one.settimeout(10.0)
        assert one.recv(1) == b""
    eventually(lambda: relay.accounts.num_circuits == 0)


def test_an_idle_circuit_ends(relays):
    one, other = joined(relays(idle_s=0.2))
    with one, other:
        assert is_gone(one)
        assert is_gone(other)


def test_a_peer_has_so_many_circuits_and_all_together_have_so_many(relays):
    relay = relays(circuits_per_peer=2, num_circuits=3)
    one, other = joined(relay)
    relay.offer(OWNER)
    with pytest.raises(BusyError, match="2 of your circuits and 2 in all"):
        relay.offer(OWNER)
    relay.offer(b"p" * 32)
    with pytest.raises(BusyError, match="3 in all"):
        relay.offer(b"q" * 32)
    one.close()
    other.close()
    eventually(lambda: relay.accounts.num_circuits == 2)
    relay.offer(OWNER)


def test_a_circuit_ends_when_its_owners_bytes_are_used_up(relays):
    relay = relays(peer_bytes=100_000)
    one, other = joined(relay)
    with one, other:
        one.sendall(bytes(90_000))
        assert len(received(other, 90_000)) == 90_000
        one.sendall(bytes(20_000))
        assert len(received(other, 20_000)) < 20_000
    with pytest.raises(BusyError, match="bytes were relayed for you"):
        relay.offer(OWNER)
    joined(relay, b"p" * 32)


def test_bytes_are_no_faster_than_their_owner_may_send(relays):
    relay = relays(peer_bytes_per_s=1_000_000)
    one, other = joined(relay)
    with one, other:
        began = time.monotonic()
        one.sendall(bytes(500_000))
        assert len(received(other, 500_000)) == 500_000
        assert time.monotonic() - began > 0.35  # a tenth of a second's worth is saved up


@pytest.mark.parametrize("quota", ["num_unjoined", "unjoined_per_host"])
def test_connections_without_a_token_are_few(relays, quota):
    relay = relays(**{quota: 4})
    strangers = [socket.create_connection(("127.0.0.1", relay.port), 5.0) for _ in range(8)]
    eventually(lambda: len(relay._ends) == 4)
    for stranger in strangers:
        stranger.close()


def test_stopping_ends_every_circuit_and_a_taken_port_is_named(relays):
    relay = relays()
    one, other = joined(relay)
    with pytest.raises(PortInUseError, match="another port"):
        Relay(f"127.0.0.1:{relay.port}")
    relay.stop()
    with one, other:
        assert is_gone(one)
