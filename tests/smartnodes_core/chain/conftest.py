"""Worlds to test chains in: the contracts on one devnet process shared by the session, and the in-memory twin."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from smartnodes_core.chain.base import Chain
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.anvil import AnvilProcess
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.merkle import RewardTree
from smartnodes_core.chain.proposal import UNCAPPED, Admission
from smartnodes_core.chain.settings import SNO, Addresses, ChainSettings
from smartnodes_core.chain.signing import address_of, sign_digest
from smartnodes_core.rounds import RoundProposal

NETWORK, OTHER_NETWORK = 1, 2
SETTINGS = ChainSettings(
    round_interval_s=10,
    claim_delay_s=15,
    exit_delay_s=40,
    dispute_window_s=20,
    worker_stake_wei=100 * SNO,
    kappa_bps=UNCAPPED,
    networks={NETWORK: 8000, OTHER_NETWORK: 2000},
    genesis={address_of(devnet_key(i)): 3_000_000 * SNO for i in range(10)},
)


def rpc(url: str, method: str, *params: Any) -> Any:
    """One JSON-RPC call without web3."""
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=10
    ) as reply:
        answer = json.load(reply)
    if "error" in answer:
        raise AssertionError(answer["error"])
    return answer["result"]


def dies_with_its_starter(start: str) -> bool:
    """Whether the chain that the expression `start` starts is gone soon after its starter was killed."""
    script = f"import os; p = {start}; print(p.process.pid, p.url, flush=True); os.kill(os.getpid(), 9)"
    script = (
        "from smartnodes_core.chain.devnet.anvil import start_chain\n"
        f"from smartnodes_core.chain.devnet.launcher import DevnetProcess\n{script}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    pid, url = done.stdout.split()
    deadline, pause = time.monotonic() + 20.0, threading.Event()
    while time.monotonic() < deadline:
        try:
            rpc(url, "eth_chainId")
        except OSError:
            return True
        pause.wait(0.05)
    os.kill(int(pid), signal.SIGKILL)
    return False


class World:
    """A deployment with `SETTINGS` and funded accounts 0 .. 9."""

    def __init__(self, chain_of: Callable[[bytes], Chain], pass_time: Callable[[int], None]):
        self._chain_of = cache(chain_of)
        self._pass_time = pass_time

    def key(self, i: int) -> bytes:
        return devnet_key(i)

    def account(self, i: int) -> bytes:
        return address_of(devnet_key(i))

    def chain(self, i: int = 0) -> Any:
        return self._chain_of(devnet_key(i))

    def key_hash(self, i: int) -> bytes:
        return hashlib.sha256(b"node key %d" % i).digest()

    def pass_time(self, seconds: int) -> None:
        self._pass_time(seconds)

    def validators(self, count: int) -> None:
        """Accounts 0 .. count - 1 become validators."""
        for i in range(count):
            self.chain(i).register("validator", self.key_hash(i), NETWORK)

    def proposal(self, **changes: Any) -> RoundProposal:
        """The next round with nothing in it, due now, and `changes`."""
        self.pass_time(SETTINGS.round_interval_s)
        state = self.chain().round_state(NETWORK)
        empty = RoundProposal(NETWORK, state.number + 1, 0, state.previous_hash, state.chain_time_s)
        return replace(empty, **changes)

    def admit(self, *members: int) -> None:
        """A round of three validators in which these accounts' keys are verified."""
        indices = [self.chain().member(NETWORK, self.account(i)).index for i in members]
        self.execute(self.proposal(admissions=tuple(Admission(index) for index in sorted(indices))), 0, 1, 2)

    def sign(self, proposal: RoundProposal, *signers: int) -> list[bytes]:
        digest = self.chain().proposal_digest(proposal)
        return [sign_digest(self.key(i), digest) for i in signers]

    def execute(self, proposal: RoundProposal, *signers: int) -> None:
        self.chain().execute_round(proposal, self.sign(proposal, *signers))

    def rewards(self, totals_wei: Mapping[bytes, int]) -> RewardTree:
        domain = self.chain().domain
        return RewardTree(domain.chain_id, domain.contract, NETWORK, totals_wei)


@pytest.fixture(scope="session")
def devnet() -> Iterator[DevnetProcess]:
    with DevnetProcess() as process:
        yield process


def contracts_world(url: str) -> tuple[World, Addresses]:
    from smartnodes_core.chain.client import ChainClient
    from smartnodes_core.chain.deploy import deploy

    addresses = deploy(url, devnet_key(63), SETTINGS)

    def pass_time(seconds: int) -> None:
        rpc(url, "evm_increaseTime", seconds)
        rpc(url, "evm_mine")  # on other chains than the embedded one calls see the time of the last block

    return World(lambda key: ChainClient(url, addresses, key), pass_time), addresses


@pytest.fixture
def deployed(devnet: DevnetProcess) -> tuple[World, Addresses]:
    return contracts_world(devnet.url)


@pytest.fixture(scope="session")
def anvil() -> Iterator[AnvilProcess]:
    program = shutil.which("anvil")
    if program is None:
        pytest.skip("anvil is not on the PATH")
    with AnvilProcess(program) as process:
        yield process


@pytest.fixture(params=["memory", "contracts", "anvil"])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "contracts":
        return request.getfixturevalue("deployed")[0]
    if request.param == "anvil":
        return contracts_world(request.getfixturevalue("anvil").url)[0]
    from smartnodes_core.chain.memory import MemoryChain
    from smartnodes_core.chain.model import ChainModel

    model = ChainModel(SETTINGS)

    def pass_time(seconds: int) -> None:
        model.shift_s += seconds

    return World(lambda key: MemoryChain(model, key), pass_time)
