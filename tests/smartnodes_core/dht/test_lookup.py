"""Lookups as a state machine, in networks that hypothesis draws: some nodes dead, slow or lying."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.dht.contacts import Contact
from smartnodes_core.dht.lookup import MAX_ASKED, MAX_HEARD, NUM_PARALLEL, Lookup
from smartnodes_core.records import digest_of

OWN = digest_of("test", b"own")
TARGET = int.from_bytes(digest_of("test", b"target"))
WIDTH = 4


def contact(name: object) -> Contact:
    return Contact(digest_of("test", repr(name).encode()), ("10.0.0.1:1",))


def nearest(contacts: list[Contact], count: int) -> list[Contact]:
    return sorted(contacts, key=lambda each: each.id ^ TARGET)[:count]


def everybody_of(count: int) -> list[Contact]:
    return nearest([contact(number) for number in range(count)], count)


class World:
    """Nodes that each know their neighbours and some others; `dead` ones never answer."""

    def __init__(self, count: int, rng: random.Random, dead: float = 0.0) -> None:
        self.everybody = everybody_of(count)
        self.dead = set(rng.sample(self.everybody, int(count * dead)))
        self.alive = [each for each in self.everybody if each not in self.dead]
        self.rng = rng
        self.known = {
            each: {*rng.sample(self.everybody, min(count, 8)), *self._around(number)}
            for number, each in enumerate(self.everybody)
        }

    def _around(self, number: int) -> list[Contact]:
        return self.everybody[max(0, number - 10) : number + 10]

    def told_by(self, each: Contact) -> list[Contact]:
        return nearest(list(self.known[each] - {each}), 8)

    def run(self, lookup: Lookup, holders: set[Contact] | None = None) -> list[Contact]:
        """Answers in any order; whoever was asked, in order."""
        asked: list[Contact] = []
        waiting: list[Contact] = []
        while not lookup.finished:
            fresh = lookup.next()
            asked += fresh
            waiting += fresh
            assert waiting, f"{lookup} neither asks nor ends"
            each = waiting.pop(self.rng.randrange(len(waiting)))
            if self.rng.random() < 0.2:
                lookup.overdue(each)
            if each in self.dead:
                lookup.failed(each)
            else:
                lookup.answered(each, self.told_by(each), has_value=holders is not None and each in holders)
        return asked


@given(st.integers(1, 120), st.integers(0, 2**32), st.integers(1, 4))
def test_it_ends_asks_nobody_twice_and_finds_the_nearest(count: int, seed: int, num_paths: int) -> None:
    world = World(count, random.Random(seed))
    start = world.rng.sample(world.everybody, min(count, 10))
    lookup = Lookup(TARGET, OWN, start, width=WIDTH, num_paths=num_paths)
    asked = world.run(lookup)
    assert len(asked) == len(set(asked)) == lookup.num_asked <= MAX_ASKED
    assert lookup.closest(1) == world.everybody[:1]
    assert set(lookup.closest(WIDTH)) <= set(asked)
    assert lookup.next() == []


@given(st.integers(20, 120), st.integers(0, 2**32))
def test_it_finds_the_nearest_that_live_though_a_third_is_dead(count: int, seed: int) -> None:
    world = World(count, random.Random(seed), dead=0.3)
    start = world.rng.sample(world.alive, 6)
    lookup = Lookup(TARGET, OWN, start, width=WIDTH)
    world.run(lookup)
    found = lookup.closest(WIDTH)
    assert found[0] == world.alive[0]
    assert not world.dead & set(found)


@given(st.integers(20, 120), st.integers(0, 2**32))
def test_a_value_that_the_nearest_hold_is_found(count: int, seed: int) -> None:
    world = World(count, random.Random(seed), dead=0.3)
    lookup = Lookup(TARGET, OWN, world.rng.sample(world.alive, 6), width=WIDTH, for_value=True)
    world.run(lookup, holders=set(world.everybody[:8]))
    assert lookup.num_hops is not None


def test_so_many_are_asked_at_once_and_an_overdue_one_lets_another_be_asked() -> None:
    start = everybody_of(10)
    lookup = Lookup(TARGET, OWN, start, width=8)
    first = lookup.next()
    assert len(first) == NUM_PARALLEL
    assert lookup.next() == []
    lookup.overdue(first[0])
    lookup.overdue(first[0])
    (second,) = lookup.next()
    assert second not in first
    lookup.answered(first[0], [])  # late, and heard all the same
    assert first[0] in lookup.closest(9)
    assert "overdue" not in repr(lookup)


def test_only_who_was_asked_may_answer_and_only_once() -> None:
    lookup = Lookup(TARGET, OWN, everybody_of(5), width=2)
    with pytest.raises(ValueError, match="not asked"):
        lookup.answered(contact("stranger"), [])
    (asked, *_) = lookup.next()
    lookup.answered(asked, [])
    with pytest.raises(ValueError, match="is answered"):
        lookup.failed(asked)


def test_a_lookup_from_an_empty_table_is_over() -> None:
    lookup = Lookup(TARGET, OWN, [], width=3)
    assert lookup.finished
    assert lookup.next() == []
    assert lookup.closest(3) == []


def test_the_searcher_is_never_asked() -> None:
    own = Contact(OWN, ("10.0.0.1:1",))
    lookup = Lookup(TARGET, OWN, [own, contact(1)], width=3)
    assert lookup.next() == [contact(1)]
    lookup.answered(contact(1), [own])
    assert lookup.finished


def test_one_liar_with_any_number_of_accomplices_does_not_hide_the_honest() -> None:
    """The liar names nearer and nearer nodes, all its own: they fill the lists of its own path only."""
    world = World(100, random.Random(4))
    accomplices = nearest([contact(("evil", number)) for number in range(4000)], 60)
    liar = contact("liar")
    start = [liar, *world.rng.sample(world.everybody[50:], 5)]
    lookup = Lookup(TARGET, OWN, start, width=WIDTH, for_value=False)
    while not lookup.finished:
        for each in lookup.next():
            evil = each == liar or each in accomplices
            lookup.answered(each, world.rng.sample(accomplices, 20) if evil else world.told_by(each))
    found = lookup.closest(WIDTH)
    assert world.everybody[0] in found
    assert len(set(found) & set(accomplices)) <= WIDTH // 2

    value = Lookup(TARGET, OWN, start, width=WIDTH, for_value=True)
    while not value.finished:
        for each in value.next():
            evil = each == liar or each in accomplices
            told = world.rng.sample(accomplices, 20) if evil else world.told_by(each)
            value.answered(each, told, has_value=each in world.everybody[:8])
    assert value.num_hops is not None


def test_liars_that_name_ever_more_nodes_end_it_all_the_same() -> None:
    lookup = Lookup(TARGET, OWN, [contact(0)], width=20)
    names = iter(range(1, 1 << 20))
    distances = {contact(0).id ^ TARGET}
    while not lookup.finished:
        for each in lookup.next():
            told = [contact(next(names)) for _ in range(20)]
            distances |= {one.id ^ TARGET for one in told}
            lookup.answered(each, told)
    assert lookup.num_asked <= MAX_ASKED
    assert all(len(path.heard) <= MAX_HEARD for path in lookup._paths)
