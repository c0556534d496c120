"""All blocks so far: the newest in memory, those before the last checkpoint in the archive, read when asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

from smartnodes_core.chain.devnet.archive import Archive, Row
from smartnodes_core.chain.devnet.evm import Log, Outcome
from smartnodes_core.chain.signing import keccak, word


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

    @classmethod
    def after(cls, parent: Block | None, timestamp_s: int, state_root: bytes, mined: Mined | None) -> Block:
        """The next block. Its hash binds number, time, state and transaction, but is not Ethereum's header hash."""
        number, parent_hash = (parent.number + 1, parent.hash) if parent else (0, bytes(32))
        content = parent_hash + word(number) + word(timestamp_s) + state_root + (mined.hash if mined else b"")
        return cls(number, keccak(content), parent_hash, timestamp_s, state_root, mined)


class History:
    """Thread-safe. `decode` gives the transaction in raw bytes; `archived` says how many blocks the archive holds."""

    def __init__(self, archive: Archive | None, archived: int, decode: Callable[[bytes], Any]):
        self._lock = threading.RLock()
        self._archive, self._archived, self._decode = archive, archived, decode
        self._tail: list[Block] = []
        self._tail_by_hash: dict[bytes, Mined] = {}
        last = self._read(archived - 1) if archived else None
        self._head = last

    @property
    def head(self) -> Block:
        assert self._head is not None  # the first block is appended before anybody asks
        return self._head

    def __len__(self) -> int:
        with self._lock:
            return self._archived + len(self._tail)

    def append(self, timestamp_s: int, state_root: bytes, mined: Mined | None) -> Block:
        with self._lock:
            block = Block.after(self._head, timestamp_s, state_root, mined)
            self._tail.append(block)
            if mined is not None:
                self._tail_by_hash[mined.hash] = mined
            self._head = block
            return block

    def cut(self, last: int) -> None:
        """Forget the blocks after number `last`, which is in memory."""
        with self._lock:
            kept = last + 1 - self._archived
            for block in self._tail[kept:]:
                if block.mined is not None:
                    del self._tail_by_hash[block.mined.hash]
            del self._tail[kept:]
            self._head = self._tail[-1]

    def block(self, number: int) -> Block | None:
        with self._lock:
            if number >= self._archived:
                place = number - self._archived
                return self._tail[place] if place < len(self._tail) else None
            return self._read(number) if number >= 0 else None

    def block_with_hash(self, block_hash: bytes) -> Block | None:
        with self._lock:
            found = next((block for block in self._tail if block.hash == block_hash), None)
            if found is not None or self._archive is None:
                return found
            number = self._archive.number_of_block(block_hash)
            return None if number is None else self._read(number)

    def mined(self, transaction_hash: bytes) -> Mined | None:
        with self._lock:
            found = self._tail_by_hash.get(transaction_hash)
            if found is not None or self._archive is None:
                return found
            number = self._archive.number_of_transaction(transaction_hash)
            return None if number is None else self._read(number).mined

    def may_hold(
        self, first: int, last: int, addresses: Collection[bytes] | None, topics: Collection[bytes] | None
    ) -> Iterator[Block]:
        """Blocks `first` .. `last` that may hold logs of these addresses with these first topics; None is any."""
        with self._lock:
            found = []
            if self._archive is not None and first < self._archived:
                found = self._archive.blocks_with_logs(first, min(last, self._archived - 1), addresses, topics)
            start = max(first - self._archived, 0)
            tail = self._tail[start : max(last + 1 - self._archived, start)]
        for number in found:
            with self._lock:
                block = self._read(number)
            yield block
        yield from tail

    def rows(self) -> list[Row]:
        """The blocks that are not in the archive yet, as it keeps them."""
        with self._lock:
            return [_row(block) for block in self._tail]

    def settle(self) -> None:
        """`rows` lie in the archive now: memory is given back."""
        with self._lock:
            self._archived += len(self._tail)
            self._tail.clear()
            self._tail_by_hash.clear()

    def _read(self, number: int) -> Block:
        content = self._archive.block(number) if self._archive else None
        if content is None:
            raise LookupError(f"block {number} is not in the archive")
        block_hash, parent_hash, timestamp_s, state_root, mined = msgpack.unpackb(content)
        if mined is not None:
            raw, transaction_hash, gas_used, output, revert_data, error, contract, logs = mined
            events = tuple(Log(address, tuple(topics), data) for address, topics, data in logs)
            outcome = Outcome(gas_used, output, revert_data, error, contract, events)
            mined = Mined(transaction_hash, raw, self._decode(raw), outcome, number)
        return Block(number, block_hash, parent_hash, timestamp_s, state_root, mined)


def _row(block: Block) -> Row:
    mined: list[Any] | None = None
    logs: tuple[Log, ...] = ()
    if block.mined is not None:
        did = block.mined.outcome
        logs = did.logs
        events = [[log.address, log.topics, log.data] for log in logs]
        outcome = [did.gas_used, did.output, did.revert_data, did.error, did.contract, events]
        mined = [block.mined.raw, block.mined.hash, *outcome]
    content = msgpack.packb([block.hash, block.parent_hash, block.timestamp_s, block.state_root, mined])
    firsts = {(log.address, log.topics[0] if log.topics else b"") for log in logs}
    return Row(block.number, block.hash, block.mined.hash if block.mined else None, content, firsts)
