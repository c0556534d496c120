"""A devnet is killed at random instants, also while it starts and while it writes a checkpoint, and never forgets what
it answered.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from smartnodes_core.chain.devnet.accounts import devnet_accounts
from smartnodes_core.chain.devnet.launcher import DevnetProcess

from ..conftest import rpc
from .conftest import RECEIVER, signed

SENDER = "0x" + devnet_accounts()[20].hex()
CHECKPOINT_ENTRIES = 3


class Client:
    """Pays one wei after the other and keeps the receipts of what was answered."""

    def __init__(self) -> None:
        self.receipts: dict[str, Any] = {}

    def check(self, url: str) -> int:
        """What was answered is there, in the same blocks, and at most the one transaction in flight is there besides;
        the next nonce.
        """
        for transaction, receipt in self.receipts.items():
            assert rpc(url, "eth_getTransactionReceipt", transaction) == receipt
        nonce = int(rpc(url, "eth_getTransactionCount", SENDER, "latest"), 16)
        assert len(self.receipts) <= nonce <= len(self.receipts) + 1
        assert int(rpc(url, "eth_getBalance", "0x" + RECEIVER.hex(), "latest"), 16) == nonce
        self.receipts |= {} if nonce == len(self.receipts) else self._last(url)
        return nonce

    def pay_until_killed(self, process: DevnetProcess, kill_after: int, draw: random.Random) -> None:
        """Kills `process` at a random instant during or just after payment number `kill_after`."""
        nonce = self.check(process.url)
        for payment in range(10**6):
            if payment == kill_after:
                threading.Timer(draw.uniform(0, 0.03), process.process.kill).start()
            try:
                transaction = rpc(process.url, "eth_sendRawTransaction", "0x" + signed(nonce + payment).hex())
                self.receipts[transaction] = rpc(process.url, "eth_getTransactionReceipt", transaction)
            except (OSError, HTTPException):
                break
        assert process.process.wait(10) == -9

    def _last(self, url: str) -> dict[str, Any]:
        block = rpc(url, "eth_getBlockByNumber", "latest", False)
        [transaction] = block["transactions"]
        return {transaction: rpc(url, "eth_getTransactionReceipt", transaction)}


def start_and_kill(journal: Path, draw: random.Random) -> None:
    """Kills a devnet while it loads, replays, or has just become ready."""
    command = [sys.executable, "-m", "smartnodes_core.chain.devnet", "--port", "0", "--journal", str(journal)]
    with subprocess.Popen([*command, "--checkpoint-entries", "1"], stdout=subprocess.DEVNULL) as process:
        try:
            process.wait(draw.uniform(0.3, 1.6))
        except subprocess.TimeoutExpired:
            process.kill()


def test_what_was_answered_survives_kills_at_random_instants(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    draw, client, journal = random.Random(5), Client(), tmp_path / "chain.journal"
    for _ in range(request.config.getoption("--devnet-kills")):
        with DevnetProcess(journal=journal, checkpoint_entries=CHECKPOINT_ENTRIES) as process:
            client.pay_until_killed(process, draw.randrange(1, 12), draw)
        if draw.random() < 0.5:
            start_and_kill(journal, draw)
    with DevnetProcess(journal=journal) as process:
        client.check(process.url)
    # The checkpoints were no more than a shortcut: the journal alone says the same.
    journal.with_name(journal.name + ".checkpoint").unlink()
    with DevnetProcess(journal=journal) as process:
        client.check(process.url)
    assert client.receipts
