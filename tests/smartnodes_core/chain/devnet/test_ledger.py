"""Checkpoints change how long a start takes, and nothing else."""

from __future__ import annotations

import random
import shutil
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from smartnodes_core.chain.deploy import create_address
from smartnodes_core.chain.devnet.accounts import devnet_accounts
from smartnodes_core.chain.devnet.archive import Archive
from smartnodes_core.chain.devnet.evm import Evm
from smartnodes_core.chain.devnet.journal import DevnetJournal
from smartnodes_core.chain.devnet.ledger import Ledger
from smartnodes_core.chain.devnet.methods import Methods
from smartnodes_core.errors import ChainError, ConfigError

from .conftest import RECEIVER, creation, signed, storing

NOW_S = 1_800_000_000
SENDER = devnet_accounts()[20]
CONTRACT = create_address(SENDER, 0)


def opened(path: Path | None, checkpoint_entries: int = 10**9) -> Ledger:
    journal = DevnetJournal(path) if path else None
    return Ledger(journal, lambda: NOW_S, checkpoint_entries)


def act(ledger: Ledger, draw: random.Random, nonce: int) -> None:
    """One transaction, and at times an empty block or a step of the clock."""
    if nonce == 0:
        ledger.send(creation(nonce))
    elif draw.random() < 0.6:
        ledger.send(storing(nonce, CONTRACT, draw.randrange(40), draw.randrange(3)))
    else:
        ledger.send(signed(nonce))
    if draw.random() < 0.2:
        ledger.shift_time(draw.randrange(100))
    if draw.random() < 0.1:
        ledger.mine()


def everything(ledger: Ledger) -> dict[str, Any]:
    """All that a client can ask, as JSON."""
    methods = Methods(ledger)
    blocks = [methods.call("eth_getBlockByNumber", [hex(n), True]) for n in range(len(ledger.history))]
    hashes = [each["hash"] for block in blocks for each in block["transactions"]]
    receipts = [methods.call("eth_getTransactionReceipt", [transaction]) for transaction in hashes]
    queries = [
        {"fromBlock": "0x0"},
        {"fromBlock": "0x3", "toBlock": hex(len(blocks) // 2), "address": "0x" + CONTRACT.hex()},
        {"fromBlock": "0x0", "topics": [["0x" + f"{key:064x}" for key in range(9)]]},
        {"fromBlock": "0x0", "topics": ["0x" + f"{3:064x}"], "address": ["0x" + CONTRACT.hex(), "0x" + "00" * 20]},
        {"blockHash": blocks[1]["hash"]},
    ]
    return {
        "blocks": blocks,
        "by hash": [methods.call("eth_getBlockByHash", [block["hash"], False]) for block in blocks],
        "transactions": [methods.call("eth_getTransactionByHash", [transaction]) for transaction in hashes],
        "receipts": receipts,
        "logs": [methods.call("eth_getLogs", [query]) for query in queries],
        "storage": [methods.call("eth_getStorageAt", ["0x" + CONTRACT.hex(), hex(key)]) for key in range(40)],
        "nonce": methods.call("eth_getTransactionCount", ["0x" + SENDER.hex()]),
        "now": ledger.now_s(),
    }


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_with_checkpoints_and_restarts_is_the_one_without(tmp_path: Path, seed: int) -> None:
    draw, plain, path = random.Random(seed), opened(None), tmp_path / "a.journal"
    ledger = opened(path, checkpoint_entries=7)
    for nonce in range(60):
        state = draw.getstate()
        act(plain, draw, nonce)
        draw.setstate(state)
        act(ledger, draw, nonce)
        if draw.random() < 0.15:
            ledger.close()
            ledger = opened(path, checkpoint_entries=draw.choice([1, 7, 100]))
    assert ledger.evm.state_root == plain.evm.state_root
    found = everything(ledger)
    assert found == everything(plain)
    assert sum(map(len, found["logs"])) > 40
    ledger.close()
    (tmp_path / "a.journal.checkpoint").unlink()
    anew = opened(path)
    assert everything(anew) == found
    anew.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of 30 transactions with a checkpoint after the last."""
    ledger = opened(tmp_path / "a.journal", checkpoint_entries=8)
    for nonce in range(30):
        ledger.send(creation(0) if nonce == 0 else storing(nonce, CONTRACT, nonce, nonce))
    ledger.close()
    return tmp_path / "a.journal"


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the blocks that are executed."""
    numbers: list[int] = []
    execute = Evm.execute

    def counting(self: Evm, transaction: Any, number: int, timestamp_s: int) -> Any:
        numbers.append(number)
        return execute(self, transaction, number, timestamp_s)

    monkeypatch.setattr(Evm, "execute", counting)
    return numbers


def test_a_start_executes_only_what_came_after_the_last_checkpoint(path: Path, executed: list[int]) -> None:
    ledger = opened(path)
    assert executed == []
    ledger.send(storing(30, CONTRACT, 1, 1))
    ledger.send(storing(31, CONTRACT, 2, 2))
    after = everything(ledger)
    # As a kill leaves it: the journal on disk, no checkpoint of the last two.
    shutil.copy(path, path.with_name("b.journal"))
    shutil.copy(path.with_name("a.journal.checkpoint"), path.with_name("b.journal.checkpoint"))
    ledger.close()
    executed.clear()
    killed = opened(path.with_name("b.journal"))
    assert executed == [31, 32]
    assert everything(killed) == after
    killed.close()


def test_memory_holds_no_more_than_came_after_the_last_checkpoint(path: Path) -> None:
    ledger = opened(path, checkpoint_entries=5)
    for nonce in range(30, 35):
        ledger.send(storing(nonce, CONTRACT, nonce, nonce))
    assert (ledger.history.rows(), ledger.evm.nodes.fresh) == ([], {})
    assert ledger.evm.storage(CONTRACT, 3) == 3
    ledger.close()


def test_a_journal_cut_behind_its_checkpoint_is_executed_anew(path: Path, executed: list[int]) -> None:
    whole = path.read_bytes()
    for missing in (1, 8, 40, 130):
        path.write_bytes(whole[:-missing])
        executed.clear()
        ledger = opened(path)
        assert executed == list(range(1, 30))
        assert ledger.evm.storage(CONTRACT, 28) == 28
        assert ledger.evm.storage(CONTRACT, 29) == 0
        ledger.send(storing(29, CONTRACT, 29, 1))
        assert ledger.evm.storage(CONTRACT, 29) == 1
        ledger.close()


def test_a_checkpoint_of_another_journal_is_not_followed(path: Path, tmp_path: Path) -> None:
    other = opened(tmp_path / "b.journal", checkpoint_entries=2)
    for nonce in range(30):
        other.send(signed(nonce))
    right = everything(other)
    other.close()
    shutil.copy(path.with_name("a.journal.checkpoint"), tmp_path / "b.journal.checkpoint")
    again = opened(tmp_path / "b.journal")
    assert again.evm.balance(RECEIVER) == 30
    assert everything(again) == right
    again.close()


def test_a_copy_of_a_journal_that_went_on_differently_is_not_followed(path: Path, tmp_path: Path) -> None:
    early = path.read_bytes()
    first = opened(path)
    first.send(storing(30, CONTRACT, 50, 1))
    first.close()
    path.write_bytes(early)
    journal = DevnetJournal(path)
    list(journal.replay())
    checkpoint = path.with_name("a.journal.checkpoint").read_bytes()
    journal.close()
    path.with_name("a.journal.checkpoint").unlink()
    second = opened(path)
    second.send(storing(30, CONTRACT, 50, 2))
    second.close()
    path.with_name("a.journal.checkpoint").write_bytes(checkpoint)
    again = opened(path)
    assert again.evm.storage(CONTRACT, 50) == 2
    again.close()


def test_a_checkpoint_that_cannot_be_written_costs_nothing_but_time(
    path: Path, executed: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Archive, "save", full)
        ledger = opened(path, checkpoint_entries=2)
        for nonce in range(30, 35):
            ledger.send(storing(nonce, CONTRACT, nonce, nonce))
        ledger.close()
    assert "disk is full" in caplog.text
    executed.clear()
    again = opened(path)
    assert executed == list(range(31, 36))
    assert again.evm.storage(CONTRACT, 34) == 34
    again.close()


@pytest.mark.parametrize("content", [b"no archive", b"SQLite format 3\0" + bytes(80)], ids=["text", "half"])
def test_a_file_that_is_no_archive_is_named_and_left_alone(path: Path, content: bytes) -> None:
    archive = path.with_name("a.journal.checkpoint")
    archive.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.journal\.checkpoint cannot be used .*delete it"):
        opened(path)
    assert archive.read_bytes() == content


def test_readers_see_one_history_while_checkpoints_are_made(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "a.journal", checkpoint_entries=2)
    ledger.send(creation(0))
    methods, ended = Methods(ledger), threading.Event()

    def read() -> int:
        looks = 0
        while not ended.is_set():
            known = len(ledger.history)
            found = methods.call("eth_getLogs", [{"fromBlock": "0x0", "address": "0x" + CONTRACT.hex()}])
            assert [int(each["topics"][0], 16) for each in found[: known - 2]] == list(range(1, known - 1))
            block = methods.call("eth_getBlockByNumber", [hex(known - 1), True])
            receipt = methods.call("eth_getTransactionReceipt", [block["transactions"][0]["hash"]])
            assert (receipt["blockHash"], receipt["status"]) == (block["hash"], "0x1")
            looks += 1
        return looks

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for nonce in range(1, 60):
                ledger.send(storing(nonce, CONTRACT, nonce, 1))
        finally:
            ended.set()
    assert all(reader.result() > 0 for reader in readers)
    ledger.close()


def test_what_is_taken_back_was_never_there() -> None:
    ledger, draw = opened(None), random.Random(7)
    for nonce in range(6):
        act(ledger, draw, nonce)
    before, first = everything(ledger), ledger.snapshot()
    for nonce in range(6, 12):
        act(ledger, draw, nonce)
    second = ledger.snapshot()
    act(ledger, draw, 12)
    after = everything(ledger)
    assert ledger.revert(first)
    taken_back = everything(ledger)
    assert {**taken_back, "now": 0} == {**before, "now": 0} != {**after, "now": 0}
    assert not ledger.revert(second)  # it was of what is gone
    assert not ledger.revert(0)
    act(ledger, draw, 6)  # and goes on from there
    assert ledger.snapshot() == 1


def test_a_chain_with_a_journal_takes_nothing_back(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "journal")
    with pytest.raises(ChainError, match="takes nothing back"):
        ledger.snapshot()
    ledger.close()
