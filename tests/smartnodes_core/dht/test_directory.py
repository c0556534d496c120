"""Announcing and finding through validators."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from smartnodes_core.dht import directory as directory_module
from smartnodes_core.dht.announcer import Announcer
from smartnodes_core.dht.directory import Directory, announce, find
from smartnodes_core.dht.storage import RecordStore
from smartnodes_core.errors import AuthorityError, PeerUnreachableError, ProtocolError
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import Announcement

NETWORK_ID = 7
WAIT_S = 10.0


class Watched(RecordStore):
    """A store that tells when something new came in."""

    def __init__(self) -> None:
        super().__init__(NETWORK_ID)
        self.arrived = threading.Semaphore(0)

    def store(self, signed: Any) -> bool:
        fresh = super().store(signed)
        if fresh:
            self.arrived.release()
        return fresh


class Validators:
    """Validators with directories that know each other."""

    def __init__(self, party: Any, count: int) -> None:
        self.nodes: list[Node] = [party.node("validator") for _ in range(count)]
        self.stores = [Watched() for _ in range(count)]
        self.directories = [Directory(node, store) for node, store in zip(self.nodes, self.stores, strict=True)]
        for node, store in zip(self.nodes, self.stores, strict=True):
            for other in self.nodes:
                if other is not node:
                    node.add_address(other.node_key, other.endpoint)
                store.store(other.identity.sign(announcement(other, "validator")))
                assert store.arrived.acquire(timeout=WAIT_S)
        self.keys = [node.node_key for node in self.nodes]

    def known_to(self, node: Node) -> None:
        for each in self.nodes:
            node.add_address(each.node_key, each.endpoint)


def announcement(node: Node, role: str = "worker", **changes: Any) -> Announcement:
    fields: dict[str, Any] = {
        "node_key": node.node_key,
        "role": role,
        "network_id": NETWORK_ID,
        "sequence": 1,
        "expires_at_s": int(time.time()) + 100,
        "endpoints": [node.endpoint],
        "offers": {"memory_bytes": 5},
        **changes,
    }
    return Announcement(**fields)


@pytest.fixture
def validators(memory_party: Any) -> Iterator[Validators]:
    made = Validators(memory_party, 2)
    yield made
    for each in made.directories:
        each.stop()


def test_what_one_validator_is_told_is_found_at_another(memory_party: Any, validators: Validators) -> None:
    worker: Node = memory_party.node("worker")
    user: Node = memory_party.node("user")
    validators.known_to(worker)
    validators.known_to(user)
    assert announce(worker, validators.keys[:1], announcement(worker)) == 1
    assert validators.stores[1].arrived.acquire(timeout=WAIT_S)
    (found,) = find(user, validators.keys[1:], "worker", NETWORK_ID)
    assert found.offers == {"memory_bytes": 5}
    assert user.connect(found.endpoints[0], found.node_key).role == "worker"


def test_a_validator_that_joins_takes_over_what_another_knows(memory_party: Any, validators: Validators) -> None:
    late: Node = memory_party.node("validator")
    validators.known_to(late)
    directory = Directory(late, RecordStore(NETWORK_ID))
    assert directory.sync_from(validators.keys[0]) == 2
    assert len(directory.find("validator")) == 2
    assert directory.sync_from(validators.keys[0]) == 0
    directory.stop()


def test_a_node_announces_only_itself_and_only_its_role(memory_party: Any, validators: Validators) -> None:
    worker: Node = memory_party.node("worker")
    other: Node = memory_party.node("worker")
    validators.known_to(worker)
    with pytest.raises(AuthorityError, match="another role"):
        announce(worker, validators.keys[:1], announcement(worker, "validator"))
    signed = other.identity.sign(announcement(other)).encode()
    with pytest.raises(AuthorityError, match="announces itself"):
        worker.call(validators.keys[0], "announce", {"announcement": signed})
    with pytest.raises(ProtocolError, match="missing"):
        worker.call(validators.keys[0], "announce", {})


def test_only_validators_pass_announcements_on(memory_party: Any, validators: Validators) -> None:
    worker: Node = memory_party.node("worker")
    validators.known_to(worker)
    signed = worker.identity.sign(announcement(worker)).encode()
    with pytest.raises(AuthorityError, match="validator"):
        worker.call(validators.keys[0], "forward_announcement", {"announcement": signed})


def test_many_are_found_page_by_page(
    memory_party: Any, validators: Validators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "PAGE_RECORDS", 2)
    workers = [memory_party.node("worker") for _ in range(5)]
    for worker in workers:
        validators.known_to(worker)
        announce(worker, validators.keys[:1], announcement(worker))
    found = find(workers[0], validators.keys[:1], "worker", NETWORK_ID)
    assert sorted(each.node_key for each in found) == sorted(worker.node_key for worker in workers)


@pytest.mark.parametrize("params", [{"role": "king"}, {"after": 5}, {"limit": 0}, {"limit": "all"}])
def test_a_malformed_search_is_a_protocol_error(
    memory_party: Any, validators: Validators, params: dict[str, Any]
) -> None:
    user: Node = memory_party.node("user")
    validators.known_to(user)
    with pytest.raises(ProtocolError):
        user.call(validators.keys[0], "find", params)


def test_a_dead_validator_is_passed_over_and_none_at_all_is_an_error(memory_party: Any, validators: Validators) -> None:
    user: Node = memory_party.node("user")
    validators.known_to(user)
    validators.nodes[0].stop()
    assert len(find(user, validators.keys, "validator", NETWORK_ID)) == 2
    with pytest.raises(PeerUnreachableError, match="name at least one"):
        find(user, [], "worker", NETWORK_ID)
    with pytest.raises(PeerUnreachableError, match="name at least one"):
        announce(user, [], announcement(user, "user"))


def test_an_announcer_keeps_announcing_with_rising_sequence(memory_party: Any, validators: Validators) -> None:
    worker: Node = memory_party.node("worker")
    validators.known_to(worker)
    announcer = Announcer(worker, validators.keys[:1], "worker", NETWORK_ID, lambda: {"free": 1}, interval_s=600)
    announcer.start()
    assert validators.stores[0].arrived.acquire(timeout=WAIT_S)
    first = validators.stores[0].get(worker.node_key)
    announcer.update()
    assert validators.stores[0].arrived.acquire(timeout=WAIT_S)
    second = validators.stores[0].get(worker.node_key)
    assert first is not None
    assert second is not None
    assert second.sequence > first.sequence
    announcer.stop()
    announcer.stop()


def test_a_validator_that_knows_no_other_stays_findable_in_its_own_directory(party: Any) -> None:
    validators = Validators(party, 1)
    (node,), (store,), (directory,) = validators.nodes, validators.stores, validators.directories
    announcer = Announcer(node, [], "validator", NETWORK_ID, dict, directory=directory, interval_s=0.01)
    announcer.start()
    try:
        for _ in range(3):  # each time with a later end
            assert store.arrived.acquire(timeout=WAIT_S)
    finally:
        announcer.stop()
    (found,) = store.find("validator")
    assert Announcement.decode(found.record).node_key == node.node_key
