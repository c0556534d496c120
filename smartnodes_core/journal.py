"""What this node signed, durable before it is sent: a restart never signs a second version of anything.

One append-only file of `u32 length | u32 crc32 | scope | 0 | digest` entries, each on disk before `once` returns. A
torn tail (the machine died while writing) is cut off at start; what it held was never sent. Damage anywhere else would
make a node forget what it signed, so a journal with it is refused.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from io import FileIO
from pathlib import Path

from smartnodes_core.errors import LocalError

#: What the name of a file that is being written ends in (`write_durably`).
DRAFT = ".draft"
_HEAD = struct.Struct(">II")
_DIGEST_BYTES = 32
_MIN_ENTRY_BYTES = 1 + _DIGEST_BYTES
_MAX_ENTRY_BYTES = 4096


class EquivocationError(LocalError):
    """Signing this would contradict something already signed."""

    code = "equivocation"


class Journal:
    """Remembers, per `scope` (such as "commitment/<job>/<step>"), the one digest (32 bytes) that was signed.

    `path` None keeps it in memory only, for tests. Raises LocalError where the file cannot be used: another process
    has it open, or it is damaged.
    """

    def __init__(self, path: Path | None):
        self._lock = threading.Lock()
        self._signed: dict[str, bytes] = {}
        self._file: FileIO | None = None
        self._path, self._closed = path, False
        self._size = 0
        if path is not None:
            self._open(path)

    def once(self, scope: str, digest: bytes) -> None:
        """Record that `digest` is signed for `scope`; the same digest again is fine.

        Raises EquivocationError where another one was signed before, LocalError where it cannot be written: then it
        is not signed.
        """
        entry = scope.encode() + b"\0" + digest
        if len(digest) != _DIGEST_BYTES or len(entry) > _MAX_ENTRY_BYTES:
            raise LocalError(f"the journal takes digests of 32 bytes and short scopes, not {len(digest)}, {len(scope)}")
        with self._lock:
            before = self._signed.get(scope)
            if before == digest:
                return
            if before is not None:
                raise EquivocationError(f"{scope}: {before.hex()[:16]} was signed before, not {digest.hex()[:16]}")
            if self._closed:
                raise LocalError(f"the journal {self._path} is closed: nothing more is signed")
            if self._file is not None:
                self._append(self._file, _HEAD.pack(len(entry), zlib.crc32(entry)) + entry)
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
        """Gives the file back: what would be signed after is refused. Harmless twice."""
        with self._lock:
            self._closed = self._path is not None
            if self._file is not None:
                self._file.close()
                self._file = None

    def _open(self, path: Path) -> None:
        file: FileIO | None = None
        try:
            file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
            _lock_file(file, path)
            self._size = self._replay(path.read_bytes(), path)
            file.truncate(self._size)
            file.seek(self._size)
            os.fsync(file.fileno())
            make_durable(path.parent)
        except BaseException as error:
            if file is not None:
                file.close()
            if isinstance(error, OSError):
                raise LocalError(f"the journal {path} cannot be used: {error.strerror}") from None
            raise
        self._file = file

    def _append(self, file: FileIO, data: bytes) -> None:
        """All of `data` on disk, or none: a half-written entry would hide every one that follows it."""
        try:
            if file.write(data) != len(data):
                raise OSError(0, "no room")
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(self._size)
            file.seek(self._size)
            raise LocalError(f"the journal cannot be written ({error.strerror}): nothing more is signed") from None
        self._size += len(data)

    def _replay(self, data: bytes, path: Path) -> int:
        """Read every whole entry; returns the bytes they take. Raises LocalError where one follows a damaged one."""
        at = 0
        while (entry := _entry_at(data, at)) is not None:
            self._signed[entry[: -_DIGEST_BYTES - 1].decode(errors="surrogateescape")] = entry[-_DIGEST_BYTES:]
            at += _HEAD.size + len(entry)
        tail = data[at:]
        whole_later = any(_entry_at(tail, offset) is not None for offset in range(1, len(tail)))
        if len(tail) > _HEAD.size + _MAX_ENTRY_BYTES or whole_later:
            raise LocalError(
                f"the journal {path} is damaged at byte {at}: restore it from a backup; without it this node could "
                "sign a second version of what it has signed, so it would need a new identity"
            )
        return at


def _entry_at(data: bytes, at: int) -> bytes | None:
    """The whole, undamaged entry that begins at `at`."""
    if at + _HEAD.size > len(data):
        return None
    length, crc = _HEAD.unpack_from(data, at)
    entry = data[at + _HEAD.size : at + _HEAD.size + length]
    good = _MIN_ENTRY_BYTES <= length <= _MAX_ENTRY_BYTES and len(entry) == length and zlib.crc32(entry) == crc
    return entry if good else None


def _lock_file(file: FileIO, path: Path) -> None:
    """Two processes with one journal would each sign a version of their own. Raises LocalError."""
    try:
        import fcntl  # not on every platform
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LocalError(f"the journal {path} is in use: another node runs with this data directory") from None


def is_in_use(path: Path) -> bool:
    """Whether a node runs with the journal at `path`; False where the system does not tell."""
    try:
        with FileIO(path, "r") as file:
            _lock_file(file, path)
    except LocalError:
        return True
    except OSError:
        return False
    return False


def make_durable(path: Path) -> None:
    """Everything of a file, or of a folder's names, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, *parts: bytes | memoryview) -> None:
    """A file of `parts`: all of it on disk, name included, or nothing of it. Raises LocalError."""
    draft = path.with_suffix(DRAFT)
    try:
        with open(draft, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        make_durable(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise LocalError(f"{path} cannot be written: {error.strerror}") from None
