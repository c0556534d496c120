"""What the commands print when something is wrong: one line that says what was found and what to do."""

from __future__ import annotations

import itertools
import json
import os
import socket
import stat
import subprocess
import sys

import pytest

from smartnodes_core.chain.account import save_account_key
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.settings import Addresses
from smartnodes_core.errors import IdentityError
from smartnodes_core.identity import Identity
from tensorlink.cli.main import main

pytestmark = pytest.mark.starts_network

TIMEOUT_S = 60
#: Accounts that no node of the network has.
ACCOUNTS = itertools.count(20)


def run(*arguments, module="main", env=None):
    """Exit code and the lines that a command prints, on both streams."""
    done = subprocess.run(
        [sys.executable, "-m", f"tensorlink.cli.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def node(network, tmp_path):
    """Flags of a node that could join the network: keys of its own, the network's chain."""
    Identity.create().save(tmp_path / "identity.json")
    save_account_key(tmp_path / "account.json", devnet_key(next(ACCOUNTS)))
    return {
        "identity": tmp_path / "identity.json",
        "account": tmp_path / "account.json",
        "addresses": network.log_dir / "addresses.json",
        "rpc-url": network.local.chain_url,
        "data-dir": tmp_path,
        "log-level": "ERROR",
    }


def flags(settings):
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def refused(node, module="validator", **changes):
    """The one line that a node prints that does not come up."""
    settings = {**node, **{key.replace("_", "-"): value for key, value in changes.items()}}
    code, out, errors = run(*flags(settings), module=module)
    assert (code, out, len(errors)) == (2, [], 1), errors
    assert errors[0].startswith(f"tensorlink-{module}: ")
    return errors[0]


def test_a_port_in_use_is_named_with_the_remedy(node, taken_port):
    line = refused(node, endpoint=f"127.0.0.1:{taken_port}")
    assert f"port {taken_port} on 127.0.0.1 is taken" in line
    assert "choose another port" in line


def test_a_devnet_s_port_in_use_is_named(taken_port):
    code, out, errors = run("devnet", "--port", taken_port)
    assert (code, out, len(errors)) == (2, [], 1), errors
    assert str(taken_port) in errors[0]
    assert "in use" in errors[0]


def test_a_chain_that_does_not_answer_is_named(node):
    line = refused(node, rpc_url="http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in line


def test_addresses_of_another_chain_are_refused(node, tmp_path):
    addresses = json.loads(node["addresses"].read_text())
    changed = {key: ("0x" + "11" * 20 if str(value).startswith("0x") else value) for key, value in addresses.items()}
    (tmp_path / "wrong.json").write_text(json.dumps(changed))
    assert Addresses.read(tmp_path / "wrong.json")
    assert "0x1111" in refused(node, addresses=tmp_path / "wrong.json")


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"sno": 5}'])
def test_a_file_that_holds_no_addresses_is_refused(node, tmp_path, content):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    assert str(path) in refused(node, addresses=path)


@pytest.mark.parametrize("module", ["worker", "validator"])
def test_key_files_that_others_may_read_are_refused(node, module):
    node["identity"].chmod(0o644)
    assert f"run chmod 600 {node['identity']}" in refused(node, module=module, bootstrap="127.0.0.1:9")


def test_a_missing_key_file_says_how_to_make_one(node, tmp_path):
    assert "tensorlink keys" in refused(node, account=tmp_path / "none.json")


def test_unknown_settings_are_refused_with_the_likely_one(node, tmp_path):
    (tmp_path / "node.toml").write_text("round_intervall_s = 5\n")
    assert "did you mean round_interval_s?" in refused(node, config=tmp_path / "node.toml")


def test_settings_that_are_no_toml_are_refused(node, tmp_path):
    (tmp_path / "node.toml").write_text("round interval\n")
    assert "is not TOML" in refused(node, config=tmp_path / "node.toml")


def test_a_worker_without_threads_is_refused(node):
    assert "num_threads is 0" in refused(node, module="worker", num_threads=0)
    assert "needed 1 or more of cpu or cuda" in refused(node, module="worker", devices=0)
    assert "device 'tpu'" in refused(node, module="worker", device="tpu")


def test_a_worker_needs_a_bootstrap_validator(node):
    assert "bootstrap" in refused(node, module="worker")


def test_keys_are_sealed_by_a_passphrase_on_request(tmp_path, capsys):
    (tmp_path / "passphrase").write_text("correct horse")
    (tmp_path / "passphrase").chmod(0o600)
    assert main(["keys", "--folder", str(tmp_path / "k"), "--passphrase-file", str(tmp_path / "passphrase")]) == 0
    node_key = capsys.readouterr().out.split()[2]
    assert Identity.load(tmp_path / "k/identity.json", "correct horse").node_key.hex() == node_key
    with pytest.raises(IdentityError, match="sealed by a passphrase"):
        Identity.load(tmp_path / "k/identity.json")
    assert main(["keys", "--folder", str(tmp_path / "j"), "--passphrase-file", str(tmp_path / "none")]) == 2


def test_keys_are_made_once_and_for_their_owner_alone(tmp_path):
    code, out, _ = run("keys", "--folder", tmp_path / "k")
    assert code == 0
    assert out[0].startswith("node key ")
    for name in ("identity.json", "account.json"):
        assert stat.S_IMODE((tmp_path / "k" / name).stat().st_mode) == 0o600
    code, _, errors = run("keys", "--folder", tmp_path / "k")
    assert code == 2
    assert "never overwritten" in errors[0]


def test_an_account_comes_from_the_environment(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "0x" + devnet_key(3).hex())
    assert main(["keys", "--folder", str(tmp_path / "k"), "--account-key-variable", "MY_KEY"]) == 0
    monkeypatch.setenv("MY_KEY", "xyz")
    assert main(["keys", "--folder", str(tmp_path / "j"), "--account-key-variable", "MY_KEY"]) == 2
    assert "MY_KEY" in capsys.readouterr().err
    assert main(["keys", "--folder", str(tmp_path / "j"), "--account-key-variable", "NOT_SET"]) == 2


def test_status_prints_the_members(network, tmp_path, capsys):
    config = tmp_path / "user.toml"
    config.write_text(f'rpc_url = "{network.local.chain_url}"\naddresses = "{network.log_dir / "addresses.json"}"\n')
    assert main(["status", "--config", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("round ")
    assert sum("  worker" in line for line in lines) >= 3
    assert sum("  validator" in line for line in lines) == 1


def test_demo_s_flags_are_checked_before_anything_starts(tmp_path, capsys):
    assert main(["demo", "--steps", "0"]) == 2
    assert main(["demo", "--report", str(tmp_path / "none" / "r.json")]) == 2
    assert "make it first" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["worker", "validator"])
def test_help_lists_every_setting(module):
    code, out, _ = run("--help", module=module)
    text = "\n".join(out)
    assert code == 0
    assert all(flag in text for flag in ("--identity", "--rpc-url", "--bootstrap", "--data-dir", "--exit-with-parent"))
