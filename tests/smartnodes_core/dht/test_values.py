"""What a node of the DHT keeps for others, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from smartnodes_core.dht import values as values_module
from smartnodes_core.dht.contacts import job_id, node_id
from smartnodes_core.dht.rules import MAX_LIFETIME_S
from smartnodes_core.dht.values import ValueStore
from smartnodes_core.errors import BusyError, RecordError, SignatureError
from smartnodes_core.records import Plan, Signed

JOB = b"j" * 32


@pytest.fixture
def swarm(make_swarm: Callable[..., Any]) -> Any:
    return make_swarm(3)


@pytest.fixture
def store(swarm: Any) -> ValueStore:
    return ValueStore(7, max_per_owner=3, now_s=swarm.clock.unix, clock=swarm.clock)


def keep(store: ValueStore, signed: Signed) -> bool:
    return store.store(store.entry_of(signed))


def test_the_newest_of_each_owner_is_kept(swarm: Any, store: ValueStore) -> None:
    first, second, _ = swarm.members
    assert keep(store, first.announcement(sequence=5))
    assert not keep(store, first.announcement(sequence=4))
    assert not keep(store, first.announcement(sequence=5, offers={"other": 1}))
    newest = first.announcement(sequence=6)
    assert keep(store, newest)
    assert [entry.signed for entry in store.entries(node_id(first.key))] == [newest]
    assert keep(store, first.notice(JOB))
    assert keep(store, second.notice(JOB))
    assert {entry.owner for entry in store.entries(job_id(JOB))} == {first.key, second.key}
    assert len(store) == 3


def test_another_node_cannot_write_for_the_owner(swarm: Any, store: ValueStore) -> None:
    victim, thief, _ = swarm.members
    with pytest.raises(SignatureError, match="of another"):
        keep(store, thief.announcement(node_key=victim.key))
    with pytest.raises(SignatureError, match="of another"):
        keep(store, thief.notice(JOB, keeper=victim.key))
    honest = victim.announcement()
    with pytest.raises(SignatureError, match="does not verify"):
        keep(store, Signed(record=honest.record, signer=victim.key, signature=bytes(64)))
    assert len(store) == 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"network_id": 8}, "network 8"),
        ({"expires_at_s": 1}, "expired"),
        ({"expires_at_s": 1 << 40}, f"at most {MAX_LIFETIME_S} s"),
        ({"offers": {f"{n:0250d}": "x" * 250 for n in range(64)}}, "bytes: at most"),
    ],
)
def test_what_is_elsewhere_expired_eternal_or_huge_is_refused(
    swarm: Any, store: ValueStore, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(RecordError, match=complaint):
        keep(store, swarm.members[0].announcement(**changes))


def test_other_kinds_of_records_and_garbage_are_refused(swarm: Any, store: ValueStore) -> None:
    plan = Plan(job=JOB, version=0, assignments=[], spares=[], validators=[], reason="")
    with pytest.raises(RecordError, match="neither"):
        keep(store, swarm.members[0].identity.sign(plan))
    for data in (b"", b"\xff" * 100, b"\x91" * 1000):
        with pytest.raises(RecordError):
            keep(store, Signed(record=data, signer=swarm.members[0].key, signature=bytes(64)))


def test_one_owner_that_floods_gets_its_share_and_no_more(swarm: Any, store: ValueStore) -> None:
    flooder, other, _ = swarm.members
    for number in range(3):
        assert keep(store, flooder.notice(bytes([number] * 32)))
    with pytest.raises(BusyError, match="3 of this owner"):
        keep(store, flooder.notice(b"f" * 32))
    assert keep(store, flooder.notice(bytes([2] * 32), sequence=2))
    assert keep(store, other.notice(b"f" * 32))


def test_expiry_makes_room(swarm: Any, store: ValueStore) -> None:
    member = swarm.members[0]
    for number in range(3):
        keep(store, member.notice(bytes([number] * 32), expires_at_s=int(swarm.clock.unix()) + 10))
    swarm.clock.now_s += 11
    assert store.entries(job_id(bytes(32))) == []
    assert keep(store, member.notice(JOB))
    assert len(store) == 1


def test_one_id_has_so_many_owners(make_swarm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_module, "MAX_OWNERS_PER_KEY", 2)
    swarm = make_swarm(3)
    store = ValueStore(7, now_s=swarm.clock.unix)
    for member in swarm.members[:2]:
        keep(store, member.notice(JOB))
    with pytest.raises(BusyError):
        keep(store, swarm.members[2].notice(JOB))
    assert keep(store, swarm.members[0].notice(JOB, sequence=2))


def test_its_memory_is_bounded(swarm: Any) -> None:
    store = ValueStore(7, max_bytes=2200, now_s=swarm.clock.unix)
    for number in range(3):
        assert keep(store, swarm.members[0].notice(bytes([number] * 32)))
    with pytest.raises(BusyError, match="of at most 2200 bytes"):
        keep(store, swarm.members[0].notice(JOB))
    assert keep(store, swarm.members[0].notice(bytes(32), sequence=2))
    assert store._num_bytes <= 2200


def test_what_nobody_sent_for_a_while_is_due_once(swarm: Any, store: ValueStore) -> None:
    first, second, _ = swarm.members
    keep(store, first.announcement())
    again = second.announcement()
    keep(store, again)
    swarm.clock.now_s += 10
    assert not keep(store, again)  # heard again, though nothing is new
    assert [entry.owner for entry in store.unheard_for(5)] == [first.key]
    assert store.unheard_for(5) == []
    swarm.clock.now_s += 10
    assert len(store.unheard_for(5, most=1)) == 1
