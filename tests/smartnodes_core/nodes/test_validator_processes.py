"""Validators as processes, over TLS, with the contracts on the embedded chain."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from smartnodes_core.chain.account import save_account_key
from smartnodes_core.chain.client import ChainClient
from smartnodes_core.chain.deploy import deploy
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.anvil import AnvilProcess
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.proposal import UNCAPPED
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.membership import Membership

pytestmark = [pytest.mark.starts_network, pytest.mark.timeout(300)]

NETWORK = 1
INTERVAL_S, TIMEOUT_S = 1, 1.5
CHILD = Path(__file__).with_name("validator_child.py")


class Town:
    """A chain, its contracts, and validator processes that behave as `conducts` say, all registered before they run.
    `chain` is started instead of an embedded one with a journal.
    """

    def __init__(
        self, folder: Path, conducts: Sequence[str], chain: Callable[[], DevnetProcess | AnvilProcess] | None = None
    ) -> None:
        self.folder, self.conducts = folder, conducts
        self.keys = [devnet_key(number) for number in range(1, 1 + len(conducts))]
        self.accounts = [address_of(key) for key in self.keys]
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.devnet = chain() if chain else DevnetProcess(journal=folder / "chain.journal")
        try:
            self._deploy()
            self.endpoints: dict[int, str] = {}
            self.restart(0)
            self.restart(*range(1, len(conducts)))
        except BaseException:
            self.stop()
            raise

    def _deploy(self) -> None:
        settings = ChainSettings(
            round_interval_s=INTERVAL_S,
            claim_delay_s=0,
            kappa_bps=UNCAPPED,
            genesis={account: 1_000_000 * SNO for account in self.accounts},
        )
        addresses = deploy(self.devnet.url, devnet_key(0), settings)
        addresses.write(self.folder / "addresses.json")
        self.chain = ChainClient(self.devnet.url, addresses)
        for number, key in enumerate(self.keys):
            home = self.folder / str(number)
            home.mkdir()
            identity = Identity.from_seed(bytes([number + 1] * 32))
            identity.save(home / "identity.json")
            save_account_key(home / "account.json", key)
            Membership(ChainClient(self.devnet.url, addresses, key), NETWORK).join("validator", identity.node_key)

    def restart(self, *numbers: int) -> None:
        for number in numbers:
            self._launch(number)
        for number in numbers:
            self._wait(number)

    def _launch(self, number: int) -> None:
        home = self.folder / str(number)
        settings = {
            "identity": str(home / "identity.json"),
            "account": str(home / "account.json"),
            "addresses": str(self.folder / "addresses.json"),
            "data_dir": str(home),
            "rpc_url": self.devnet.url,
            "endpoint": self.endpoints.get(number, "127.0.0.1:0"),
            "bootstrap": [each for other, each in self.endpoints.items() if other != number][:2],
            "secret": f"{number + 1:064x}",
            "conduct": self.conducts[number],
            "proposer_timeout_s": TIMEOUT_S,
        }
        (home / "settings.json").write_text(json.dumps(settings))
        with open(home / "log", "a") as log:
            self.processes[number] = subprocess.Popen(
                [sys.executable, str(CHILD), str(home / "settings.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _wait(self, number: int) -> None:
        output = self.processes[number].stdout
        assert output is not None
        line = output.readline()
        assert line, (self.folder / str(number) / "log").read_text()[-3000:]
        self.endpoints[number] = json.loads(line)["endpoint"]

    def kill(self, number: int) -> None:
        """As a power cut would."""
        process = self.processes.pop(number)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def round(self) -> int:
        return self.chain.round_state(NETWORK).number

    def live(self) -> set[int]:
        return {self.accounts.index(account) for account in self.chain.validators(NETWORK)}

    def stake_wei(self, number: int) -> int:
        member = self.chain.member(NETWORK, self.accounts[number])
        assert member is not None
        return member.stake_wei

    def signers(self, number: int) -> set[int]:
        """Who carried a round, or endorsed it."""
        executed = self.chain.executed_round(NETWORK, number)
        assert executed is not None
        return {self.accounts.index(account) for account in executed.signers}

    def allotments_wei(self) -> list[int]:
        """What each round has allotted."""
        event = self.chain._rounds.events.Generated()
        found = self.chain._gateway.events(event, self.chain.addresses.from_block, networkId=NETWORK)
        return [int(each["args"]["allotment"]) for each in found]

    def signers_since(self, number: int) -> set[int]:
        return set().union(*(self.signers(each) for each in range(number, self.round + 1)))

    def until(self, condition: Callable[[], Any], timeout_s: float = 90.0) -> None:
        deadline, pause = time.monotonic() + timeout_s, threading.Event()
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            pause.wait(0.1)

    def logs(self) -> str:
        tails = []
        for number in range(len(self.conducts)):
            text = (self.folder / str(number) / "log").read_text()
            tails.append(f"-- {number} ({self.conducts[number]})\n{text[-2500:]}")
        return "\n".join(tails)

    def stop(self) -> None:
        for number in list(self.processes):
            self.kill(number)
        self.devnet.stop()


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Callable[..., Town]]:
    made: list[Town] = []

    def make(*conducts: str, chain: Callable[[], DevnetProcess | AnvilProcess] | None = None) -> Town:
        made.append(Town(tmp_path, conducts, chain))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def test_of_seven_validators_three_that_do_wrong_neither_stop_the_rounds_nor_gain(town: Callable[..., Town]) -> None:
    silent, lazy, greedy = 4, 5, 6
    town_ = town("honest", "honest", "honest", "honest", "silent", "lazy", "greedy")
    town_.until(lambda: greedy not in town_.live())
    assert town_.live() == {0, 1, 2, 3, silent, lazy}  # six count now, five of them are a quorum
    convicted_in = town_.round
    town_.until(lambda: town_.round >= convicted_in + 1 and town_.stake_wei(greedy) == 0)
    assert all(town_.stake_wei(number) == 1_000_000 * SNO for number in town_.live())
    last = town_.round
    carried = [town_.signers(number) for number in range(1, last + 1)]
    assert all(silent not in signers for signers in carried)
    assert all(greedy not in signers for signers in carried[convicted_in:])
    # One of the five that are needed is killed in the middle of a round: it takes up its place again.
    town_.kill(0)
    stopped = town_.round + 1  # what is under way may end
    town_.restart(0)
    town_.until(lambda: 0 in town_.signers_since(stopped + 1))
    assert town_.live() == {0, 1, 2, 3, silent, lazy}
    assert town_.stake_wei(0) == 1_000_000 * SNO
    # nobody worked: of what is emitted, in two intervals at most, each round allotted the signers' 15 % only
    allotted = town_.allotments_wei()
    assert len(allotted) >= stopped
    assert 0 < max(allotted) <= 9375 * SNO // 10 * 2 * INTERVAL_S // 600 * 15 // 100


def test_validators_survive_their_own_death_and_the_chains_in_the_middle_of_a_round(
    town: Callable[..., Town], pytestconfig: pytest.Config
) -> None:
    num_kills = pytestconfig.getoption("--validator-kills")
    if not num_kills:
        pytest.skip("takes 20 s: --validator-kills=1")
    town_ = town("honest", "honest", "honest", "honest")
    town_.until(lambda: town_.round >= 1)
    for kill in range(num_kills):
        # Two die at once, somewhere in the middle of a round: two of four are no quorum.
        threading.Event().wait(random.uniform(0.0, INTERVAL_S))
        gone = (kill % 4, (kill + 1) % 4)
        for number in gone:
            town_.kill(number)
        stopped = town_.round + 1  # what is under way may end
        town_.restart(*gone)
        town_.until(lambda gone=gone, stopped=stopped: set(gone) <= town_.signers_since(stopped + 1))  # they sign again
    # The chain dies too, and comes back where it was.
    port, before = int(town_.devnet.url.rsplit(":", 1)[1]), town_.round
    town_.devnet.process.kill()
    town_.devnet.process.wait()
    town_.devnet = DevnetProcess(port, town_.folder / "chain.journal")
    assert town_.round >= before
    town_.until(lambda: town_.round >= before + 2)
    assert town_.live() == {0, 1, 2, 3}  # nobody has signed twice
    assert all(town_.stake_wei(number) == 1_000_000 * SNO for number in range(4))
