"""The chain's history and its clock: one block per transaction, as soon as it arrives.

Block times follow the wall clock (several blocks may share a second), and calls see the present second, because the
contracts reckon in time. With a journal the chain is rebuilt at start from the last checkpoint and what the journal
holds beyond it; without one it is in memory only.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

from smartnodes_core.chain.devnet.accounts import FUNDS_WEI, devnet_accounts
from smartnodes_core.chain.devnet.archive import Archive, Checkpoint
from smartnodes_core.chain.devnet.evm import Call, Evm, Outcome, RejectedTransaction
from smartnodes_core.chain.devnet.history import Block, History, Mined
from smartnodes_core.chain.devnet.journal import MAX_TRANSACTION_BYTES, DevnetJournal, Entry, Kind
from smartnodes_core.chain.devnet.nodes import NodeStore
from smartnodes_core.chain.signing import keccak
from smartnodes_core.errors import ChainError

ARCHIVE_SUFFIX = ".checkpoint"
CHECKPOINT_ENTRIES = 100
_LOG = logging.getLogger(__name__)


class Ledger:
    """Thread-safe. `clock` gives the wall clock in seconds; a checkpoint is made every `checkpoint_entries` entries of
    the journal, and when it is closed.
    """

    evm: Evm
    history: History

    def __init__(
        self,
        journal: DevnetJournal | None = None,
        clock: Callable[[], float] = time.time,
        checkpoint_entries: int = CHECKPOINT_ENTRIES,
    ):
        self._lock = threading.RLock()
        self._clock = clock
        self._shift_s = 0
        self._journal: DevnetJournal | None = None
        self._broken = False
        self._snapshots: list[int] = []  # numbers of the blocks that can be gone back to
        self._checkpoint_entries, self._new_entries = checkpoint_entries, 0
        self._archive = Archive(journal.path.with_name(journal.path.name + ARCHIVE_SUFFIX)) if journal else None
        if journal is None or self._archive is None or not self._resume(journal, self._archive):
            self._begin()
        if journal is not None:
            for entry in journal.replay():
                self._replay(entry)
                self._count(journal)
        self._journal = journal

    @property
    def head(self) -> Block:
        return self.history.head

    def now_s(self) -> int:
        """The time the next block would carry: never before the last one's."""
        return max(int(self._clock()) + self._shift_s, self.head.timestamp_s)

    def send(self, raw: bytes) -> Mined:
        """Executes a signed transaction in a block of its own; durable when it returns. Raises RejectedTransaction."""
        if len(raw) > MAX_TRANSACTION_BYTES:
            raise RejectedTransaction(f"oversized data: {len(raw)} bytes, at most {MAX_TRANSACTION_BYTES}")
        if self.history.mined(keccak(raw)) is not None:
            raise RejectedTransaction("already known")
        transaction = Evm.decode(raw)
        with self._lock:
            self._check_usable()
            now = self.now_s()
            mined = self._execute(raw, transaction, now)
            self._record(Entry(Kind.TRANSACTION, now, raw))
            return mined

    def simulate(self, call: Call) -> Outcome:
        """What `call` would do in the next block, now."""
        with self._lock:
            return self.evm.simulate(call, self.head.number + 1, self.now_s())

    def read(self, function: Callable[[Evm], Any]) -> Any:
        """`function` of the present state, under the lock."""
        with self._lock:
            return function(self.evm)

    def mine(self) -> Block:
        """An empty block."""
        with self._lock:
            self._check_usable()
            now = self.now_s()
            block = self._append_block(now, None)
            self._record(Entry(Kind.EMPTY_BLOCK, now))
            return block

    def shift_time(self, seconds: int) -> int:
        """Moves the clock on; returns by how much it runs ahead in all."""
        if seconds < 0:
            raise ValueError(f"the clock of a chain moves forward only, not by {seconds} s")
        with self._lock:
            self._check_usable()
            self._shift_s += seconds
            self._record(Entry(Kind.SHIFT_TIME, seconds))
            return self._shift_s

    def snapshot(self) -> int:
        """Marks the present, so that `revert` can come back to it; returns the snapshot's number. Raises ChainError for
        a chain with a journal: what that holds is final."""
        with self._lock:
            if self._journal is not None:
                raise ChainError("a devnet with a journal takes nothing back: start one without")
            self._snapshots.append(self.head.number)
            return len(self._snapshots)

    def revert(self, snapshot: int) -> bool:
        """Takes back every block since a snapshot, as a reorganisation does, and forgets this snapshot and later ones;
        False where there is none. The clock goes on.
        """
        with self._lock:
            if not 0 < snapshot <= len(self._snapshots):
                return False
            self.history.cut(self._snapshots[snapshot - 1])
            self.evm = Evm({}, self.evm.nodes, self.head.state_root)
            del self._snapshots[snapshot - 1 :]
            return True

    def close(self) -> None:
        with self._lock:
            if self._journal is not None and not self._broken and self._new_entries:
                self._checkpoint(self._journal)
            self._broken = True
            if self._archive is not None:
                self._archive.close()
            if self._journal is not None:
                self._journal.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """The chain's first block, with everybody's funds in it."""
        nodes = NodeStore(self._archive.node) if self._archive else NodeStore()
        self.evm = Evm(dict.fromkeys(devnet_accounts(), FUNDS_WEI), nodes)
        self.history = History(self._archive, 0, Evm.decode)
        self.history.append(0, self.evm.state_root, None)

    def _resume(self, journal: DevnetJournal, archive: Archive) -> bool:
        """Goes on from the last checkpoint, if there is one and it is this journal's."""
        last = archive.checkpoint()
        if last is None:
            return False
        if last.journal == journal.id and journal.goes_on_after(last.position, last.mark):
            self.history = History(archive, last.num_blocks, Evm.decode)
            self.evm = Evm({}, NodeStore(archive.node), self.head.state_root)
            self._shift_s = last.shift_s
            journal.skip_to(last.position, last.mark)
            return True
        _LOG.warning("the checkpoint beside %s is of another journal: all of it is executed anew", journal.path)
        archive.clear()
        return False

    def _count(self, journal: DevnetJournal) -> None:
        """One more entry is on disk; every so many a checkpoint is made."""
        self._new_entries += 1
        if self._new_entries >= self._checkpoint_entries:
            self._checkpoint(journal)

    def _checkpoint(self, journal: DevnetJournal) -> None:
        if self._archive is None:
            return
        self._new_entries = 0
        done = Checkpoint(journal.id, journal.position, journal.mark(), len(self.history), self._shift_s)
        try:
            self._archive.save(done, self.evm.nodes.needed(self.evm.state_root), self.history.rows())
        except sqlite3.Error as error:
            # Nothing is lost: the journal has it all, and the next start only takes longer.
            _LOG.warning("no checkpoint could be written beside %s (%s)", journal.path, error)
            return
        self.evm.nodes.settle()
        self.history.settle()

    def _execute(self, raw: bytes, transaction: Any, at_s: int) -> Mined:
        number = self.head.number + 1
        outcome = self.evm.execute(transaction, number, at_s)
        mined = Mined(keccak(raw), raw, transaction, outcome, number)
        self._append_block(at_s, mined)
        return mined

    def _append_block(self, at_s: int, mined: Mined | None) -> Block:
        return self.history.append(at_s, self.evm.state_root, mined)

    def _record(self, entry: Entry) -> None:
        if self._journal is None:
            return
        try:
            self._journal.append(entry)
        except (OSError, ValueError) as error:
            self._broken = True  # memory is ahead of the disk: nothing more may be promised
            raise ChainError(
                f"the devnet's journal cannot be written ({error}): free the disk and restart it"
            ) from error
        self._count(self._journal)

    def _check_usable(self) -> None:
        if self._broken:
            raise ChainError("the devnet takes no more transactions: it is ending, or its journal failed; restart it")

    def _replay(self, entry: Entry) -> None:
        if entry.kind is Kind.TRANSACTION:
            self._execute(entry.payload, Evm.decode(entry.payload), entry.at_s)
        elif entry.kind is Kind.EMPTY_BLOCK:
            self._append_block(entry.at_s, None)
        else:
            self._shift_s += entry.at_s
