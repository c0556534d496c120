"""anvil takes the embedded chain's place where it is on the PATH, and ends with its starter."""

from __future__ import annotations

from pathlib import Path

import pytest

from smartnodes_core.chain.devnet.accounts import FUNDS_WEI, devnet_accounts
from smartnodes_core.chain.devnet.anvil import AnvilProcess, start_chain
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.errors import ChainError

from ..conftest import dies_with_its_starter, rpc


def test_without_anvil_the_embedded_chain_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with start_chain() as process:
        assert isinstance(process, DevnetProcess)


def test_a_program_that_is_not_anvil_is_an_error() -> None:
    with pytest.raises(ChainError, match=r"anvil does not answer at http://127\.0\.0\.1:"):
        AnvilProcess("/bin/false")


def test_its_accounts_have_the_funds_of_the_embedded_chain(anvil: AnvilProcess) -> None:
    assert int(rpc(anvil.url, "eth_chainId"), 16) == 31337
    for account in (devnet_accounts()[0], devnet_accounts()[63]):
        assert int(rpc(anvil.url, "eth_getBalance", "0x" + account.hex(), "latest"), 16) <= FUNDS_WEI
        assert int(rpc(anvil.url, "eth_getBalance", "0x" + account.hex(), "latest"), 16) > FUNDS_WEI // 2


def test_it_ends_when_its_starter_is_killed(anvil: AnvilProcess) -> None:
    assert dies_with_its_starter("start_chain()")
