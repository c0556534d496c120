"""What the devnet never forgets: every transaction and its time, on disk before the sender hears of it.

Entries `u32 length | u32 crc32 | u8 kind | u64 seconds | payload`, appended and fsynced. A torn tail, left by a kill in
the middle of a write, is cut off at start: nobody was told of it. One process at a time: the file is locked while it is
open.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from smartnodes_core.errors import ConfigError

_HEAD = struct.Struct(">II")
_BODY = struct.Struct(">BQ")
_MAGIC = b"smartnodes devnet 1\n"


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
    """Opens or begins the journal at `path`; `entries` are what survived. Raises ConfigError if it is not ours."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - lives as long as the journal
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(f"{path}: another devnet has this journal open; name another file or end it") from None
        self._file.seek(0)
        data = self._file.read()
        if data and not data.startswith(_MAGIC) and not _MAGIC.startswith(data):
            self._file.close()
            raise ConfigError(f"{path} is not a devnet journal: name a new file")
        self.entries = list(_whole_entries(data))
        end = len(_MAGIC) + sum(_HEAD.size + _BODY.size + len(entry.payload) for entry in self.entries)
        self.torn_bytes = max(0, len(data) - end)
        self._file.truncate(min(end, len(data)) if data.startswith(_MAGIC) else 0)
        if not data.startswith(_MAGIC):
            self._write(_MAGIC)

    def append(self, entry: Entry) -> None:
        """Durable when it returns."""
        body = _BODY.pack(entry.kind, entry.at_s) + entry.payload
        self._write(_HEAD.pack(len(body), zlib.crc32(body)) + body)

    def close(self) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())


def _whole_entries(data: bytes) -> Iterator[Entry]:
    position = len(_MAGIC)
    while position + _HEAD.size <= len(data):
        length, crc = _HEAD.unpack_from(data, position)
        body = data[position + _HEAD.size : position + _HEAD.size + length]
        if length < _BODY.size or len(body) < length or zlib.crc32(body) != crc:
            return
        kind, at_s = _BODY.unpack_from(body)
        if kind not in set(Kind):
            return
        yield Entry(Kind(kind), at_s, body[_BODY.size :])
        position += _HEAD.size + length
