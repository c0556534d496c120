"""Messages between a node and its computing process: `u32 length` (big-endian) and a msgpack map, over a socket pair.

Both sides distrust the other: a message is capped before it is read and its shape is checked as it is decoded.
Neighbours: `sandbox.py` is the node's end, `sandbox_child.py` the child's.
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

import msgspec

from smartnodes_core.errors import ProtocolError

#: Programs of large models are the largest messages; tensors never travel here.
MAX_MESSAGE_BYTES = 128 << 20
#: What is held is written once it is more than this.
MAX_HELD_BYTES = 16 << 10

_LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """`type` "call" is answered by "result" or "error" of the same `id`; "post" and "event" are one-way."""

    type: str
    id: int = 0
    name: str = ""
    params: dict[str, Any] = {}


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class Pipe:
    """One end. Any thread may send; one thread receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader = end.makefile("rb", buffering=1 << 16)
        self._sending = threading.Lock()
        self._held = b""

    def send(self, message: Message, *, hold: bool = False) -> None:
        """Writes one message, after those that are held; with `hold` it may wait for the next one, or for `flush`.

        Raises ProtocolError if it is over the cap, OSError if the other end is gone or stuck. After an OSError the
        stream is torn and good for nothing more.
        """
        data = _encoder.encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise ProtocolError(
                f"{message.name or message.type}: a message of {len(data)} bytes, at most {MAX_MESSAGE_BYTES} "
                "are sent: large data belongs in shared memory"
            )
        with self._sending:
            self._held += _LENGTH.pack(len(data)) + data
            if not hold or len(self._held) > MAX_HELD_BYTES:
                self._write_held()

    def flush(self) -> None:
        """Writes what is held. Raises OSError as `send` does."""
        with self._sending:
            if self._held:
                self._write_held()

    def _write_held(self) -> None:
        held, self._held = self._held, b""
        self._socket.sendall(held)

    def receive(self) -> Message | None:
        """The next message; None when the other end is closed. Raises ProtocolError for anything malformed."""
        head = self._read(_LENGTH.size)
        if head is None:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a message of {length} bytes: at most {MAX_MESSAGE_BYTES} are read")
        data = self._read(length)
        if data is None:
            return None
        try:
            return _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"a malformed message: {error}") from None

    def close(self) -> None:
        """Closes this end; the other end's `receive` returns None."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it was closed by the other end, or by us before
        finally:
            self._socket.close()

    def _read(self, num_bytes: int) -> bytes | None:
        try:
            data = self._reader.read(num_bytes)
        except (OSError, ValueError):  # ValueError: closed by another thread of ours
            return None
        return data if len(data) == num_bytes else None
