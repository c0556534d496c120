"""`tensorlink deploy` and `stake`: what they do, what they refuse before anything is sent, and that nothing is paid
twice.
"""

from __future__ import annotations

import hashlib
import json
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from smartnodes_core.chain.account import save_account_key
from smartnodes_core.chain.client import ChainClient
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.gateway import Gateway
from smartnodes_core.chain.settings import SNO, Addresses
from smartnodes_core.chain.signing import address_of, checksum, new_key
from smartnodes_core.identity import Identity
from tensorlink.cli.main import main

EXIT_DELAY_S = 40
WORKER_STAKE = 100
RICH = range(1, 6)
CHAIN_TOML = f"""
[chain]
round_interval_s = 10
claim_delay_s = 15
dispute_window_s = 20
exit_delay_s = {EXIT_DELAY_S}
worker_stake_wei = "{WORKER_STAKE * SNO}"
[chain.genesis]
""" + "".join(f'"{checksum(address_of(devnet_key(i)))}" = "{1000 * SNO}"\n' for i in RICH)


@dataclass
class Place:
    """A folder with the files of one account, and the chain's URL."""

    folder: Path
    url: str
    key: bytes

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def chain(self) -> ChainClient:
        return ChainClient(self.url, Addresses.read(self.folder / "addresses.json"), self.key)

    @property
    def nonce(self) -> int:
        return Gateway(self.url, self.key).next_nonce()

    def write_config(self, **changes: Any) -> None:
        values = {"rpc_url": self.url, "network_id": 1, **changes}
        for name in ("addresses", "identity", "account"):
            values.setdefault(name, str(self.folder / f"{name}.json"))
        self.config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with DevnetProcess() as process:
        yield process.url


@pytest.fixture(scope="module")
def addresses(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contracts, deployed by the command."""
    folder = tmp_path_factory.mktemp("deployed")
    (folder / "chain.toml").write_text(CHAIN_TOML)
    save_account_key(folder / "account.json", devnet_key(0))
    assert main(deploy_command(folder, url)) == 0
    assert not list(folder.glob("*.begun"))
    return folder / "addresses.json"


def deploy_command(folder: Path, url: str, *more: str) -> list[str]:
    files = ["--account", str(folder / "account.json"), "--addresses", str(folder / "addresses.json")]
    return ["deploy", str(folder / "chain.toml"), "--rpc-url", url, *files, *more]


@pytest.fixture
def place_of(url: str, addresses: Path, tmp_path: Path) -> Callable[[bytes], Place]:
    def make(key: bytes) -> Place:
        folder = tmp_path / address_of(key).hex()
        folder.mkdir()
        save_account_key(folder / "account.json", key)
        Identity.create().save(folder / "identity.json")
        (folder / "addresses.json").write_bytes(addresses.read_bytes())
        place = Place(folder, url, key)
        place.write_config()
        return place

    return make


def stake(place: Place, action: str, *more: str) -> int:
    return main(["stake", action, "--config", str(place.config), *more])


def refused(place: Place, capsys: pytest.CaptureFixture[str], action: str, *more: str) -> str:
    """The one line in which an action is refused that sends nothing."""
    before = place.nonce
    capsys.readouterr()
    assert stake(place, action, *more) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert place.nonce == before
    [line] = said.err.splitlines()
    assert line.startswith("tensorlink stake: ")
    return line


def pass_time(url: str, seconds: int) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "evm_increaseTime", "params": [seconds]}
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=10).close()


def test_a_stake_goes_in_and_comes_out_and_nothing_is_paid_twice(
    place_of: Callable[[bytes], Place], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = place_of(devnet_key(1))
    account = address_of(place.key)
    assert stake(place, "status") == 0
    assert f"not registered; stakes are 0.000000 SNO as user, {WORKER_STAKE}.000000 SNO as worker" in said(capsys)

    for expected in ("staked 100.000000 SNO as worker, member", "was registered before, with 100.000000 SNO staked"):
        assert stake(place, "deposit", "--role", "worker") == 0
        assert expected in said(capsys)
        assert place.chain.balances(account).sno_wei == (1000 - WORKER_STAKE) * SNO
    sent = place.nonce
    assert stake(place, "status") == 0
    assert f"worker, taking part, reputation 1, staked 100.000000 SNO\nan exit takes {EXIT_DELAY_S} s" in said(capsys)

    assert "give `tensorlink stake exit` first" in refused(place, capsys, "withdraw")
    assert stake(place, "exit") == 0
    assert "100.000000 SNO can be withdrawn in " in said(capsys)
    assert stake(place, "exit") == 0
    assert "the exit was asked for before; nothing was sent" in said(capsys)
    assert place.nonce == sent + 1
    assert "the stake is locked: it can be withdrawn in " in refused(place, capsys, "withdraw")
    assert "is leaving: withdraw its stake first, in " in refused(place, capsys, "deposit", "--role", "worker")

    pass_time(url, EXIT_DELAY_S)
    assert stake(place, "status") == 0
    assert (
        "not taking part, reputation 1, staked 100.000000 SNO\nexit asked for; the stake can be withdrawn now"
        in said(capsys)
    )
    assert stake(place, "withdraw") == 0
    assert "100.000000 SNO were paid back" in said(capsys)
    assert stake(place, "withdraw") == 0
    assert "withdrawn before; nothing was sent" in said(capsys)
    assert place.nonce == sent + 2
    assert place.chain.balances(account).sno_wei == 1000 * SNO

    assert stake(place, "deposit", "--role", "worker") == 0
    assert place.chain.balances(account).sno_wei == (1000 - WORKER_STAKE) * SNO


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_who_cannot_pay_is_told_before_anything_is_sent(
    place_of: Callable[[bytes], Place], capsys: pytest.CaptureFixture[str]
) -> None:
    poor = place_of(devnet_key(7))
    line = refused(poor, capsys, "deposit", "--role", "worker")
    assert "has 0.000000 SNO, needed are 100.000000; nothing was sent" in line
    line = refused(place_of(devnet_key(2)), capsys, "deposit", "--role", "validator")
    assert "has 1000.000000 SNO, needed are 1000000.000000" in line
    assert "has no coins of chain 31337 to pay for gas" in refused(
        place_of(new_key()), capsys, "deposit", "--role", "user"
    )


def test_a_network_that_does_not_exist_is_named_before_anything_is_sent(
    place_of: Callable[[bytes], Place], capsys: pytest.CaptureFixture[str]
) -> None:
    place = place_of(devnet_key(2))
    place.write_config(network_id=7)
    for action in (["deposit", "--role", "worker"], ["exit"], ["withdraw"]):
        assert "network 7 is not open in these contracts: set network_id" in refused(place, capsys, *action)


def test_the_wrong_key_or_role_is_named_before_anything_is_sent(
    place_of: Callable[[bytes], Place], capsys: pytest.CaptureFixture[str]
) -> None:
    place, other = place_of(devnet_key(3)), place_of(devnet_key(4))
    assert "is not registered in network 1: check `account`" in refused(other, capsys, "exit")
    assert stake(place, "deposit", "--role", "worker") == 0
    assert "is registered as worker; an account has one role" in refused(place, capsys, "deposit", "--role", "user")
    place.write_config(identity=str(other.folder / "identity.json"))
    assert "with another node key" in refused(place, capsys, "deposit", "--role", "worker")
    place.write_config(account=str(place.folder / "none.json"))
    assert "none.json" in refused(place, capsys, "exit")


def test_a_node_key_is_rotated_once_and_the_revoked_one_is_taken_back_by_nobody(
    place_of: Callable[[bytes], Place], capsys: pytest.CaptureFixture[str]
) -> None:
    place = place_of(devnet_key(5))
    old, new = place.folder / "identity.json", place.folder / "new.json"
    assert "give `tensorlink stake deposit`" in refused(place, capsys, "rotate", "--to", str(new))
    assert stake(place, "deposit", "--role", "worker") == 0
    before = place.chain.member(1, address_of(place.key))
    assert stake(place, "rotate", "--to", str(new)) == 0
    told = said(capsys)
    assert f"is revoked: peers drop it when they next look at the chain\nset identity = {json.dumps(str(new))}" in told
    after = place.chain.member(1, address_of(place.key))
    assert before is not None
    assert after is not None
    assert (after.index, after.stake_wei, after.reputation) == (before.index, before.stake_wei, before.reputation)
    assert after.key_hash == hashlib.sha256(Identity.load(new).node_key).digest() != before.key_hash
    sent = place.nonce
    assert stake(place, "rotate", "--to", str(new)) == 0
    assert "was given this node key before; nothing was sent" in said(capsys)
    assert place.nonce == sent
    assert "with another node key" in refused(place, capsys, "deposit", "--role", "worker")
    assert stake(place, "rotate", "--to", str(old)) == 0  # no round had verified it: nobody's yet


def test_contracts_that_are_not_there_are_named(
    place_of: Callable[[bytes], Place], capsys: pytest.CaptureFixture[str]
) -> None:
    place = place_of(devnet_key(4))
    values = json.loads((place.folder / "addresses.json").read_text())
    changed = {name: "0x" + "11" * 20 if str(value).startswith("0x") else value for name, value in values.items()}
    (place.folder / "addresses.json").write_text(json.dumps(changed))
    assert "no contract at 0x1111" in refused(place, capsys, "status")
    (place.folder / "addresses.json").write_text(json.dumps(values | {"chain_id": 5}))
    assert "is chain 31337, needed is 5" in refused(place, capsys, "status")


def test_deploying_again_over_an_addresses_file_sends_nothing(
    url: str, addresses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, kept = Gateway(url, devnet_key(0)).next_nonce(), addresses.read_bytes()
    assert main(deploy_command(addresses.parent, url)) == 2
    assert "exists, so nothing was sent" in capsys.readouterr().err
    assert Gateway(url, devnet_key(0)).next_nonce() == before
    assert addresses.read_bytes() == kept


@pytest.mark.parametrize(
    ("toml", "more", "message"),
    [
        (CHAIN_TOML, ["--chain-id", "1"], "is chain 31337, needed is 1"),
        ("[chain]\nround_intervall_s = 1\n", [], "unknown key round_intervall_s"),
        ('[chain.genesis]\n"0x12" = "1"\n', [], "is not an account"),
    ],
)
def test_a_deployment_that_would_be_wrong_sends_nothing(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], toml: str, more: list[str], message: str
) -> None:
    (tmp_path / "chain.toml").write_text(toml)
    save_account_key(tmp_path / "account.json", devnet_key(5))
    before = Gateway(url, devnet_key(5)).next_nonce()
    assert main(deploy_command(tmp_path, url, *more)) == 2
    assert message in capsys.readouterr().err
    assert Gateway(url, devnet_key(5)).next_nonce() == before
    assert not (tmp_path / "addresses.json").exists()


def test_a_deployer_without_coins_sends_nothing(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "chain.toml").write_text(CHAIN_TOML)
    save_account_key(tmp_path / "account.json", new_key())
    assert main(deploy_command(tmp_path, url)) == 2
    assert "has 0 wei of chain 31337's coin" in capsys.readouterr().err
