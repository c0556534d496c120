"""What the devnet never forgets: every transaction and its time, on disk before the sender hears of it.

A magic line and 16 random bytes, then entries `u32 length | u32 crc32 | u8 kind | u64 seconds | payload`, each appended
and fsynced. A torn tail, left by a kill in the middle of a write, is cut off at start: nobody was told of it.
Damage before the tail is refused. One process at a time: the file is locked while it is open.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from io import FileIO
from pathlib import Path

from smartnodes_core.errors import ConfigError
from smartnodes_core.journal import make_durable

MAX_TRANSACTION_BYTES = 1 << 20
_HEAD = struct.Struct(">II")
_BODY = struct.Struct(">BQ")
_MAX_ENTRY_BYTES = _BODY.size + MAX_TRANSACTION_BYTES
_MARK = struct.Struct(f">Q{_HEAD.size}s")
_MAGIC = b"smartnodes devnet 2\n"
_OLD_MAGIC = b"smartnodes devnet 1\n"
_ID_BYTES = 16
_START = len(_MAGIC) + _ID_BYTES


class Kind(IntEnum):
    TRANSACTION = 1
    EMPTY_BLOCK = 2
    SHIFT_TIME = 3


@dataclass(frozen=True)
class Entry:
    """`at_s` is the block's timestamp, or for SHIFT_TIME the seconds the clock was moved on by."""

    kind: Kind
    at_s: int
    payload: bytes = b""


class DevnetJournal:
    """Opens or begins the journal at `path`; what survived is in `replay`. `id` are 16 bytes that no other journal has;
    `position` is the end of the last entry replayed or appended.

    Raises ConfigError where the file is another's, in use or not writable.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
        except OSError as error:
            raise ConfigError(f"the journal {path} cannot be opened: {error.strerror}") from None
        try:
            self.id = self._claim()
        except BaseException:
            self._file.close()
            raise
        self.position = _START
        self._last = _MARK.pack(0, bytes(_HEAD.size))

    def mark(self) -> bytes:
        """Where the last entry lies, and its checksum: with `id`, what tells this journal from a copy that went on
        differently."""
        return self._last

    def goes_on_after(self, position: int, mark: bytes) -> bool:
        """Whether a whole entry with this mark ends at `position`, so that `replay` may begin there."""
        start, head = _MARK.unpack(mark)
        if start == 0:
            return position == _START
        entry = self._entry_at(start)
        return entry is not None and entry[0] == head and start + _HEAD.size + len(entry[1]) == position

    def skip_to(self, position: int, mark: bytes) -> None:
        """Lets `replay` begin there."""
        self.position, self._last = position, mark

    def replay(self) -> Iterator[Entry]:
        """The entries from `position` on; then the torn tail is cut off. Raises ConfigError at damage in the middle."""
        while (found := self._entry_at(self.position)) is not None:
            head, body = found
            kind, at_s = _BODY.unpack_from(body)
            self._last = _MARK.pack(self.position, head)
            self.position += len(head) + len(body)
            yield Entry(Kind(kind), at_s, body[_BODY.size :])
        tail = self._read(self.position, self._size() - self.position)
        if any(tail) and (len(tail) > _HEAD.size + _MAX_ENTRY_BYTES or self._goes_on(len(tail))):
            raise ConfigError(
                f"the journal {self.path} is damaged at byte {self.position}, and goes on behind it: restore it from a "
                "backup, or begin a new one"
            )
        self._file.truncate(self.position)
        self._sync()

    def append(self, entry: Entry) -> None:
        """Durable when it returns. Raises OSError where it cannot be."""
        body = _BODY.pack(entry.kind, entry.at_s) + entry.payload
        head = _HEAD.pack(len(body), zlib.crc32(body))
        self._write(self.position, head + body)
        self._last = _MARK.pack(self.position, head)
        self.position += len(head) + len(body)

    def close(self) -> None:
        self._file.close()

    def _claim(self) -> bytes:
        """Locks the file and reads its head, or writes it into a file that has none."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{self.path}: another devnet has this journal open; name another file or end it"
            ) from None
        head = self._read(0, _START)
        if head.startswith(_MAGIC) and len(head) == _START:
            return head[len(_MAGIC) :]
        if head.startswith(_OLD_MAGIC):
            raise ConfigError(f"{self.path} is a journal of an earlier version: name a new file")
        if not (_MAGIC.startswith(head) or head.startswith(_MAGIC)):
            raise ConfigError(f"{self.path} is not a devnet journal: name a new file")
        identifier = secrets.token_bytes(_ID_BYTES)
        self._write(0, _MAGIC + identifier)
        make_durable(self.path.parent)
        return identifier

    def _entry_at(self, position: int) -> tuple[bytes, bytes] | None:
        """Head and body of the whole, undamaged entry at `position`."""
        head = self._read(position, _HEAD.size)
        if len(head) < _HEAD.size:
            return None
        length, crc = _HEAD.unpack(head)
        if not _BODY.size <= length <= _MAX_ENTRY_BYTES:
            return None
        body = self._read(position + _HEAD.size, length)
        good = len(body) == length and zlib.crc32(body) == crc and body[0] in set(Kind)
        return (head, body) if good else None

    def _goes_on(self, tail_bytes: int) -> bool:
        return any(self._entry_at(self.position + offset) is not None for offset in range(1, tail_bytes))

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _read(self, position: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, position)

    def _write(self, position: int, data: bytes) -> None:
        written = 0
        while written < len(data):
            written += os.pwrite(self._file.fileno(), data[written:], position + written)
        self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
