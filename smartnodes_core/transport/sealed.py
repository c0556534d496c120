"""Bulk connections: sealed records on a TCP stream whose keys come from the TLS handshake that was made on it.

    u32 length of the plaintext (big-endian) | AES-256-GCM of the plaintext, with the length as associated data | tag

TLS cuts what it sends into records of 16 KiB, and crosses into C for each; here a record holds up to MAX_RECORD_BYTES
and is opened straight into the memory that a tensor was promised. The frames inside, headers included, are sealed, so
that who carries the stream sees lengths alone. Each direction has a key of its own (RFC 5705 exporter, expanded as in
RFC 8446, 7.3), nonces count records, and after RECORDS_PER_KEY both sides move on to the next key (as RFC 8446, 7.2):
at most 2^34 blocks are sealed under one, what TLS allows. A record that is changed, left out, repeated or out of place
does not open and ends the connection.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL

from smartnodes_core.errors import ProtocolError

MAX_RECORD_BYTES: Final = 512 << 10
RECORDS_PER_KEY: Final = 1 << 19
_EXPORTER_LABEL = b"EXPORTER smartnodes bulk 1"
_SECRET_BYTES, _NONCE_BYTES, _TAG_BYTES = 48, 12, 16
_MAX_LOW_WATER_BYTES = 64 << 10  # well within any receive buffer, which has to hold that much for us to wake
_FIRST_BYTES = 4 << 10
_LENGTH = struct.Struct(">I")


class TrafficKey:
    """The key of one direction, and which record comes next."""

    def __init__(self, secret: bytes, records_per_key: int = RECORDS_PER_KEY) -> None:
        self._records_per_key = records_per_key
        self._begin(secret)

    def _begin(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = AESGCM(_expand(secret, b"key", 32))
        self._salt = int.from_bytes(_expand(secret, b"iv", _NONCE_BYTES), "big")
        self._count = 0

    def _next_nonce(self) -> bytes:
        if self._count == self._records_per_key:
            self._begin(_expand(self._secret, b"traffic upd", _SECRET_BYTES))
        nonce = (self._salt ^ self._count).to_bytes(_NONCE_BYTES, "big")
        self._count += 1
        return nonce

    def seal(self, plaintext: memoryview, length: memoryview, into: memoryview) -> None:
        """Writes the sealed `plaintext` and its tag to `into`, which has room for just that."""
        self._cipher.encrypt_into(self._next_nonce(), plaintext, length, into)

    def open(self, sealed: memoryview, length: memoryview, into: memoryview) -> None:
        """Writes the plaintext of `sealed`, tag included, to `into`. Raises ProtocolError where it does not open."""
        try:
            self._cipher.decrypt_into(self._next_nonce(), sealed, length, into)
        except InvalidTag:
            raise ProtocolError("a sealed record does not open: changed, repeated or left out on the way") from None


def _expand(secret: bytes, label: bytes, num_bytes: int) -> bytes:
    info = b"smartnodes bulk 1 " + label
    return HKDFExpand(algorithm=SHA384(), length=num_bytes, info=info).derive(secret)


def _grown(memory: memoryview, num_bytes: int) -> memoryview:
    """`memory`, or larger memory with the same beginning when it has not `num_bytes`."""
    if len(memory) >= num_bytes:
        return memory
    larger = memoryview(bytearray(num_bytes))
    larger[: len(memory)] = memory
    return larger


def secrets_of(tls: SSL.Connection) -> bytes:
    """What only the two ends of a finished handshake know; both get the same."""
    return tls.export_keying_material(_EXPORTER_LABEL, 2 * _SECRET_BYTES)


class SealedStream:
    """Reads and writes as a TLS object does: non-blocking, WantReadError and WantWriteError when the socket is not
    ready. `secrets` are those of the handshake that was made on `tcp`.
    """

    def __init__(self, tcp: socket.socket, secrets: bytes, *, dialled: bool) -> None:
        of_dialler, of_listener = secrets[:_SECRET_BYTES], secrets[_SECRET_BYTES:]
        self._tcp = tcp
        self._sending = TrafficKey(of_dialler if dialled else of_listener)
        self._receiving = TrafficKey(of_listener if dialled else of_dialler)
        # a record, and the length of the next one, which comes in the same read; all grow with the records that come
        self._incoming = memoryview(bytearray(_FIRST_BYTES))
        self._num_incoming = 0
        self._low_water_bytes = 1
        self._opened = memoryview(bytearray())
        self._unread = self._opened[:0]
        self._outgoing = memoryview(bytearray(_FIRST_BYTES))
        self._unsent = self._outgoing[:0]

    def recv_into(self, buffer: memoryview, nbytes: int) -> int:
        """Up to `nbytes` bytes of plaintext. Raises WantReadError, ZeroReturnError at the end, ProtocolError."""
        while not self._unread:
            direct = self._read_record(buffer[: min(nbytes, len(buffer))])
            if direct:
                return direct
        count = min(len(self._unread), nbytes, len(buffer))
        buffer[:count] = self._unread[:count]
        self._unread = self._unread[count:]
        return count

    def _read_record(self, buffer: memoryview) -> int:
        """Reads one record: into `buffer` where it fits, and returns how long it is; else into `_unread`."""
        prefix = self._incoming[: _LENGTH.size]
        while self._num_incoming < _LENGTH.size:
            self._fill(_LENGTH.size)
        num_bytes = int.from_bytes(prefix, "big")
        if not 0 < num_bytes <= MAX_RECORD_BYTES:
            raise ProtocolError(f"a sealed record of {num_bytes} bytes: 1 to {MAX_RECORD_BYTES} are read")
        end = _LENGTH.size + num_bytes + _TAG_BYTES
        self._incoming = _grown(self._incoming, end + _LENGTH.size)
        prefix = self._incoming[: _LENGTH.size]
        while self._num_incoming < end:
            self._fill(end + _LENGTH.size)
        direct = num_bytes <= len(buffer)
        if not direct:
            self._opened = _grown(self._opened, num_bytes)
        plaintext = buffer[:num_bytes] if direct else self._opened[:num_bytes]
        self._receiving.open(self._incoming[_LENGTH.size : end], prefix, plaintext)
        left = self._num_incoming - end
        self._incoming[:left] = self._incoming[end : self._num_incoming]
        self._num_incoming = left
        if direct:
            return num_bytes
        self._unread = plaintext
        return 0

    def _fill(self, end: int) -> None:
        """Reads once, up to `end` of the record's memory."""
        try:
            count = self._tcp.recv_into(self._incoming[self._num_incoming : end])
        except (BlockingIOError, InterruptedError):
            self._wait_for(end - _LENGTH.size - self._num_incoming)
            raise SSL.WantReadError from None
        if not count:
            raise SSL.ZeroReturnError
        self._num_incoming += count

    def _wait_for(self, num_bytes: int) -> None:
        """Has poll() wake us when `num_bytes` have come, not for each packet of a record that cannot be opened yet."""
        num_bytes = max(1, min(num_bytes, _MAX_LOW_WATER_BYTES))
        if num_bytes != self._low_water_bytes:
            self._low_water_bytes = num_bytes
            self._tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)

    def send(self, piece: memoryview) -> int:
        """Sends up to MAX_RECORD_BYTES of `piece`; how many. After WantWriteError the same piece has to come again."""
        piece = piece[:MAX_RECORD_BYTES]
        if not self._unsent:
            end = _LENGTH.size + len(piece) + _TAG_BYTES
            self._outgoing = _grown(self._outgoing, end)
            length = self._outgoing[: _LENGTH.size]
            _LENGTH.pack_into(length, 0, len(piece))
            self._sending.seal(piece, length, self._outgoing[_LENGTH.size : end])
            self._unsent = self._outgoing[:end]
        while self._unsent:
            try:
                self._unsent = self._unsent[self._tcp.send(self._unsent) :]
            except (BlockingIOError, InterruptedError):
                raise SSL.WantWriteError from None
        return len(piece)

    def shutdown(self) -> None:
        """Nothing more is sent; what was is still delivered."""
        self._tcp.shutdown(socket.SHUT_WR)
