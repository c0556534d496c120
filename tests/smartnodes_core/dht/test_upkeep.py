"""What keeps a DHT whole while its nodes come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from smartnodes_core.dht.contacts import node_id
from smartnodes_core.dht.node import NUM_REPLICAS
from smartnodes_core.dht.routing import FRESH_S
from smartnodes_core.dht.upkeep import REFRESH_S, REPUBLISH_S, Upkeep, leave, maintain


def holders(swarm: Any, owner: Any) -> list[Any]:
    return [member for member in swarm.members if member.dht.values.entries(node_id(owner.key))]


def test_records_survive_half_of_the_nodes_leaving_in_turns_without_their_owners(
    make_swarm: Callable[..., Any],
) -> None:
    swarm = make_swarm(60)
    owners = [swarm.add(listens=False) for _ in range(10)]  # they put once, and never again
    for owner in owners:
        owner.dht.put(owner.announcement())
    for _ in range(3):
        swarm.vanish(swarm.rng.sample(swarm.members, 10))
        swarm.clock.now_s += 2 * REPUBLISH_S
        for member in swarm.members:
            maintain(member.dht)
    assert len(swarm.members) == 30
    assert all(swarm.pick().dht.find_node(owner.key) is not None for owner in owners)
    assert all(len(holders(swarm, owner)) >= NUM_REPLICAS for owner in owners)


def test_ghosts_leave_the_tables(make_swarm: Callable[..., Any]) -> None:
    swarm = make_swarm(40)
    gone = swarm.rng.sample(swarm.members, 12)
    swarm.vanish(gone)
    for _ in range(3):
        swarm.clock.now_s += REFRESH_S
        for member in swarm.members:
            maintain(member.dht)
    dead = {member.key for member in gone}
    assert not any(contact.node_key in dead for member in swarm.members for contact in member.dht.table.contacts())


def test_a_leaving_node_gives_its_records_to_those_that_come_next(make_swarm: Callable[..., Any]) -> None:
    swarm = make_swarm(60)
    owner = swarm.add(listens=False)
    owner.dht.put(owner.announcement())
    for _ in range(30):
        leaver = holders(swarm, owner)[0]
        assert leave(leaver.dht) == 1
        swarm.vanish([leaver])
        assert len(holders(swarm, owner)) >= NUM_REPLICAS - 1
    assert swarm.pick().dht.find_node(owner.key) is not None


def test_one_of_those_who_keep_a_record_passes_it_on_and_the_others_wait(make_swarm: Callable[..., Any]) -> None:
    swarm = make_swarm(30)
    owner = swarm.add(listens=False)
    owner.dht.put(owner.announcement())
    swarm.clock.now_s += 2 * REPUBLISH_S
    first, *others = holders(swarm, owner)
    maintain(first.dht, refresh_s=1e9)
    assert all(member.dht.values.unheard_for(REPUBLISH_S) == [] for member in others)


def test_a_newcomer_learns_of_the_others_and_they_of_it(make_swarm: Callable[..., Any]) -> None:
    swarm = make_swarm(60)
    newcomer = swarm.add()
    assert sum(newcomer.key in member.dht.table for member in swarm.members) >= 10
    before = len(newcomer.dht.table)
    swarm.clock.now_s += REFRESH_S
    maintain(newcomer.dht)
    assert len(newcomer.dht.table) > before


def test_who_was_seen_least_recently_is_pinged_and_stays_when_it_answers(make_swarm: Callable[..., Any]) -> None:
    swarm = make_swarm(90)
    member = swarm.members[0]
    for each in swarm.members:
        member.dht.table.seen(each.contact)
    waiting = [bucket for bucket in member.dht.table._buckets.values() if bucket.waiting]
    assert waiting
    before = {key for bucket in waiting for key in bucket.entries}
    swarm.clock.now_s += FRESH_S + 1
    assert member.dht.table.to_ping()
    maintain(member.dht, refresh_s=1e9)
    assert {key for bucket in waiting for key in bucket.entries} == before


def test_it_joins_and_goes_on_by_itself_until_stopped(make_swarm: Callable[..., Any]) -> None:
    swarm = make_swarm(5)
    late = swarm.add(listens=False)
    late.dht.table.remove(next(iter(late.dht.table.contacts())).node_key)
    for contact in late.dht.table.contacts():
        late.dht.table.remove(contact.node_key)
    turns = threading.Semaphore(0)
    late.dht.table.to_ping = lambda: turns.release() or []
    upkeep = Upkeep(late.dht, lambda: [swarm.members[0].contact], interval_s=0.01)
    upkeep.start()
    assert upkeep.joined.wait(20)
    for _ in range(3):
        assert turns.acquire(timeout=20)
    upkeep.stop()
    upkeep.stop()
    assert len(late.dht.table) == 5
