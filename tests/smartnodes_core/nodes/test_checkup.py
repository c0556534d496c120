"""A check-up says what a machine lacks, in words that name the remedy."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from smartnodes_core.chain.account import save_account_key
from smartnodes_core.chain.memory import MemoryChain
from smartnodes_core.chain.model import CHAIN_ID, REGISTRY, ChainModel
from smartnodes_core.chain.settings import SNO, Addresses, ChainSettings
from smartnodes_core.chain.signing import address_of
from smartnodes_core.config import NodeConfig, WorkerConfig
from smartnodes_core.identity import Identity, make_binding
from smartnodes_core.journal import Journal
from smartnodes_core.nodes import checkup
from smartnodes_core.nodes.authority import ChainAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.checkup import check_up, congestion_control, summary
from smartnodes_core.nodes.introducing import IntroductionDesk
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.running import JOURNAL
from smartnodes_core.transport.tls import TlsTransport

KEYS = {"worker": b"w" * 32, "validator": b"v" * 32}


class Place:
    """A machine with key files, a chain, and a validator that listens on loopback."""

    def __init__(self, folder):
        accounts = [address_of(key) for key in KEYS.values()]
        self.model = ChainModel(
            ChainSettings(networks={1: 10_000}, genesis={account: 2_000_000 * SNO for account in accounts})
        )
        self.identity = Identity.from_seed(b"1" * 32)
        self.identity.save(folder / "identity.json")
        save_account_key(folder / "account.json", KEYS["worker"])
        Addresses(CHAIN_ID, 0, bytes(20), REGISTRY, bytes(20), bytes(20)).write(folder / "addresses.json")
        self.validator = self.make_validator()
        self.config = NodeConfig(
            identity=folder / "identity.json",
            account=folder / "account.json",
            addresses=folder / "addresses.json",
            bootstrap=[self.validator.endpoint],
        )

    def chain(self, role):
        return MemoryChain(self.model, KEYS[role])

    def register(self, role, identity):
        Membership(self.chain(role), 1).join(role, identity.node_key, b"t" * 32 if role == "validator" else None)

    def make_validator(self):
        identity = Identity.from_seed(b"2" * 32)
        self.register("validator", identity)
        binding = make_binding(identity, KEYS["validator"], "validator", CHAIN_ID, REGISTRY, 1, int(time.time()) + 3600)
        authority = ChainAuthority(lambda: self.chain("validator").members(1), min_refresh_interval_s=0.0)
        node = Node(identity, binding, TlsTransport(identity, binding), authority)
        IntroductionDesk(node)
        node.start()
        return node

    def findings(self, **changes):
        return {finding.name: finding for finding in check_up(replace(self.config, **changes))}


@pytest.fixture
def place(tmp_path, monkeypatch):
    made = Place(tmp_path)
    monkeypatch.setattr(checkup, "_chain", lambda config: made.chain("worker"))
    yield made
    made.validator.stop()


def test_a_machine_that_is_well_is_told_so(place):
    place.register("worker", place.identity)
    found = place.findings()
    assert {finding.level for finding in found.values()} <= {"ok", "warning"}
    endpoint = place.validator.endpoint
    assert "admits this node" in found[f"validator {endpoint}"].words
    assert found["reachability"].words == "direct: it listens on loopback, for this machine alone"
    assert found["clock"].words == "within 1 s of a validator's"
    assert "identity" in str(found["identity"])


def test_who_is_not_registered_is_told_what_registers(place):
    found = place.findings()
    assert found["registration"].level == "warning"
    assert "registers itself when it starts" in found["registration"].words
    refused = found[f"validator {place.validator.endpoint}"]
    assert (refused.level, "is not registered on chain" in refused.words) == ("failure", True)
    assert "reachability" not in found


def test_another_key_of_the_account_is_found(place):
    place.register("worker", Identity.from_seed(b"3" * 32))
    found = place.findings()["registration"]
    assert (found.level, "another node key" in found.words) == ("failure", True)


def test_key_files_that_others_may_read_are_found(place):
    place.config.identity.chmod(0o644)
    found = place.findings()
    assert found["identity"].level == "failure"
    assert "chmod 600" in found["identity"].words
    assert found["chain"].level == "ok"


def test_missing_files_are_named(place, tmp_path):
    found = place.findings(account=tmp_path / "nothing.json")
    assert (found["account"].level, "nothing.json" in found["account"].words) == ("failure", True)


def test_a_chain_that_does_not_answer_ends_the_check_up(place, monkeypatch):
    monkeypatch.undo()
    found = place.findings(rpc_url="http://127.0.0.1:9")
    assert found["chain"].level == "failure"
    assert list(found)[-1] == "chain"


def test_a_port_that_is_taken_is_named(place):
    place.register("worker", place.identity)
    found = place.findings(endpoint=place.validator.endpoint)["listening"]
    assert (found.level, "its log tells" in found.words) == ("warning", True)


def test_a_node_that_runs_is_left_alone(place, tmp_path):
    place.register("worker", place.identity)
    fields = {name: getattr(place.config, name) for name in ("identity", "account", "addresses", "bootstrap")}
    config = WorkerConfig(**fields, data_dir=tmp_path)
    journal = Journal(tmp_path / JOURNAL)
    found = {finding.name: finding for finding in check_up(config)}
    assert found["reachability"].words.startswith("not tried, this node is running")
    assert place.validator.peers() == []
    journal.close()
    assert "admits this node" in {f.name: f for f in check_up(config)}[f"validator {place.validator.endpoint}"].words


def test_a_validator_that_is_not_there_is_a_failure_and_none_named_a_warning(place):
    place.register("worker", place.identity)
    found = place.findings(bootstrap=["127.0.0.1:9"])
    assert found["validator 127.0.0.1:9"].level == "failure"
    assert place.findings(bootstrap=[])["validators"].level == "warning"


def test_a_clock_that_is_wrong_is_found(place, monkeypatch):
    place.register("worker", place.identity)
    observe = IntroductionDesk.rpc_observe

    def an_hour_ahead(self, caller, params, body):
        told = observe(self, caller, params, body)
        return {**told, "now_s": told["now_s"] + 3600}

    monkeypatch.setattr(IntroductionDesk, "rpc_observe", an_hour_ahead)
    place.validator.stop()
    place.validator = place.make_validator()
    found = place.findings(bootstrap=[place.validator.endpoint])["clock"]
    assert (found.level, found.words.startswith("3600 s behind")) == ("failure", True)


@pytest.mark.parametrize(("text", "level"), [("reno bbr cubic\n", "ok"), ("reno cubic\n", "warning"), (None, "ok")])
def test_a_congestion_control_for_lossy_lines_is_looked_for(tmp_path, text, level):
    path = tmp_path / "available"
    if text is not None:
        path.write_text(text)
    assert congestion_control(path).level == level


def test_the_summary_counts():
    finding = checkup.Finding
    assert summary([finding("ok", "a", "")]) == "well"
    assert summary([finding("ok", "a", ""), finding("warning", "b", "")]) == "well, 1 warnings"
    assert summary([finding("failure", "a", "")]).startswith("1 failures")
