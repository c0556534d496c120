"""Where an auditor keeps evidence of fraud: on disk before anybody is told, so that a restart or a power cut leaves no
verdict behind that nobody can re-run.

One file for each, named by its digest, in the form of `smartnodes_core/evidence.py`; the verdict follows when it is
signed. A file appears whole or not at all; the oldest go when there are too many.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from smartnodes_core.errors import LocalError, RecordError
from smartnodes_core.evidence import HEAD, MAX_EVIDENCE_BYTES, mapped, split
from smartnodes_core.journal import DRAFT, write_durably
from smartnodes_core.records import Digest, Evidence

MAX_KEPT = 64
_SUFFIX = ".evidence"


class EvidenceShelf:
    """`folder` keeps the files (None: in memory only, for tests). Thread-safe. Raises LocalError where the folder
    cannot be used."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._lock = threading.Lock()
        self._sizes: dict[Digest, int] = {}  # the oldest first
        self._in_memory: dict[Digest, bytes] = {}
        if folder is not None:
            self._sizes = _read(folder)

    def put(self, evidence: Evidence, body: memoryview) -> Digest:
        """Keep evidence with the opened bytes; returns its digest when both are durable. Raises LocalError."""
        digest, record = evidence.digest(), evidence.encode()
        parts = (HEAD.pack(len(record)), record, body)
        with self._lock:
            if self._folder is None:
                self._in_memory[digest] = b"".join(parts)
            else:
                write_durably(self._path(digest), *parts)
            self._sizes[digest] = sum(len(part) for part in parts)
            while len(self._sizes) > MAX_KEPT or (
                len(self._sizes) > 1 and sum(self._sizes.values()) > MAX_EVIDENCE_BYTES
            ):
                self._drop(next(iter(self._sizes)))
        return digest

    def get(self, digest: Digest) -> tuple[bytes, memoryview]:
        """The encoded record and the opened bytes. Raises RecordError where they are not kept here, or damaged."""
        with self._lock:
            if digest not in self._sizes:
                raise RecordError("no such evidence is kept here")
            data = self._load(digest)
        parts = split(data)
        if parts.evidence.digest() != digest:
            raise RecordError(f"the file of evidence {digest.hex()} is damaged")
        return parts.evidence.encode(), parts.body

    def add_verdict(self, digest: Digest, signed_verdict: bytes) -> None:
        """Keep the signed verdict in the file of its evidence, durably. Raises RecordError where that is not kept here
        or has one, LocalError where it cannot be written."""
        with self._lock:
            if digest not in self._sizes:
                raise RecordError("no such evidence is kept here")
            if split(self._load(digest)).verdict:
                raise RecordError(f"the evidence {digest.hex()} has a verdict already")
            if self._folder is None:
                self._in_memory[digest] += signed_verdict
            else:
                _append(self._path(digest), signed_verdict)
            self._sizes[digest] += len(signed_verdict)

    def _load(self, digest: Digest) -> memoryview:
        if self._folder is None:
            return memoryview(self._in_memory[digest])
        try:
            return mapped(self._path(digest))
        except LocalError as error:
            raise RecordError(str(error)) from None

    def _drop(self, digest: Digest) -> None:
        del self._sizes[digest]
        self._in_memory.pop(digest, None)
        if self._folder is not None:
            self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: Digest) -> Path:
        assert self._folder is not None
        return self._folder / f"{digest.hex()}{_SUFFIX}"


def _append(path: Path, data: bytes) -> None:
    """All of `data` at the end of the file, on disk. Raises LocalError."""
    try:
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise LocalError(f"{path} cannot be written: {error.strerror}") from None


def _read(folder: Path) -> dict[Digest, int]:
    """The sizes of what is kept by digest, the oldest first; what was being written when the node died is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for draft in folder.glob(f"*{DRAFT}"):
            draft.unlink()
        files = sorted((path.stat().st_mtime_ns, path.stem, path.stat().st_size) for path in folder.glob(f"*{_SUFFIX}"))
        return {bytes.fromhex(name): num_bytes for _, name, num_bytes in files}
    except OSError as error:
        raise LocalError(f"the evidence in {folder} cannot be read: {error.strerror}") from None
    except ValueError:
        raise LocalError(f"a file in {folder} ends in {_SUFFIX} but is not named by a digest: remove it") from None
