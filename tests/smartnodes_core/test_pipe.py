"""Messages of the pipe: what is held goes out in order, and with whatever follows it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from smartnodes_core.pipe import MAX_HELD_BYTES, Message, Pipe

Pair = tuple[Pipe, Pipe, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    pipes = Pipe(ours), Pipe(theirs)
    yield *pipes, theirs
    for pipe in pipes:
        pipe.close()


def anything_to_read(end: socket.socket) -> bool:
    end.setblocking(False)
    try:
        return bool(end.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        end.setblocking(True)


def test_what_is_held_goes_before_the_next_message(pair: Pair) -> None:
    sender, receiver, end = pair
    sender.send(Message("event", 0, "a", {"n": 1}), hold=True)
    sender.send(Message("event", 0, "b", {}), hold=True)
    assert not anything_to_read(end)
    sender.send(Message("event", 0, "c", {}))
    found = [receiver.receive() for _ in range(3)]
    assert [message.name for message in found if message] == ["a", "b", "c"]


def test_what_is_held_goes_with_a_flush(pair: Pair) -> None:
    sender, receiver, end = pair
    sender.flush()
    sender.send(Message("event", 0, "a", {}), hold=True)
    assert not anything_to_read(end)
    sender.flush()
    found = receiver.receive()
    assert found is not None
    assert found.name == "a"


def test_only_so_much_is_held(pair: Pair) -> None:
    sender, receiver, _ = pair
    sender.send(Message("event", 0, "a", {"data": bytes(MAX_HELD_BYTES)}), hold=True)
    found = receiver.receive()
    assert found is not None
    assert found.name == "a"
