"""How long the embedded chain takes to start after 100, 1,000 and 10,000 blocks, with its checkpoint and without.

`python benchmarks/benchmark_devnet_start.py [--most-blocks 10000]`. Each block is a call of SNO.transfer to one of 200
accounts. A start is the time from spawning the process until it answers; the best of three with a checkpoint, one
without. The last line is what the newest checkpoint costs the transaction that makes it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from smartnodes_core.chain.contracts import load_artifact
from smartnodes_core.chain.deploy import constructor_arguments, create_address
from smartnodes_core.chain.devnet import CHAIN_ID
from smartnodes_core.chain.devnet.accounts import devnet_accounts, devnet_key
from smartnodes_core.chain.devnet.journal import DevnetJournal
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.devnet.ledger import ARCHIVE_SUFFIX, CHECKPOINT_ENTRIES, Ledger
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import checksum, keccak, word

SENDER = 20
START_DEADLINE_S = 900.0


def signed(nonce: int, to: bytes | None, data: bytes, gas: int) -> bytes:
    from eth_account import Account

    fields = {"nonce": nonce, "value": 0, "gas": gas, "maxFeePerGas": 2 * 10**9, "maxPriorityFeePerGas": 0}
    fields |= {"chainId": CHAIN_ID, "data": data} | ({"to": checksum(to)} if to else {})
    return bytes(Account.sign_transaction(fields, devnet_key(SENDER)).raw_transaction)


def token() -> bytes:
    """The creation code of SNO, with everything for the sender."""
    from eth_abi.abi import encode

    sender = devnet_accounts()[SENDER]
    settings = ChainSettings(genesis={sender: 10**6 * SNO})
    arguments = constructor_arguments(settings, "SNO", {"Rounds": bytes(20)})
    types = ["address", "(uint256,uint256,uint256,uint256,uint256)", "(address,uint256)[]"]
    return load_artifact("SNO").bytecode + encode(types, arguments)


class Growing:
    """A journal that is made longer in this process."""

    def __init__(self, path: Path):
        self.path = path
        self._blocks = 0
        self.usual_ms = self.checkpoint_ms = 0.0

    def grow(self, num_blocks: int) -> None:
        ledger = Ledger(DevnetJournal(self.path))
        sno = create_address(devnet_accounts()[SENDER], 0)
        times = []
        while self._blocks < num_blocks:
            nonce = self._blocks
            receiver = keccak(word(nonce % 200))[12:]
            data = keccak(b"transfer(address,uint256)")[:4] + word(receiver) + word(1)
            raw = signed(nonce, sno, data, 100_000) if nonce else signed(0, None, token(), 3_000_000)
            began = time.perf_counter()
            ledger.send(raw)
            times.append(time.perf_counter() - began)
            self._blocks += 1
        ledger.close()
        times.sort()
        self.usual_ms = 1000 * times[len(times) // 2]
        # One transaction in CHECKPOINT_ENTRIES makes a checkpoint: the middle of the slowest such share is one of them.
        self.checkpoint_ms = 1000 * times[-max(1, len(times) // CHECKPOINT_ENTRIES // 2)]


def start_s(journal: Path) -> float:
    began = time.perf_counter()
    with DevnetProcess(journal=journal, deadline_s=START_DEADLINE_S):
        return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most-blocks", type=int, default=10_000)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        growing = Growing(Path(folder) / "chain.journal")
        archive = growing.path.with_name(growing.path.name + ARCHIVE_SUFFIX)
        print(f"{'blocks':>8}{'journal':>12}{'checkpoint':>13}{'start with it':>16}{'start without':>16}")
        for num_blocks in [count for count in (100, 1000, 10_000) if count <= options.most_blocks]:
            growing.grow(num_blocks)
            sizes = [f"{path.stat().st_size / 1e6:.2f} MB" for path in (growing.path, archive)]
            kept_s = min(start_s(growing.path) for _ in range(3))
            archive.unlink()
            anew_s = start_s(growing.path)
            print(f"{num_blocks:8,}{sizes[0]:>12}{sizes[1]:>13}{kept_s:14.2f} s{anew_s:14.2f} s", flush=True)
        print(f"a transaction takes {growing.usual_ms:.1f} ms, one with a checkpoint {growing.checkpoint_ms:.1f} ms")


if __name__ == "__main__":
    main()
