"""`tensorlink claim`: anybody may ask, the owner is paid, and once."""

from __future__ import annotations

import re
import time

import pytest

from smartnodes_core.chain.account import save_account_key
from smartnodes_core.chain.client import ChainClient
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.settings import SNO, Addresses
from smartnodes_core.chain.signing import checksum
from smartnodes_core.identity import Identity
from tensorlink.cli.main import main

pytestmark = pytest.mark.starts_network

STRANGER = 40
DEADLINE_S = 60


@pytest.fixture
def chain(network):
    return ChainClient(network.local.chain_url, Addresses.read(network.log_dir / "addresses.json"))


@pytest.fixture
def config(network, tmp_path):
    """Settings of a user that has just come."""
    Identity.create().save(tmp_path / "identity.json")
    save_account_key(tmp_path / "account.json", devnet_key(STRANGER))
    values = {
        "rpc_url": network.local.chain_url,
        "addresses": str(network.log_dir / "addresses.json"),
        "identity": str(tmp_path / "identity.json"),
        "account": str(tmp_path / "account.json"),
    }
    text = "".join(f'{name} = "{value}"\n' for name, value in values.items())
    path = tmp_path / "user.toml"
    path.write_text(text + f"bootstrap = {network.local.user_config().bootstrap}\n".replace("'", '"'))
    return path


def claimed(config, capsys, *more):
    """The SNO that the command says it has claimed, in wei."""
    assert main(["claim", "--config", str(config), *more]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("claimed ")]
    return round(float(re.match(r"claimed ([\d.]+) SNO", line)[1]) * 10**6) * SNO // 10**6


def test_a_stranger_claims_for_a_validator_which_is_paid_once(network, chain, config, capsys):
    [validator] = chain.validators(1)
    deadline = time.monotonic() + DEADLINE_S
    while chain.round_state(1).final_root_round < 2:  # the signers of the first round are paid in the second
        assert time.monotonic() < deadline, "no reward has become final"
        time.sleep(0.2)
    before, claimed_before = chain.balances(validator).sno_wei, chain.claimed_wei(1, validator)
    paid = claimed(config, capsys, "--for", checksum(validator))
    assert paid > 0
    again = claimed(config, capsys, "--for", checksum(validator))  # rounds go on: 0, or what has become final since
    assert chain.balances(validator).sno_wei - before == pytest.approx(paid + again, abs=2 * 10**12)
    assert chain.claimed_wei(1, validator) - claimed_before == chain.balances(validator).sno_wei - before
    assert claimed(config, capsys) == 0
    assert main(["claim", "--config", str(config), "--take-back", "ab" * 32]) == 2
    assert "has deposited nothing for job" in capsys.readouterr().err


def test_an_account_that_is_none_is_refused(config, capsys):
    assert main(["claim", "--config", str(config), "--for", "0x12"]) == 2
    assert "needed an account: 0x and 40 hexadecimal digits" in capsys.readouterr().err


def test_a_job_that_is_none_is_refused(config, capsys):
    assert main(["claim", "--config", str(config), "--take-back", "12"]) == 2
    assert "needed its id of 64 hexadecimal digits" in capsys.readouterr().err
