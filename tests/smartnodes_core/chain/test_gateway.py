"""What a user of the client meets when something is wrong: an error of the right class that says what to do."""

from __future__ import annotations

import http.server
import json
import multiprocessing.pool
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smartnodes_core.chain.base import NoFundsError, RefusedError
from smartnodes_core.chain.client import ChainClient
from smartnodes_core.chain.deploy import create_address, deploy
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.gateway import Gateway
from smartnodes_core.chain.settings import SNO, Addresses
from smartnodes_core.chain.signing import address_of, new_key
from smartnodes_core.errors import ChainError, ChainUnreachableError, ConfigError, WrongChainError

from .conftest import NETWORK, SETTINGS, World
from .test_round_execution import refused

NOWHERE = Addresses(31337, 0, *(bytes([i] * 20) for i in range(4)))


class OtherChain(http.server.BaseHTTPRequestHandler):
    """Claims to be Ethereum's main chain."""

    reply: bytes | None = None

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = self.reply or json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "0x1"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def other_chain() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OtherChain)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_unreachable_chain_is_named_with_what_to_do() -> None:
    with pytest.raises(
        ChainUnreachableError, match=r"no answer from the chain at http://127.0.0.1:9 .*tensorlink devnet"
    ):
        ChainClient("http://127.0.0.1:9", NOWHERE)


def test_another_chain_is_refused(other_chain: str) -> None:
    with pytest.raises(WrongChainError, match="is chain 1, needed is 31337"):
        ChainClient(other_chain, NOWHERE)


def test_keys_of_the_devnet_are_refused_elsewhere(other_chain: str) -> None:
    with pytest.raises(ConfigError, match="known to everybody"):
        Gateway(other_chain, devnet_key(0))


def test_something_that_is_no_chain_is_refused(other_chain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OtherChain, "reply", b"<html>hello</html>")
    with pytest.raises(WrongChainError, match="answers, but not"):
        Gateway(other_chain)


def test_contracts_that_are_not_there_are_named(devnet: DevnetProcess) -> None:
    with pytest.raises(WrongChainError, match=r"no contract at 0x0000.* \(SNO\)"):
        ChainClient(devnet.url, NOWHERE)
    with pytest.raises(WrongChainError, match="addresses file is of chain 31337"):
        ChainClient(devnet.url, NOWHERE, chain_id=5)


def test_an_account_without_coins_is_told_so(devnet: DevnetProcess, deployed: tuple[World, Addresses]) -> None:
    chain = ChainClient(devnet.url, deployed[1], new_key())
    with pytest.raises(NoFundsError, match="cannot pay for the transaction's gas"):
        chain.register("user", b"k" * 32, NETWORK)


def test_a_reader_cannot_write(devnet: DevnetProcess, deployed: tuple[World, Addresses]) -> None:
    chain = ChainClient(devnet.url, deployed[1])
    assert chain.members(NETWORK) == []
    with pytest.raises(ConfigError, match="reading only"):
        chain.request_exit(NETWORK)


def test_a_refusal_carries_the_contracts_reason_and_values(deployed: tuple[World, Addresses]) -> None:
    with pytest.raises(RefusedError, match=r"refused to register: UnknownNetwork\(networkId=77\)") as caught:
        deployed[0].chain(1).register("user", b"k" * 32, 77)
    assert caught.value.values == {"networkId": 77}


def test_setup_is_callable_once_and_by_the_deployer_only(
    devnet: DevnetProcess, deployed: tuple[World, Addresses]
) -> None:
    for key, reason in ((devnet_key(63), "AlreadySetUp"), (devnet_key(1), "OnlyDeployer")):
        gateway = Gateway(devnet.url, key)
        with refused(reason):
            gateway.transact(gateway.contract("Rounds", deployed[1].rounds).functions.setup([(9, 1)], (0, 0)))


@pytest.mark.parametrize(
    ("contract", "function", "arguments"),
    [
        ("SNO", "mint", (NETWORK, 1)),
        ("SNO", "pay", (NETWORK, "0x" + "11" * 20, 1)),
        ("SNO", "takeBack", (NETWORK, 1)),
        ("Registry", "openNetwork", (9,)),
        ("Registry", "applyRound", (NETWORK, b"", [], [])),
        ("Registry", "convict", (NETWORK, "0x" + "11" * 20)),
        ("Escrow", "settle", (NETWORK, [], 0)),
    ],
)
def test_only_rounds_mints_scores_slashes_and_settles(
    devnet: DevnetProcess, deployed: tuple[World, Addresses], contract: str, function: str, arguments: tuple[Any, ...]
) -> None:
    gateway = Gateway(devnet.url, devnet_key(63))
    functions = gateway.contract(contract, getattr(deployed[1], contract.lower())).functions
    with refused("OnlyRounds"):
        gateway.transact(functions[function](*arguments))


def test_rounds_cannot_be_deployed_at_another_address_than_announced(
    devnet: DevnetProcess, deployed: tuple[World, Addresses]
) -> None:
    addresses = deployed[1]
    from smartnodes_core.chain.signing import checksum

    wired = [checksum(address) for address in (addresses.sno, addresses.registry, addresses.escrow)]
    with refused("NotWired"):
        Gateway(devnet.url, devnet_key(63)).deploy("Rounds", [*wired, (10, 10, 10)])


def test_the_created_address_is_ethereums() -> None:
    # from the Ethereum wiki's example of CREATE
    sender = bytes.fromhex("6ac7ea33f8831ea9dcc53393aaa88b25a785dbf0")
    assert create_address(sender, 0).hex() == "cd234a471b72ba2f1ccf0a70fcaba648a5eecd8d"
    assert create_address(sender, 1).hex() == "343c43a37d37dff08ae8c4a11544c718abb4fcf8"
    assert len(create_address(sender, 70000)) == 20


def test_the_schedule_of_the_contract_is_that_of_the_twin(
    devnet: DevnetProcess, deployed: tuple[World, Addresses]
) -> None:
    from smartnodes_core.chain.emission import mintable_wei

    gateway = Gateway(devnet.url)
    sno = gateway.contract("SNO", deployed[1].sno).functions
    genesis_s = gateway.read(sno.genesisTime())
    year_s = SETTINGS.emission_decay_s
    for elapsed_s in (-5, 0, 1, 599, 600, year_s, year_s + 1, 3 * year_s + 77, 6 * year_s + 1, 30 * year_s):
        assert gateway.read(sno.mintable(genesis_s + elapsed_s)) == mintable_wei(SETTINGS, elapsed_s)
    assert mintable_wei(SETTINGS, 600) == 9375 * SNO // 10
    assert mintable_wei(SETTINGS, 30 * year_s) - mintable_wei(SETTINGS, 30 * year_s - 600) == 70 * SNO


def test_emission_between_two_times_is_that_of_the_round_that_accounted_them(world: World) -> None:
    world.validators(3)
    proposal = world.proposal()
    chain = world.chain()
    before = chain.round_state(NETWORK)
    emission_wei = chain.emission_wei(NETWORK, proposal.until_s)
    assert emission_wei > 0
    world.execute(proposal, 0, 1, 2)
    assert chain.emission_wei(NETWORK, proposal.until_s) == 0  # accounted now
    assert chain.emission_between_wei(NETWORK, before.emitted_until_s, proposal.until_s) == emission_wei
    assert chain.emission_between_wei(NETWORK, 0, proposal.until_s) >= emission_wei  # two intervals at most
    assert chain.emission_between_wei(NETWORK, proposal.until_s, proposal.until_s) == 0
    assert chain.dispute_window_s == SETTINGS.dispute_window_s


def test_two_clients_with_one_key_never_lose_or_repeat_a_payment(
    devnet: DevnetProcess, deployed: tuple[World, Addresses]
) -> None:
    world, addresses = deployed
    clients = [ChainClient(devnet.url, addresses, devnet_key(1)) for _ in range(3)]
    receiver = address_of(new_key())
    with multiprocessing.pool.ThreadPool(3) as pool:
        pool.map(lambda client: [client.transfer(receiver, 1) for _ in range(4)], clients)
    assert world.chain().balances(receiver).sno_wei == 12


def test_a_chain_that_goes_away_is_an_error_and_comes_back(tmp_path: Path) -> None:
    journal = tmp_path / "devnet.journal"
    with DevnetProcess(journal=journal) as process:
        port = int(process.url.rsplit(":", 1)[1])
        addresses = deploy(process.url, devnet_key(0), SETTINGS)
        chain = ChainClient(process.url, addresses, devnet_key(1))
        chain.transfer(b"r" * 20, 5)
    with pytest.raises(ChainUnreachableError):
        chain.balances(b"r" * 20)
    with DevnetProcess(port=port, journal=journal):
        assert chain.balances(b"r" * 20).sno_wei == 5
        chain.transfer(b"r" * 20, 1)
        assert chain.balances(b"r" * 20).sno_wei == 6


def test_the_digest_computed_here_is_the_contracts(devnet: DevnetProcess, deployed: tuple[World, Addresses]) -> None:
    from smartnodes_core.chain.proposal import Admission, Parameters, Payment, RoundProposal, Settlement, Slash

    proposal = RoundProposal(
        NETWORK, 7, 3, b"p" * 32, 99, b"\x00\x01", b"r" * 32, 10**20, (b"a" * 32, b"b" * 32), (b"c" * 32,),
        (b"d" * 32,), (Admission(1, 2),), (Slash(1, 2), Slash(3, 4)),
        (Settlement(b"e" * 32, 6, (Payment(b"t" * 20, 7), Payment(b"u" * 20, 8))), Settlement(b"f" * 32, 0, ())),
        2, 5, (Parameters(3, 4),), b"v" * 32,
    )  # fmt: skip
    gateway = Gateway(devnet.url)
    rounds = gateway.contract("Rounds", deployed[1].rounds).functions
    for variant in (proposal, replace(proposal, jobs_created=(), slashes=(), settlements=())):
        assert gateway.read(rounds.digestOf(variant.as_abi())) == deployed[0].chain().proposal_digest(variant)
        assert RoundProposal.decode(variant.encode()) == variant


def test_errors_of_the_chain_are_local_errors() -> None:
    assert issubclass(NoFundsError, ChainError)
    assert issubclass(RefusedError, ChainError)
