"""The first half of a rig's story over real TLS, with the in-memory chain in place of web3's."""

from __future__ import annotations

import json
import threading
import time

import pytest

from smartnodes_core.chain import client
from smartnodes_core.chain.account import save_account_key
from smartnodes_core.chain.memory import MemoryChain
from smartnodes_core.chain.model import CHAIN_ID, ESCROW, REGISTRY, ROUNDS, ChainModel
from smartnodes_core.chain.settings import SNO, Addresses, ChainSettings
from smartnodes_core.chain.signing import address_of
from smartnodes_core.config import NodeConfig
from smartnodes_core.dht import running
from smartnodes_core.errors import AuthorityError, ConfigError, IdentityError, JobError, PortInUseError, Unavailable
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.membership import key_hash
from smartnodes_core.nodes.station import Station


class Place:
    """A folder of key files and a chain."""

    def __init__(self, folder, monkeypatch) -> None:
        self.folder, self.stations = folder, []
        accounts = [address_of(bytes([number] * 32)) for number in range(1, 9)]
        self.model = ChainModel(ChainSettings(genesis={account: 2_000_000 * SNO for account in accounts}))
        monkeypatch.setattr(client, "ChainClient", lambda url, addresses, key: MemoryChain(self.model, key))
        self.addresses = folder / "addresses.json"
        fields = Addresses.__dataclass_fields__
        known = {"chain_id": CHAIN_ID, "registry": REGISTRY, "escrow": ESCROW, "rounds": ROUNDS}
        values = {name: known.get(name, bytes(20) if "from" not in name else 0) for name in fields}
        Addresses(**values).write(self.addresses)

    def config(self, number: int, **changes) -> NodeConfig:
        identity, account = self.folder / f"id{number}.json", self.folder / f"acc{number}.json"
        if not identity.exists():
            Identity.from_seed(bytes([number] * 32)).save(identity)
            save_account_key(account, bytes([number] * 32))
        fields = {"identity": identity, "account": account, "addresses": self.addresses, "chain_poll_interval_s": 0.2}
        return NodeConfig(**{**fields, **changes})

    def open(self, number: int, role, **changes) -> Station:
        tip = bytes([number] * 32) if role == "validator" else None
        self.stations.append(Station.open(self.config(number, **changes), role, tip))
        return self.stations[-1]

    def close(self) -> None:
        for station in self.stations:
            station.close()


@pytest.fixture
def place(tmp_path, monkeypatch):
    made = Place(tmp_path, monkeypatch)
    yield made
    made.close()


def test_a_station_registers_joins_announces_and_is_found(place):
    validator = place.open(1, "validator")
    validator.join()
    validator.announce(dict)
    worker = place.open(2, "worker", bootstrap=[validator.node.endpoint])
    worker.join()
    worker.announce(lambda: {"free_slots": 3})
    user = place.open(3, "user", bootstrap=[validator.node.endpoint])
    user.join()
    found = user.find("worker")
    assert [(each.node_key, each.offers) for each in found] == [(worker.identity.node_key, {"free_slots": 3})]
    assert [each.node_key for each in worker.find("validator")] == [validator.identity.node_key]
    worker.learn_validators()
    assert worker.membership.tip_of(validator.identity.node_key) == bytes([1] * 32)
    with pytest.raises(ConfigError, match="does not listen"):
        _ = user.node.endpoint


def test_a_second_validator_takes_over_what_the_first_knows(place):
    first = place.open(1, "validator")
    first.join()
    first.announce(dict)
    worker = place.open(3, "worker", bootstrap=[first.node.endpoint])
    worker.join()
    worker.announce(dict)
    second = place.open(2, "validator", bootstrap=[first.node.endpoint])
    second.join()
    assert [each.node_key for each in second.find("worker")] == [worker.identity.node_key]


def eventually(condition, timeout_s=20.0):
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        pause.wait(0.02)
    return found


def test_a_node_is_looked_up_by_its_key_and_called_although_nobody_told_its_address(place):
    validator = place.open(1, "validator")
    validator.join()
    validator.announce(dict)
    workers = [place.open(number, "worker", bootstrap=[validator.node.endpoint]) for number in (2, 3)]
    user = place.open(4, "user", bootstrap=[validator.node.endpoint])
    for station in [*workers, user]:
        station.join()
    for worker in workers:
        worker.announce(dict)
    first, second = (worker.identity.node_key for worker in workers)
    for asker in (user, workers[0]):
        found = eventually(lambda asker=asker: asker.dht.dht.find_node(second))
        assert found.endpoints == [workers[1].node.endpoint]
    assert user.node.call(second, "binding").body
    assert user.identity.node_key not in validator.dht.dht.table
    workers[1].close()
    validator.close()
    eventually(lambda: user.dht.dht.find_node(second))  # others keep what it announced
    with pytest.raises(JobError, match="not found"):
        user.find_job(first)


def test_connections_that_only_the_dht_used_end_and_those_to_be_introduced_over_stay(place, monkeypatch):
    monkeypatch.setattr(running, "IDLE_S", 0.0)
    monkeypatch.setattr(running, "INTERVAL_S", 0.1)
    validators = [place.open(1, "validator")]
    validators[0].join()
    validators[0].announce(dict)
    validators.append(place.open(5, "validator", bootstrap=[validators[0].node.endpoint]))
    validators[1].join()
    validators[1].announce(dict)
    first = [validators[0].node.endpoint]
    worker, user = place.open(2, "worker", bootstrap=first), place.open(4, "user", bootstrap=first)
    for station in (worker, user):
        station.join()
    worker.announce(dict)
    second = validators[1].node
    for asker in (worker, user):
        eventually(lambda asker=asker: asker.dht.dht.find_node(second.node_key))
        asker.node.reach(second.node_key, hearsay=[second.endpoint], passing=True)
    eventually(lambda: worker.node.node_key not in {peer.node_key for peer in second.peers()})
    eventually(lambda: user.node.node_key in {peer.node_key for peer in second.peers()})
    assert {worker.node.node_key, user.node.node_key} <= {peer.node_key for peer in validators[0].node.peers()}


def test_a_station_that_has_not_joined_looks_nothing_up(place):
    worker = place.open(2, "worker")
    assert worker.dht_node() is None
    with pytest.raises(JobError, match="call `join` first"):
        worker.find_job(bytes(32))


def test_members_that_left_are_not_found(place):
    validator = place.open(1, "validator")
    validator.join()
    worker = place.open(2, "worker", bootstrap=[validator.node.endpoint])
    worker.join()
    worker.announce(dict)
    assert validator.find("worker")
    worker.chain.request_exit(1)
    validator.membership.members(0.0)
    assert validator.find("worker") == []


def test_joining_without_a_bootstrap_says_what_to_set(place):
    worker = place.open(1, "worker")
    with pytest.raises(ConfigError, match="set `bootstrap`"):
        worker.join()
    lonely = place.open(2, "validator")
    lonely.join()
    assert lonely.find("worker") == []


def test_a_bootstrap_that_is_not_there_is_unavailable(place, monkeypatch):
    monkeypatch.setattr("smartnodes_core.nodes.station.JOIN_TIMEOUT_S", 0.1)
    worker = place.open(1, "worker", bootstrap=["127.0.0.1:9"])
    with pytest.raises(Unavailable):
        worker.join()


def test_a_port_in_use_is_said_and_nothing_stays_behind(place):
    first = place.open(1, "worker")
    with pytest.raises(PortInUseError):
        place.open(2, "worker", endpoint=first.node.endpoint)


def test_a_rotated_key_is_dropped_within_a_poll_and_its_account_comes_back_with_the_new_one(place):
    validator = place.open(1, "validator")
    validator.join()
    first = [validator.node.endpoint]
    worker = place.open(2, "worker", bootstrap=first)
    worker.join()
    Identity.create().save(place.folder / "new.json")
    new_key, lost = Identity.load(place.folder / "new.json").node_key, threading.Event()
    worker.node.on_peer_lost(lambda key, reason: lost.set())
    began = time.monotonic()
    worker.chain.rotate_key(key_hash(new_key), 1)
    assert lost.wait(10.0)
    assert time.monotonic() - began < 0.2 + 2.0  # the poll, and time for this machine
    assert worker.node.node_key not in {peer.node_key for peer in validator.node.peers()}
    with pytest.raises(AuthorityError, match=r"revoked node key: account 0x\w+ is registered with another"):
        worker.node.connect(validator.node.endpoint)
    worker.close()
    with pytest.raises(AuthorityError, match="tensorlink stake rotate"):
        place.open(2, "worker")
    again = place.open(2, "worker", bootstrap=first, identity=place.folder / "new.json")
    again.join()
    assert new_key in {peer.node_key for peer in validator.node.peers()}


def test_two_nodes_of_one_machine_do_not_share_an_identity(place):
    first = place.open(1, "user")
    with pytest.raises(IdentityError, match=r"id1.json is in use by a node that runs: stop it"):
        place.open(1, "user")
    first.close()
    place.open(1, "user")


def test_an_account_that_is_blacklisted_ends_the_start_and_frees_the_port(place):
    worker = place.open(1, "worker")
    endpoint = worker.node.endpoint
    worker.close()
    place.model.peek(1).update(0, reputation=0)
    with pytest.raises(AuthorityError, match="blacklisted"):
        place.open(1, "worker", endpoint=endpoint)
    place.model.peek(1).update(0, reputation=1)
    assert place.open(1, "worker", endpoint=endpoint).node.endpoint == endpoint


def test_missing_keys_and_addresses_are_local_errors(place):
    with pytest.raises(IdentityError):
        place.open(1, "worker", identity=place.folder / "none.json")
    with pytest.raises(IdentityError):
        place.open(1, "worker", account=place.folder / "none.json")
    (place.folder / "bad.json").write_text(json.dumps({"chain_id": 1}))
    with pytest.raises(ConfigError):
        place.open(1, "worker", addresses=place.folder / "bad.json")
