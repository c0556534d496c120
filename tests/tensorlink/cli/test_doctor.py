"""`tensorlink doctor` prints a line for each check and exits 1 where one failed."""

from __future__ import annotations

import json

import pytest

from smartnodes_core.nodes.checkup import Finding
from tensorlink.cli import doctor
from tensorlink.cli.main import main


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        f'identity = "{tmp_path}/identity.json"\naccount = "{tmp_path}/account.json"\n'
        f'addresses = "{tmp_path}/addresses.json"\n'
    )
    return path


def test_what_is_missing_is_said_with_the_remedy(config, capsys):
    assert main(["doctor", "--config", str(config)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok       torch")
    assert any(line.startswith("failure  identity") and "`tensorlink keys`" in line for line in lines)
    assert any(line.startswith("failure  chain") and "`tensorlink deploy`" in line for line in lines)
    assert lines[-1] == "3 failures: the first one first"


def test_each_check_may_be_an_object(config, capsys):
    assert main(["doctor", "--role", "user", "--json", "--config", str(config)]) == 1
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["name"] for each in findings] == ["identity", "account", "congestion control", "chain"]


def test_warnings_are_no_failure(config, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "check_up", lambda config, role: iter([Finding("warning", "reachability", "hm")]))
    assert main(["doctor", "--config", str(config)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "well, 1 warnings"
