from __future__ import annotations

from pathlib import Path

import pytest

from smartnodes_core.chain.settings import SNO, Addresses, ChainSettings
from smartnodes_core.errors import ConfigError


def test_a_deploy_file_sets_any_field(tmp_path: Path) -> None:
    path = tmp_path / "chain.toml"
    path.write_text(
        '[chain]\nround_interval_s = 5\nclaim_delay_s = 2\nemission_wei = "123"\n'
        f'[chain.networks]\n7 = 500\n[chain.genesis]\n"0x{"ab" * 20}" = "{10**24}"\n'
    )
    settings = ChainSettings.from_toml(path)
    assert (settings.round_interval_s, settings.claim_delay_s, settings.emission_wei) == (5, 2, 123)
    assert (settings.networks, settings.genesis) == ({7: 500}, {b"\xab" * 20: 10**24})
    assert settings.validator_stake_wei == 1_000_000 * SNO


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[chain]\nround_intervall_s = 5\n", "unknown key round_intervall_s"),
        ("[chain]\nround_interval_s = 'soon'\n", "soon"),
        ("[chain]\nclaim_delay_s = 100000\n", "at most 32 round intervals"),
        ("[chain]\nvalidator_stake_wei = 0\n", "anyone could join"),
        ("[chain.networks]\n1 = 9000\n2 = 2000\n", "sum to 11000"),
        ("[chain.genesis]\n'0x12' = 5\n", "is not an account"),
        ("[chain\n", "chain.toml"),
    ],
)
def test_a_bad_deploy_file_is_refused_with_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "chain.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        ChainSettings.from_toml(path)


def test_addresses_are_read_as_they_were_written(tmp_path: Path) -> None:
    addresses = Addresses(31337, 5, *(bytes([i] * 20) for i in range(4)))
    addresses.write(tmp_path / "addresses.json")
    assert Addresses.read(tmp_path / "addresses.json") == addresses


def test_a_missing_or_foreign_addresses_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensorlink deploy"):
        Addresses.read(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="not an addresses file"):
        Addresses.read(tmp_path / "x.json")
