"""What the store of announcements keeps and refuses."""

from __future__ import annotations

from typing import Any

import pytest

from smartnodes_core.dht.rules import MAX_LIFETIME_S
from smartnodes_core.dht.storage import RecordStore
from smartnodes_core.errors import BusyError, RecordError, SignatureError
from smartnodes_core.identity import Identity
from smartnodes_core.records import Announcement, Signed

NOW_S = 1000


def make(identity: Identity, **changes: Any) -> Signed:
    fields: dict[str, Any] = {
        "node_key": identity.node_key,
        "role": "worker",
        "network_id": 7,
        "sequence": 1,
        "expires_at_s": NOW_S + 100,
        "endpoints": ["a:1"],
        "offers": {"memory_bytes": 5},
        **changes,
    }
    return identity.sign(Announcement(**fields))


class Clock:
    now_s = float(NOW_S)

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> RecordStore:
    return RecordStore(7, max_records=3, now_s=clock)


def test_the_newest_sequence_wins(store: RecordStore) -> None:
    identity = Identity.create()
    assert store.store(make(identity, sequence=5))
    assert not store.store(make(identity, sequence=5, endpoints=["b:2"]))
    assert not store.store(make(identity, sequence=4))
    assert store.store(make(identity, sequence=6, endpoints=["c:3"]))
    found = store.get(identity.node_key)
    assert found is not None
    assert found.endpoints == ["c:3"]
    assert len(store) == 1


def test_only_the_announced_node_may_sign(store: RecordStore) -> None:
    victim, thief = Identity.create(), Identity.create()
    with pytest.raises(SignatureError, match="of another"):
        store.store(make(thief, node_key=victim.node_key))
    honest = make(victim)
    with pytest.raises(SignatureError):
        store.store(Signed(record=honest.record, signer=thief.node_key, signature=honest.signature))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"network_id": 8}, "network 8"),
        ({"expires_at_s": NOW_S}, "expired"),
        ({"expires_at_s": NOW_S + MAX_LIFETIME_S + 100}, "at most"),
        ({"offers": {f"{n:0250d}": "x" * 250 for n in range(64)}}, "bytes: at most"),
    ],
)
def test_what_is_elsewhere_expired_eternal_or_huge_is_refused(
    store: RecordStore, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(RecordError, match=complaint):
        store.store(make(Identity.create(), **changes))


def test_expired_announcements_are_gone(store: RecordStore, clock: Clock) -> None:
    identity = Identity.create()
    store.store(make(identity))
    clock.now_s += 101
    assert store.get(identity.node_key) is None
    assert store.find() == []


def test_a_full_store_makes_room_only_by_expiry(store: RecordStore, clock: Clock) -> None:
    for _ in range(3):
        store.store(make(Identity.create()))
    with pytest.raises(BusyError, match="announce elsewhere"):
        store.store(make(Identity.create()))
    clock.now_s += 101
    assert store.store(make(Identity.create(), expires_at_s=int(clock.now_s) + 10))
    assert len(store) == 1


def test_finding_goes_by_role_and_page(store: RecordStore) -> None:
    workers = sorted((Identity.create() for _ in range(2)), key=lambda identity: identity.node_key)
    for identity in workers:
        store.store(make(identity))
    store.store(make(Identity.create(), role="validator"))
    first = store.find("worker", limit=1)
    assert [signed.signer for signed in first] == [workers[0].node_key]
    second = store.find("worker", after=first[0].signer)
    assert [signed.signer for signed in second] == [workers[1].node_key]
    assert len(store.find()) == 3
    store.remove(workers[0].node_key)
    assert len(store.find("worker")) == 1
