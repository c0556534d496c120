"""What a routing table holds, whatever happens to it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.dht.contacts import ID_BITS, Contact, node_id
from smartnodes_core.dht.routing import FRESH_S, GHOST_S, MAX_FAILURES, MAX_WAITING, RoutingTable
from smartnodes_core.records import digest_of

OWN = digest_of("test", b"own")


def contact(number: int, host: str = "10.0.0.1") -> Contact:
    return Contact(digest_of("test", number.to_bytes(4)), (f"{host}:{number % 60000 + 1}",))


def bucket_of(table: RoutingTable, each: Contact) -> int:
    return (table.own_id ^ each.id).bit_length() - 1


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def far_ones(table: RoutingTable, count: int) -> list[Contact]:
    """Contacts of the farthest bucket, where half of all nodes are."""
    return [each for each in map(contact, range(8 * count)) if bucket_of(table, each) == ID_BITS - 1][:count]


EVENTS = st.lists(
    st.tuples(st.sampled_from(["seen", "seen", "seen", "failed", "removed", "later"]), st.integers(0, 200)),
    max_size=300,
)


@given(EVENTS, st.integers(1, 4))
def test_a_table_keeps_its_rules_whatever_happens(events: list[tuple[str, int]], bucket_size: int) -> None:
    clock = Clock()
    table = RoutingTable(OWN, bucket_size=bucket_size, clock=clock)
    removed_last: set[bytes] = set()
    for what, number in events:
        each = contact(number, host=f"8.8.{number % 5}.1")
        if what == "seen":
            table.seen(each)
            removed_last.discard(each.node_key)
        elif what == "failed":
            table.failed(each.node_key)
        elif what == "removed":
            table.remove(each.node_key)
            removed_last.add(each.node_key)
        else:
            clock.now_s += number
        held = table.contacts()
        buckets: dict[int, list[Contact]] = {}
        for one in held:
            buckets.setdefault(bucket_of(table, one), []).append(one)
        assert len(table) == len(held) == len({one.node_key for one in held})
        assert all(len(bucket) <= bucket_size for bucket in buckets.values())
        assert not removed_last & {one.node_key for one in held}
        for bucket in buckets.values():  # of one subnet at most two
            subnets = [one.endpoints[0].rpartition(".")[0] for one in bucket]
            assert all(subnets.count(subnet) <= 2 for subnet in subnets)
    for target in (0, table.own_id, node_id(contact(3).node_key)):
        nearest = table.closest(target, 5)
        assert nearest == sorted(nearest, key=lambda one: one.id ^ target)
        assert len(nearest) <= 5


@given(st.sets(st.integers(0, 500), max_size=60), st.integers(0, 2**ID_BITS - 1))
def test_the_closest_are_those_of_a_sorted_list(numbers: set[int], target: int) -> None:
    table = RoutingTable(OWN, bucket_size=100)
    for number in numbers:
        table.seen(contact(number))
    everybody = sorted((contact(number) for number in numbers), key=lambda each: each.id ^ target)
    assert table.closest(target, 7) == everybody[:7]


def test_the_node_itself_and_who_does_not_listen_are_not_in_it() -> None:
    table = RoutingTable(OWN)
    table.seen(Contact(OWN, ("10.0.0.1:1",)))
    table.seen(Contact(contact(1).node_key, ()))
    assert len(table) == 0


def test_a_flood_of_new_nodes_displaces_nobody_who_answers() -> None:
    table = RoutingTable(OWN, bucket_size=3)
    old = far_ones(table, 3)
    for each in old:
        table.seen(each)
    for each in far_ones(table, 100)[3:]:
        table.seen(each)
    assert set(table.contacts()) == set(old)
    assert len(table._buckets[ID_BITS - 1].waiting) == MAX_WAITING


def test_a_ghost_makes_room_for_who_was_seen_last() -> None:
    clock = Clock()
    table = RoutingTable(OWN, bucket_size=2, clock=clock)
    first, second, third, fourth = far_ones(table, 4)
    table.seen(first)
    clock.now_s += FRESH_S + 1
    table.seen(second)
    assert table.to_ping() == []  # nobody waits
    table.seen(third)
    table.seen(fourth)
    assert table.to_ping() == [first]
    table.failed(first.node_key)
    assert set(table.contacts()) == {second, fourth}
    table.seen(second)
    clock.now_s += FRESH_S + 1
    assert table.to_ping() == [fourth]
    table.seen(fourth)
    assert set(table.contacts()) == {second, fourth}


def test_who_fails_once_is_not_named_to_others_and_is_forgotten_the_second_time() -> None:
    table = RoutingTable(OWN)
    table.seen(contact(1))
    table.seen(contact(2))
    table.failed(contact(1).node_key)
    assert table.closest(0, 9) == [contact(2)]
    assert table.to_ping() == [contact(1)]
    table.seen(contact(1))
    assert len(table.closest(0, 9)) == 2
    for _ in range(MAX_FAILURES):
        table.failed(contact(1).node_key)
    assert contact(1).node_key not in table


def test_a_node_that_was_cut_off_still_knows_whom_to_try() -> None:
    table = RoutingTable(OWN)
    for number in range(5):
        table.seen(contact(number))
        table.failed(contact(number).node_key)
    assert len(table.closest(0, 9)) == 5


def test_who_was_long_unseen_is_pinged() -> None:
    clock = Clock()
    table = RoutingTable(OWN, clock=clock)
    table.seen(contact(1))
    clock.now_s += GHOST_S + 1
    table.seen(contact(2))
    assert table.to_ping() == [contact(1)]


@pytest.mark.parametrize(
    ("host", "held"), [("8.8.8.{}", 2), ("[2a00:1450:4001::{}]", 2), ("rig{}.example", 20), ("192.168.0.{}", 20)]
)
def test_one_subnet_gets_few_places_and_a_private_network_is_not_one(host: str, held: int) -> None:
    table = RoutingTable(OWN)
    for number, each in enumerate(far_ones(table, 20), 1):
        table.seen(Contact(each.node_key, (f"{host.format(number)}:9000",)))
    assert len(table) == held


def test_one_subnet_gets_few_places_in_all_and_gives_them_back() -> None:
    table = RoutingTable(OWN)
    owned = [contact(number, "8.8.8.8") for number in range(2000)]
    for each in owned:
        table.seen(each)
    assert 2 < len(table) <= 10
    for each in owned:
        table.remove(each.node_key)
    table.seen(owned[5])
    assert table.contacts() == [owned[5]]


def test_buckets_in_which_nothing_was_looked_up_are_refreshed() -> None:
    clock = Clock()
    table, rng = RoutingTable(OWN, clock=clock), random.Random(1)
    assert table.to_refresh(10, rng) == []
    near = min(map(contact, range(50)), key=lambda each: each.id ^ table.own_id)
    table.seen(near)
    clock.now_s = 11
    targets = table.to_refresh(10, rng)
    buckets = [(table.own_id ^ target).bit_length() - 1 for target in targets]
    assert buckets == list(range(bucket_of(table, near), ID_BITS))
    for target in targets[1:]:
        table.looked_up(target)
    (left,) = table.to_refresh(10, rng)
    assert (table.own_id ^ left).bit_length() - 1 == bucket_of(table, near)
