"""What crosses a bulk connection: sealed, in order, and what somebody on the way can do to it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from OpenSSL import SSL

from smartnodes_core.errors import ProtocolError
from smartnodes_core.transport import sealed
from smartnodes_core.transport.sealed import MAX_RECORD_BYTES, SealedStream, TrafficKey

SECRETS = bytes(range(96))


class Line:
    """A sender whose bytes pass through the test on their way to a receiver."""

    def __init__(self, secrets: bytes = SECRETS) -> None:
        self._near, self.tap = socket.socketpair()
        self.wire, self._far = socket.socketpair()
        for end in (self._near, self.tap, self.wire, self._far):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.sender = SealedStream(self._near, secrets, dialled=True)
        self.receiver = SealedStream(self._far, secrets, dialled=False)

    def send(self, data: bytes) -> bytes:
        """Sends one record; the bytes that went out."""
        assert self.sender.send(memoryview(data)) == len(data)
        return self.tap.recv(8 << 20)

    def receive(self, room: int = 1 << 20) -> bytes:
        memory = memoryview(bytearray(room))
        return bytes(memory[: self.receiver.recv_into(memory, room)])

    def close(self) -> None:
        for end in (self._near, self.tap, self.wire, self._far):
            end.close()


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.close()


@pytest.mark.parametrize("num_bytes", [1, 16, 4096, MAX_RECORD_BYTES])
def test_what_is_sealed_opens_as_it_was_and_hides_every_byte(line: Line, num_bytes: int) -> None:
    data = b"secret! " * (num_bytes // 8) + b"s" * (num_bytes % 8)
    out = line.send(data)
    assert b"secret!" not in out
    assert len(out) == len(data) + 20
    line.wire.send(out)
    assert line.receive() == data


def test_a_record_that_comes_in_pieces_opens_when_it_is_whole(line: Line) -> None:
    first, second = line.send(b"first"), line.send(b"second")
    together = first + second
    for at in range(len(first) - 1):
        line.wire.send(together[at : at + 1])
        with pytest.raises(SSL.WantReadError):
            line.receive()
    line.wire.send(together[len(first) - 1 :])
    assert line.receive() == b"first"
    assert line.receive() == b"second"
    with pytest.raises(SSL.WantReadError):
        line.receive()


def test_a_record_larger_than_the_room_is_given_out_piece_by_piece(line: Line) -> None:
    data = os.urandom(1000)
    line.wire.send(line.send(data))
    assert b"".join(line.receive(300) for _ in range(4)) == data


def test_a_record_as_large_as_the_room_is_opened_into_it(line: Line) -> None:
    line.wire.send(line.send(b"x" * 1000))
    memory = memoryview(bytearray(3000))
    assert line.receiver.recv_into(memory[1000:], 2000) == 1000
    assert bytes(memory) == bytes(1000) + b"x" * 1000 + bytes(1000)


@pytest.mark.parametrize("at", [3, 4, 10, -1])
def test_a_changed_byte_ends_it(line: Line, at: int) -> None:
    out = bytearray(line.send(b"data" * 10))
    out[at] ^= 1
    line.wire.send(out + bytes(64))
    with pytest.raises(ProtocolError, match="does not open"):
        line.receive()


def test_a_record_sent_twice_left_out_or_exchanged_ends_it() -> None:
    for order in ([0, 0], [1], [1, 0]):
        line = Line()
        records = [line.send(b"first"), line.send(b"later")]
        for index in order:
            line.wire.send(records[index])
        if order == [0, 0]:
            assert line.receive() == b"first"
        with pytest.raises(ProtocolError, match="does not open"):
            line.receive()
        line.close()


def test_what_one_side_sent_cannot_be_turned_back_to_it(line: Line) -> None:
    line.tap.send(line.send(b"mirror"))
    memory = memoryview(bytearray(100))
    with pytest.raises(ProtocolError, match="does not open"):
        line.sender.recv_into(memory, 100)


def test_records_of_another_handshake_do_not_open(line: Line) -> None:
    other = Line(secrets=os.urandom(96))
    line.wire.send(other.send(b"replayed"))
    other.close()
    with pytest.raises(ProtocolError, match="does not open"):
        line.receive()


@pytest.mark.parametrize("num_bytes", [0, MAX_RECORD_BYTES + 1, (1 << 32) - 1])
def test_a_record_over_the_cap_is_refused_from_its_length(line: Line, num_bytes: int) -> None:
    line.wire.send(num_bytes.to_bytes(4, "big"))
    with pytest.raises(ProtocolError, match=f"a sealed record of {num_bytes} bytes"):
        line.receive()


def test_the_end_of_the_stream_is_told(line: Line) -> None:
    line.wire.send(line.send(b"last")[:-1])
    line.wire.close()
    with pytest.raises(SSL.ZeroReturnError):
        line.receive()


def test_an_idle_connection_holds_little_memory_and_a_busy_one_what_a_record_takes(line: Line) -> None:
    def held(stream: SealedStream) -> int:
        return sum(len(memory) for memory in (stream._incoming, stream._opened, stream._outgoing))

    assert held(line.sender) + held(line.receiver) < 32 << 10
    for num_bytes in (10, 9000, MAX_RECORD_BYTES, 10):
        data = os.urandom(num_bytes)
        line.wire.send(line.send(data))
        assert line.receive() == data
    assert held(line.sender) + held(line.receiver) < 3 * MAX_RECORD_BYTES


def test_a_full_socket_holds_the_record_until_it_comes_again(line: Line) -> None:
    data = memoryview(os.urandom(MAX_RECORD_BYTES))
    num_sent = 0

    def fill() -> None:
        nonlocal num_sent
        while True:
            line.sender.send(data)
            num_sent += 1

    with pytest.raises(SSL.WantWriteError):
        fill()
    got = b""
    while True:
        try:
            got += line.tap.recv(1 << 20)
        except BlockingIOError:
            break
    assert line.sender.send(data) == len(data)
    got += line.tap.recv(8 << 20)
    assert len(got) == (num_sent + 1) * (len(data) + 20)


def test_both_sides_change_keys_after_as_many_records() -> None:
    one, other = TrafficKey(bytes(48), records_per_key=3), TrafficKey(bytes(48), records_per_key=3)
    length, seen = memoryview(b"\0\0\0\4"), set()
    for _ in range(10):
        sealed_bytes, opened = memoryview(bytearray(20)), memoryview(bytearray(4))
        one.seal(memoryview(b"same"), length, sealed_bytes)
        other.open(sealed_bytes, length, opened)
        assert opened == b"same"
        seen.add(bytes(sealed_bytes))
    assert len(seen) == 10


def test_no_key_seals_more_than_tls_allows() -> None:
    blocks = sealed.RECORDS_PER_KEY * MAX_RECORD_BYTES // 16
    assert blocks <= 1 << 34  # RFC 8446, 5.5: 2^24.5 records of 2^10 blocks
