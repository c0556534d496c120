"""What a devnet with a journal need not execute again: state, blocks and logs up to its last checkpoint.

One SQLite file beside the journal, opened in the same time however much is in it. All of it follows from the journal:
a checkpoint is one SQLite transaction, made after the journal's fsync, so a kill in the middle of it leaves the one
before, and a file that does not belong to the journal is emptied and filled again. Whoever deletes it loses time only.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from smartnodes_core.errors import ConfigError

_APPLICATION = 0x534E4F44  # "SNOD", in the file's header
_VERSION = 1
_HEADER = ("application_id", "user_version")
_MOST_WANTED = 100  # beyond, what is wanted is looked for in every block
_TABLES = """
CREATE TABLE checkpoint (journal BLOB, position INTEGER, mark BLOB, num_blocks INTEGER, shift_s INTEGER);
CREATE TABLE nodes (hash BLOB PRIMARY KEY, content BLOB) WITHOUT ROWID;
CREATE TABLE blocks (number INTEGER PRIMARY KEY, hash BLOB, mined BLOB, content BLOB);
CREATE INDEX blocks_by_hash ON blocks (hash);
CREATE INDEX blocks_by_transaction ON blocks (mined);
CREATE TABLE logs (address BLOB, topic BLOB, block INTEGER, PRIMARY KEY (address, topic, block)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Checkpoint:
    """Up to where the archive follows the journal, and how it recognises the journal: see `DevnetJournal.mark`."""

    journal: bytes
    position: int
    mark: bytes
    num_blocks: int
    shift_s: int


@dataclass(frozen=True)
class Row:
    """A block as it is kept; `mined` is its transaction's hash, `logs` the address and first topic of each log."""

    number: int
    hash: bytes
    mined: bytes | None
    content: bytes
    logs: Collection[tuple[bytes, bytes]]


class Archive:
    """Opens or begins the file at `path`. Thread-safe. Raises ConfigError where the file cannot be used."""

    def __init__(self, path: Path):
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._begin()
        except sqlite3.Error as error:
            raise ConfigError(
                f"{path} cannot be used ({error}): delete it, everything in it follows from the journal"
            ) from None

    def checkpoint(self) -> Checkpoint | None:
        """The last one; None in an empty archive."""
        with self._lock:
            found = self._db.execute("SELECT * FROM checkpoint").fetchone()
        return Checkpoint(*found) if found else None

    def save(self, checkpoint: Checkpoint, nodes: Mapping[bytes, bytes], blocks: Iterable[Row]) -> None:
        """Adds `nodes` and `blocks`, all of them or none. Raises sqlite3.Error where the disk refuses."""
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO nodes VALUES (?, ?)", nodes.items())
            for row in blocks:
                db.execute("INSERT INTO blocks VALUES (?, ?, ?, ?)", (row.number, row.hash, row.mined, row.content))
                places = [(address, topic, row.number) for address, topic in row.logs]
                db.executemany("INSERT OR IGNORE INTO logs VALUES (?, ?, ?)", places)
            db.execute("DELETE FROM checkpoint")
            db.execute("INSERT INTO checkpoint VALUES (?, ?, ?, ?, ?)", astuple(checkpoint))

    def clear(self) -> None:
        """Begins anew."""
        with self._transaction() as db:
            for table in ("checkpoint", "nodes", "blocks", "logs"):
                db.execute(f"DELETE FROM {table}")

    def node(self, key: bytes) -> bytes | None:
        content: bytes | None = self._one("SELECT content FROM nodes WHERE hash = ?", key)
        return content

    def block(self, number: int) -> bytes | None:
        content: bytes | None = self._one("SELECT content FROM blocks WHERE number = ?", number)
        return content

    def number_of_block(self, block_hash: bytes) -> int | None:
        number: int | None = self._one("SELECT number FROM blocks WHERE hash = ?", block_hash)
        return number

    def number_of_transaction(self, transaction_hash: bytes) -> int | None:
        number: int | None = self._one("SELECT number FROM blocks WHERE mined = ?", transaction_hash)
        return number

    def blocks_with_logs(
        self, first: int, last: int, addresses: Collection[bytes] | None, topics: Collection[bytes] | None
    ) -> list[int]:
        """The numbers of blocks that may hold logs of these addresses with these first topics; None is any."""
        query = "SELECT DISTINCT block FROM logs WHERE block BETWEEN ? AND ?"
        chosen: list[int | bytes] = [first, last]
        for column, wanted in (("address", addresses), ("topic", topics)):
            if wanted is not None and len(wanted) <= _MOST_WANTED:
                query += f" AND {column} IN ({','.join('?' * len(wanted))})"
                chosen += wanted
        with self._lock:
            return [number for (number,) in self._db.execute(query + " ORDER BY block", chosen)]

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _one(self, query: str, value: int | bytes) -> Any:
        with self._lock:
            found = self._db.execute(query, (value,)).fetchone()
        return found[0] if found else None

    def _begin(self) -> None:
        application, version = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in _HEADER)
        if (application, version) == (_APPLICATION, _VERSION):
            return
        if (application, version) != (0, 0) or self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise sqlite3.DatabaseError("it is not an archive of this version")
        with self._transaction() as db:
            for statement in _TABLES.split(";"):
                db.execute(statement)
            for name, value in zip(_HEADER, (_APPLICATION, _VERSION), strict=True):
                db.execute(f"PRAGMA {name} = {value}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise
