"""What this node signed, durable before it is sent: a restart never signs a second version of anything.

One append-only file of `u32 length | u32 crc32 | key | digest` entries, fsynced before `once` returns. A torn tail
(the machine died while writing) is cut off at start; what it held was never sent.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from pathlib import Path

from smartnodes_core.errors import LocalError

_HEAD = struct.Struct(">II")
_MAX_ENTRY_BYTES = 4096


class EquivocationError(LocalError):
    """Signing this would contradict something already signed."""

    code = "equivocation"


class Journal:
    """Remembers, per `scope` (such as "commitment/<job>/<step>"), the one digest that was signed.

    `path` None keeps it in memory only, for tests.
    """

    def __init__(self, path: Path | None):
        self._lock = threading.Lock()
        self._signed: dict[str, bytes] = {}
        self._file = None
        if path is not None:
            good = self._replay(path)
            self._file = open(path, "ab")  # noqa: SIM115 - lives as long as the journal
            self._file.truncate(good)

    def once(self, scope: str, digest: bytes) -> None:
        """Record that `digest` is signed for `scope`; the same digest again is fine.

        Raises EquivocationError where another one was signed before.
        """
        with self._lock:
            before = self._signed.get(scope)
            if before == digest:
                return
            if before is not None:
                raise EquivocationError(f"{scope}: {before.hex()[:16]} was signed before, not {digest.hex()[:16]}")
            if self._file is not None:
                entry = scope.encode() + b"\0" + digest
                self._file.write(_HEAD.pack(len(entry), zlib.crc32(entry)) + entry)
                self._file.flush()
                os.fsync(self._file.fileno())
            self._signed[scope] = digest

    def signed(self, scope: str) -> bytes | None:
        """The digest signed for `scope`, or None."""
        with self._lock:
            return self._signed.get(scope)

    def count(self, prefix: str) -> int:
        """How many scopes begin with `prefix`: after a restart, how far a numbering had come."""
        with self._lock:
            return sum(scope.startswith(prefix) for scope in self._signed)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _replay(self, path: Path) -> int:
        """Read every whole entry; returns the bytes they take."""
        data = path.read_bytes() if path.exists() else b""
        at = 0
        while at + _HEAD.size <= len(data):
            length, crc = _HEAD.unpack_from(data, at)
            entry = data[at + _HEAD.size : at + _HEAD.size + length]
            if length > _MAX_ENTRY_BYTES or len(entry) < length or zlib.crc32(entry) != crc:
                break
            self._signed[entry[:-33].decode()] = entry[-32:]
            at += _HEAD.size + length
        return at
