"""A deployment is paid once, however often it is interrupted, and not begun where it could not be finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smartnodes_core.chain.base import NoFundsError
from smartnodes_core.chain.client import ChainClient
from smartnodes_core.chain.deploy import deploy, most_gas
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.direct import Direct
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.gateway import Gateway
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of, checksum, new_key
from smartnodes_core.errors import ChainError, ConfigError, WrongChainError

from .conftest import SETTINGS

TRANSACTIONS = 5


class Interrupted(Exception):
    """Stands for the end of the process."""


def interrupted_deploy(monkeypatch: pytest.MonkeyPatch, url: str, record: Path, after: int, sent: bool) -> None:
    """A deployment that ends at its transaction `after` (from 0): before it is sent, or when it is in a block."""
    send, count = Gateway.send, iter(range(100))

    def failing(self: Gateway, *arguments: Any, **named: Any) -> Any:
        here = next(count) == after
        if here and not sent:
            raise Interrupted
        receipt = send(self, *arguments, **named)
        if here:
            raise Interrupted
        return receipt

    with monkeypatch.context() as patched:
        patched.setattr(Gateway, "send", failing)
        with pytest.raises(Interrupted):
            deploy(url, devnet_key(62), SETTINGS, record)


@pytest.mark.parametrize(("after", "sent"), [(0, False), (0, True), (2, False), (3, True), (4, False), (4, True)])
def test_after_an_interruption_the_rest_is_paid_and_nothing_twice(
    devnet: DevnetProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, sent: bool
) -> None:
    record, gateway = tmp_path / "record", Gateway(devnet.url, devnet_key(62))
    nonce = gateway.next_nonce()
    interrupted_deploy(monkeypatch, devnet.url, record, after, sent)
    assert gateway.next_nonce() == nonce + after + sent
    addresses = deploy(devnet.url, devnet_key(62), SETTINGS, record)
    assert gateway.next_nonce() == nonce + TRANSACTIONS
    assert ChainClient(devnet.url, addresses).round_state(1).number == 0
    assert deploy(devnet.url, devnet_key(62), SETTINGS, record) == addresses
    assert gateway.next_nonce() == nonce + TRANSACTIONS


def test_a_record_of_another_deployment_is_not_continued(
    devnet: DevnetProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record"
    interrupted_deploy(monkeypatch, devnet.url, record, 1, sent=True)
    nonce = Gateway(devnet.url, devnet_key(62)).next_nonce()
    with pytest.raises(ConfigError, match=r"another settings file: .*delete the file to begin anew"):
        deploy(devnet.url, devnet_key(62), ChainSettings(), record)
    with pytest.raises(ConfigError, match="another account"):
        deploy(devnet.url, devnet_key(61), SETTINGS, record)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"chain_id": 5}))
    with pytest.raises(ConfigError, match="another chain"):
        deploy(devnet.url, devnet_key(62), SETTINGS, record)
    record.write_text("{}")
    with pytest.raises(ConfigError, match="delete it to begin anew"):
        deploy(devnet.url, devnet_key(62), SETTINGS, record)
    assert Gateway(devnet.url, devnet_key(62)).next_nonce() == nonce


def test_a_deployment_disturbed_by_another_transaction_says_so(
    devnet: DevnetProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smartnodes_core.chain.deploy.RECEIPT_DEADLINE_S", 0.0)
    record, gateway = tmp_path / "record", Gateway(devnet.url, devnet_key(62))
    interrupted_deploy(monkeypatch, devnet.url, record, 1, sent=True)
    gateway.send("pay", checksum(b"\x11" * 20), "0x", 1)
    with pytest.raises(ChainError, match=r"sent other transactions in between: .*delete .*record and deploy again"):
        deploy(devnet.url, devnet_key(62), SETTINGS, record)


def test_an_account_that_cannot_pay_for_all_of_it_sends_nothing(devnet: DevnetProcess, tmp_path: Path) -> None:
    poor = new_key()
    Gateway(devnet.url, devnet_key(62)).send("pay", checksum(address_of(poor)), "0x", 10**15)
    with pytest.raises(NoFundsError, match=r"has 1000000000000000 wei .* needed for gas: nothing was sent"):
        deploy(devnet.url, poor, SETTINGS, tmp_path / "record")
    assert not (tmp_path / "record").exists()
    assert Gateway(devnet.url, poor).next_nonce() == 0


def test_another_chain_than_the_one_asked_for_is_refused(devnet: DevnetProcess) -> None:
    with pytest.raises(WrongChainError, match="is chain 31337, needed is 1"):
        deploy(devnet.url, devnet_key(62), SETTINGS, chain_id=1)


def test_the_funds_asked_for_cover_the_gas_with_the_margin_of_each_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    apply = Direct._apply

    def counting(self: Direct, call: Any) -> Any:
        outcome = apply(self, call)
        used.append(self.gas_used)
        return outcome

    monkeypatch.setattr(Direct, "_apply", counting)
    settings = ChainSettings(genesis={bytes([i]) * 20: SNO for i in range(1, 101)})
    Direct(settings, 1_800_000_000)
    assert len(used) == TRANSACTIONS
    assert sum(used) * 1.25 < most_gas(settings) < sum(used) * 1.5
