"""Tensors that cross in pieces over several connections at once, where one alone is held back by losses on the way.

A piece's header names its transfer, where it lies, and the whole's size: whichever comes first has the memory
allocated, and all are read straight into it. The whole is complete when each of its pieces has come exactly once. When
one of the connections ends, so do the others to that peer, and the transfer with them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from smartnodes_core.errors import BusyError, DeadlineError, ProtocolError, SmartnodesError
from smartnodes_core.transport.base import Connection, Peer
from smartnodes_core.wire import byte_views

PIECE_BYTES = 1 << 20
MIN_STRIPED_BYTES = 2 * PIECE_BYTES
MAX_TRANSFERS_PER_PEER = 64
ALLOCATION_TIMEOUT_S = 60.0

_transfer_ids = itertools.count(1)


class Countdown:
    """Calls `then` once, when `done` was called `count` times."""

    def __init__(self, count: int, then: Callable[[], None] | None) -> None:
        self._left, self._then, self._lock = count, then, threading.Lock()

    def done(self, count: int = 1) -> None:
        """So many more are done."""
        with self._lock:
            self._left -= count
            last = self._left == 0
        if last and self._then is not None:
            self._then()


def send_striped(
    connections: Sequence[Connection],
    header: dict[str, Any],
    body: Sequence[bytes | bytearray | memoryview],
    on_sent: Callable[[], None] | None,
    timeout_s: float,
) -> None:
    """Sends a frame in pieces over all `connections` in turn. Errors and `on_sent` as `Connection.send`; an error after
    the first piece went out ends the connections instead."""
    views = byte_views(body)
    size = sum(view.nbytes for view in views)
    offsets = range(0, size, PIECE_BYTES)
    countdown = Countdown(len(offsets), on_sent)
    transfer = next(_transfer_ids)
    pieces = _cut(views)
    for number, (offset, piece) in enumerate(zip(offsets, pieces, strict=True)):
        connection = connections[number % len(connections)]
        try:
            connection.send({**header, "piece": [transfer, offset, size]}, piece, countdown.done, timeout_s)
        except SmartnodesError as error:
            if not number:
                raise
            for each in connections:
                each.close(f"a tensor could not be sent whole: {error}")
            countdown.done(len(offsets) - number)
            return


def _cut(views: list[memoryview]) -> Iterator[list[memoryview]]:
    """Pieces of PIECE_BYTES, the last one shorter; each may consist of parts of several views."""
    piece: list[memoryview] = []
    room = PIECE_BYTES
    for whole in views:
        view = whole
        while view.nbytes:
            part = view[:room]
            piece.append(part)
            view, room = view[part.nbytes :], room - part.nbytes
            if not room:
                yield piece
                piece, room = [], PIECE_BYTES
    if piece:
        yield piece


@dataclass
class Transfer:
    """One tensor on its way in. `memory` is None once `ready`, when the receiver did not want it."""

    topic: str
    fields: dict[str, Any]
    size: int
    memory: memoryview | None = None
    ready: threading.Event = field(default_factory=threading.Event)
    announced: set[int] = field(default_factory=set)
    num_left: int = 0


class Transfers:
    """Tensors on their way in, of all peers. Called on the connections' threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_peer: dict[bytes, dict[int, Transfer]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of_peer.values()))

    def allocate(
        self,
        peer: Peer,
        header: dict[str, Any],
        num_bytes: int,
        allocate: Callable[[Peer, dict[str, Any], int], memoryview | None],
    ) -> memoryview | None:
        """Where the piece that `header` announces belongs; `allocate` gives memory for the whole, asked once.

        Raises ProtocolError for a piece that fits no transfer, or comes twice, BusyError for too many transfers.
        """
        number, offset, size = _piece_of(peer, header, num_bytes)
        with self._lock:
            transfers = self._of_peer.setdefault(peer.node_key, {})
            transfer = transfers.get(number)
            first = transfer is None
            if transfer is None:
                if len(transfers) >= MAX_TRANSFERS_PER_PEER:
                    raise ProtocolError(f"{peer} began more than {MAX_TRANSFERS_PER_PEER} tensors and finished none")
                transfer = Transfer(header["topic"], header["header"], size, num_left=-(-size // PIECE_BYTES))
                transfers[number] = transfer
            if transfer.size != size or transfer.topic != header["topic"] or offset in transfer.announced:
                raise ProtocolError(f"{peer} sent a piece of a tensor twice, or of another one")
            transfer.announced.add(offset)
        if first:
            try:
                transfer.memory = allocate(peer, transfer.fields, size)
            except SmartnodesError:
                self.arrived(peer, header)
                raise
            finally:
                transfer.ready.set()
        elif not transfer.ready.wait(ALLOCATION_TIMEOUT_S):
            raise DeadlineError(f"no memory was given for a tensor of {peer}")
        # what the receiver keeps with the header lives as long as somebody still writes to the memory
        header["header"] = transfer.fields
        if transfer.memory is None:
            self.arrived(peer, header)
            return None
        return transfer.memory[offset : offset + num_bytes]

    def arrived(self, peer: Peer, header: dict[str, Any]) -> Transfer | None:
        """A piece is in, or was skipped; the whole, when that was the last one."""
        with self._lock:
            transfers = self._of_peer.get(peer.node_key, {})
            transfer = transfers.get(header["piece"][0])
            if transfer is None:
                raise BusyError(f"a tensor of {peer} was given up")
            transfer.num_left -= 1
            if transfer.num_left:
                return None
            del transfers[header["piece"][0]]
        return transfer

    def forget(self, peer: Peer) -> None:
        """A connection of the peer ended: nothing that it began will be whole."""
        with self._lock:
            self._of_peer.pop(peer.node_key, None)


def _piece_of(peer: Peer, header: dict[str, Any], num_bytes: int) -> tuple[int, int, int]:
    piece = header["piece"]
    if not isinstance(piece, list) or len(piece) != 3 or any(type(value) is not int for value in piece):
        raise ProtocolError(f"{peer} sent a malformed piece of a tensor")
    number, offset, size = piece
    if not 0 <= offset < size or offset % PIECE_BYTES or num_bytes != min(PIECE_BYTES, size - offset):
        raise ProtocolError(f"{peer} sent a piece of {num_bytes} bytes at {offset} of a tensor of {size}")
    return number, offset, size
