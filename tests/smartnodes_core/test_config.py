"""Settings from file, environment and flags, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from smartnodes_core.config import NodeConfig, ValidatorConfig, WorkerConfig, help_of, load
from smartnodes_core.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.toml", 'round_interval_s = 3\nnetwork_id = 4\nrpc_url = "http://file"\nlog_level = "DEBUG"'
    )
    env = {"TENSORLINK_NETWORK_ID": "5", "SMARTNODES_RPC_URL": "http://env", "OTHER": "x"}
    config = load(ValidatorConfig, file, env, {"rpc-url": "http://flag", "endpoint": None})
    assert (config.round_interval_s, config.network_id, config.rpc_url, config.log_level) == (
        3.0,
        5,
        "http://flag",
        "DEBUG",
    )
    assert config.endpoint == NodeConfig().endpoint


def test_an_unknown_key_names_the_closest_and_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean endpoint\? known are .*rpc_url"):
        load(NodeConfig, write(tmp_path / "c.toml", 'endpont = "x"'), {})


def test_variables_of_other_programs_are_not_refused() -> None:
    assert load(NodeConfig, None, {"TENSORLINK_SOMETHING": "1"}).network_id == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"network_id": "many"}, "network_id"),
        ({"network_id": 1.5}, "whole number"),
        ({"network_id": True}, "a number"),
        ({"network_id": -1}, "negative"),
        ({"rpc_url": 7}, "text"),
        ({"log_level": "LOUD"}, "DEBUG, INFO"),
        ({"chain_poll_interval_s": "nan"}, "finite"),
    ],
)
def test_values_of_the_wrong_kind_are_config_errors(flags: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(NodeConfig, None, {}, flags)


def test_lists_are_written_with_commas_outside_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", 'bootstrap = ["a:1"]')
    assert load(NodeConfig, file, {}).bootstrap == ["a:1"]
    assert load(NodeConfig, file, {"SMARTNODES_BOOTSTRAP": "b:2, c:3"}).bootstrap == ["b:2", "c:3"]


def test_a_file_that_is_missing_or_no_toml_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(NodeConfig, tmp_path / "none.toml", {})
    with pytest.raises(ConfigError, match="not TOML"):
        load(NodeConfig, write(tmp_path / "c.toml", "= 1"), {})


def test_home_is_expanded_and_every_setting_has_its_help() -> None:
    assert "~" not in str(WorkerConfig().data_dir)
    assert all(help_of(WorkerConfig).values())


def test_a_validators_vote_on_parameters_names_both() -> None:
    assert load(ValidatorConfig, env={}).vote_fee_bps is None
    voted = load(ValidatorConfig, env={}, flags={"vote_fee_bps": "300", "vote_kappa_bps": "20000"})
    assert (voted.vote_fee_bps, voted.vote_kappa_bps) == (300, 20_000)
    for flags, reason in (
        ({"vote_fee_bps": "300"}, "names both"),
        ({"vote_fee_bps": "10001", "vote_kappa_bps": "1"}, "at most 10000"),
    ):
        with pytest.raises(ConfigError, match=reason):
            load(ValidatorConfig, env={}, flags=flags)
