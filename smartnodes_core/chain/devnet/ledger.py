"""The chain's history and its clock: one block per transaction, as soon as it arrives.

Block times follow the wall clock (several blocks may share a second), and calls see the present second, because the
contracts reckon in time. Everything is in memory and, with a journal, rebuilt from it. Block hashes bind number, time,
state and transaction, but are not Ethereum's header hashes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smartnodes_core.chain.devnet.accounts import FUNDS_WEI, devnet_accounts
from smartnodes_core.chain.devnet.evm import Call, Evm, Outcome, RejectedTransaction
from smartnodes_core.chain.devnet.journal import DevnetJournal, Entry, Kind
from smartnodes_core.chain.signing import keccak, word
from smartnodes_core.errors import ChainError

MAX_TRANSACTION_BYTES = 1 << 20


@dataclass(frozen=True)
class Mined:
    """A transaction, as it came and as py-evm decoded it, with what it did."""

    hash: bytes
    raw: bytes
    transaction: Any
    outcome: Outcome
    block_number: int


@dataclass(frozen=True)
class Block:
    number: int
    hash: bytes
    parent_hash: bytes
    timestamp_s: int
    state_root: bytes
    mined: Mined | None


class Ledger:
    """Thread-safe. `clock` gives the wall clock in seconds."""

    def __init__(self, journal: DevnetJournal | None = None, clock: Callable[[], float] = time.time):
        self._lock = threading.RLock()
        self._clock = clock
        self._shift_s = 0
        self._journal: DevnetJournal | None = None
        self._broken = False
        self.evm = Evm(dict.fromkeys(devnet_accounts(), FUNDS_WEI))
        self.blocks: list[Block] = []
        self.by_hash: dict[bytes, Mined] = {}
        self._append_block(0, None)
        for entry in journal.entries if journal else ():
            self._replay(entry)
        if journal:
            journal.entries.clear()
        self._journal = journal

    @property
    def head(self) -> Block:
        return self.blocks[-1]

    def now_s(self) -> int:
        """The time the next block would carry: never before the last one's."""
        now = int(self._clock()) + self._shift_s
        return max(now, self.blocks[-1].timestamp_s) if self.blocks else now

    def send(self, raw: bytes) -> Mined:
        """Executes a signed transaction in a block of its own; durable when it returns. Raises RejectedTransaction."""
        if len(raw) > MAX_TRANSACTION_BYTES:
            raise RejectedTransaction(f"oversized data: {len(raw)} bytes, at most {MAX_TRANSACTION_BYTES}")
        if keccak(raw) in self.by_hash:
            raise RejectedTransaction("already known")
        transaction = self.evm.decode(raw)
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

    def close(self) -> None:
        with self._lock:
            self._broken = True
            if self._journal is not None:
                self._journal.close()

    def _execute(self, raw: bytes, transaction: Any, at_s: int) -> Mined:
        number = self.head.number + 1
        outcome = self.evm.execute(transaction, number, at_s)
        mined = Mined(keccak(raw), raw, transaction, outcome, number)
        self.by_hash[mined.hash] = mined
        self._append_block(at_s, mined)
        return mined

    def _append_block(self, at_s: int, mined: Mined | None) -> Block:
        number = len(self.blocks)
        parent = self.blocks[-1].hash if self.blocks else bytes(32)
        root = self.evm.state_root
        content = parent + word(number) + word(at_s) + root + (mined.hash if mined else b"")
        block = Block(number, keccak(content), parent, at_s, root, mined)
        self.blocks.append(block)
        return block

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

    def _check_usable(self) -> None:
        if self._broken:
            raise ChainError("the devnet takes no more transactions: it is ending, or its journal failed; restart it")

    def _replay(self, entry: Entry) -> None:
        if entry.kind is Kind.TRANSACTION:
            self._execute(entry.payload, self.evm.decode(entry.payload), entry.at_s)
        elif entry.kind is Kind.EMPTY_BLOCK:
            self._append_block(entry.at_s, None)
        else:
            self._shift_s += entry.at_s
