"""Nodes of a DHT among each other, honest ones and attackers; over the in-memory twin, and over real connections."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from smartnodes_core.dht.asking import NodeCalls
from smartnodes_core.dht.contacts import Contact, node_id
from smartnodes_core.dht.node import NUM_REPLICAS, DhtNode
from smartnodes_core.dht.routing import BUCKET_SIZE
from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    ProtocolError,
    RecordError,
    SignatureError,
    SmartnodesError,
    Unavailable,
)
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import Announcement, Signed
from smartnodes_core.rpc.pool import WorkerPool

JOB = b"j" * 32


@pytest.fixture
def swarm(make_swarm: Callable[..., Any]) -> Any:
    return make_swarm(40)


def store_at(attacker: Any, victim: Any, data: bytes, **params: Any) -> Any:
    """A call of `dht_store` as an attacker words it."""
    calls = attacker.swarm.net.calls_of(attacker.key, attacker.role)
    params = {"endpoints": [], **params}
    return calls.call(victim.contact, "dht_store", params, [data], timeout_s=1, max_body_bytes=0).params["fresh"]


def find_at(attacker: Any, victim: Any, **params: Any) -> Any:
    calls = attacker.swarm.net.calls_of(attacker.key, attacker.role)
    return calls.call(victim.contact, "dht_find", params, timeout_s=1, max_body_bytes=1 << 20)


# -- honest nodes -----------------------------------------------------------------------------------------------------


def test_what_one_node_puts_every_other_gets(swarm: Any) -> None:
    owner = swarm.pick()
    assert owner.dht.put(owner.announcement()) == NUM_REPLICAS + 1  # and itself
    for member in swarm.members:
        found = member.dht.find_node(owner.key)
        assert found is not None
        assert found.endpoints == list(owner.contact.endpoints)
        assert member.dht.num_hops <= math.ceil(math.log2(40))


def test_a_record_lies_at_the_nodes_that_are_nearest_to_it(swarm: Any) -> None:
    owner = swarm.pick()
    owner.dht.put(owner.announcement())
    key = node_id(owner.key)
    nearest = sorted(swarm.members, key=lambda member: member.dht.own_id ^ key)[: NUM_REPLICAS + 1]
    holders = [member for member in swarm.members if member.dht.values.entries(key)]
    assert set(holders) == set(nearest)


def test_who_keeps_a_job_is_found_by_the_job(swarm: Any) -> None:
    keepers = [swarm.add("validator") for _ in range(3)]
    for keeper in keepers:
        keeper.dht.put(keeper.notice(JOB, plan_version=2))
    found = swarm.pick().dht.find_job(JOB)
    assert sorted(notice.keeper for notice in found) == sorted(keeper.key for keeper in keepers)
    assert {notice.plan_version for notice in found} == {2}
    assert swarm.pick().dht.find_job(b"k" * 32) == []
    assert swarm.pick().dht.find_node(b"k" * 32) is None


def test_the_newest_of_an_owner_is_found_though_some_keep_an_older_one(swarm: Any) -> None:
    owner = swarm.pick()
    owner.dht.put(owner.announcement(sequence=1))
    newest = owner.announcement(sequence=2)
    holders = [member for member in swarm.members if member.dht.values.entries(node_id(owner.key))]
    for member in holders[::2]:
        member.dht.values.store(member.dht.values.entry_of(newest))
    found = [member.dht.find_node(owner.key).sequence for member in swarm.members]
    assert found.count(2) > 0.9 * len(found)


def test_a_node_that_only_asks_is_in_nobodys_table_and_keeps_nothing(swarm: Any) -> None:
    user = swarm.add("user", listens=False)
    owner = swarm.pick()
    owner.dht.put(owner.announcement())
    assert user.dht.find_node(owner.key) is not None
    assert not any(user.key in member.dht.table for member in swarm.members)
    user.dht.put(user.announcement())
    assert len(user.dht.values) == 0
    assert swarm.pick().dht.find_node(user.key) is not None


def test_everything_is_found_in_few_hops_also_after_three_tenths_of_the_nodes_vanished_at_once(
    make_swarm: Callable[..., Any], pytestconfig: pytest.Config
) -> None:
    count: int = pytestconfig.getoption("--dht-nodes")
    swarm = make_swarm(count)
    owners = list(swarm.members)
    for owner in owners:
        owner.dht.put(owner.announcement())
    for _ in range(2):
        found = 0
        for owner in owners:
            asker = swarm.pick()
            found += asker.dht.find_node(owner.key) is not None
            assert asker.dht.num_hops <= math.ceil(math.log2(count))
        assert found >= (1.0 if len(swarm.members) == count else 0.999) * count
        swarm.vanish(swarm.rng.sample(swarm.members, count * 3 // 10))


@pytest.mark.parametrize("seed", range(3))
def test_lookups_go_on_though_calls_are_lost(make_swarm: Callable[..., Any], seed: int) -> None:
    swarm = make_swarm(60, seed, lost=0.2)
    owners = list(swarm.members)
    for owner in owners:
        owner.dht.put(owner.announcement())
    found = sum(swarm.pick().dht.find_node(owner.key) is not None for owner in owners)
    assert found >= 0.98 * len(owners)


def test_a_node_alone_keeps_what_it_puts(make_swarm: Callable[..., Any]) -> None:
    swarm = make_swarm(1)
    (alone,) = swarm.members
    assert alone.dht.put(alone.announcement()) == 1
    assert alone.dht.find_node(alone.key) is not None
    user = swarm.add("user", listens=False)
    swarm.vanish([alone])
    with pytest.raises(Unavailable, match="is the network reached"):
        user.dht.put(user.announcement())


# -- attackers --------------------------------------------------------------------------------------------------------


def test_a_record_of_anothers_key_is_refused(swarm: Any) -> None:
    attacker, victim, holder = swarm.members[:3]
    forged = attacker.announcement(node_key=victim.key)
    with pytest.raises(SignatureError, match="of another"):
        store_at(attacker, holder, forged.encode())
    with pytest.raises(SignatureError):
        attacker.dht.put(forged)
    stolen = Signed(record=victim.announcement().record, signer=victim.key, signature=bytes(64))
    with pytest.raises(SignatureError, match="does not verify"):
        store_at(attacker, holder, stolen.encode())
    assert len(holder.dht.values) == 0


def test_an_older_sequence_number_does_not_replace_a_newer(swarm: Any) -> None:
    owner, attacker, holder = swarm.members[:3]
    assert store_at(owner, holder, owner.announcement(sequence=2).encode())
    assert not store_at(attacker, holder, owner.announcement(sequence=1).encode())
    (kept,) = holder.dht.values.entries(node_id(owner.key))
    assert kept.record.sequence == 2


def test_a_record_of_who_is_not_registered_or_in_another_role_is_refused(swarm: Any) -> None:
    attacker, stranger, holder = swarm.members[:3]
    del swarm.roles[stranger.key]
    with pytest.raises(AuthorityError, match="is not registered"):
        store_at(attacker, holder, stranger.announcement().encode())
    with pytest.raises(AuthorityError, match="is a worker"):
        store_at(attacker, holder, attacker.announcement(role="validator").encode())
    with pytest.raises(AuthorityError, match="of a validator, and who signed it is a worker"):
        store_at(attacker, holder, attacker.notice(JOB).encode())


def test_a_flood_of_records_ends_at_the_owners_share(swarm: Any) -> None:
    attacker = swarm.add("validator")
    holder, honest = swarm.members[:2]
    holder.dht.values._max_per_owner = 50
    for number in range(50):
        assert store_at(attacker, holder, attacker.notice(bytes([number] * 32)).encode())
    with pytest.raises(BusyError, match="50 of this owner"):
        store_at(attacker, holder, attacker.notice(b"f" * 32).encode())
    assert store_at(honest, holder, honest.announcement().encode())


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"target": b"short", "endpoints": []},
        {"target": 1 << 60, "endpoints": []},
        {"target": bytes(32)},
        {"target": bytes(32), "endpoints": "10.0.0.1:1"},
        {"target": bytes(32), "endpoints": ["10.0.0.1:1"] * 5},
        {"target": bytes(32), "endpoints": ["nowhere"]},
        {"target": bytes(32), "endpoints": ["h" * 300 + ":1"]},
        {"target": bytes(32), "endpoints": [7]},
        {"target": bytes(32), "endpoints": [], "values": 1 << 40},
    ],
)
def test_a_malformed_question_is_a_protocol_error(swarm: Any, params: dict[str, Any]) -> None:
    attacker, victim = swarm.members[:2]
    with pytest.raises(ProtocolError):
        find_at(attacker, victim, **params)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91" * 5000, b"x" * 16000])
def test_garbage_is_not_kept(swarm: Any, data: bytes) -> None:
    attacker, holder = swarm.members[:2]
    with pytest.raises(RecordError):
        store_at(attacker, holder, data)


def test_an_oversize_record_is_refused_by_its_header(swarm: Any) -> None:
    attacker, holder = swarm.members[:2]
    with pytest.raises(ProtocolError, match="a body of at most"):
        store_at(attacker, holder, bytes(1 << 20))


class Liar:
    """Answers `dht_find` with whatever a test wants."""

    def __init__(self, contacts: Any, body: bytes = msgspec.msgpack.encode([]), endpoints: Any = ()) -> None:
        self.contacts, self.body = contacts, body
        self.endpoints = endpoints or ["10.0.0.1:1"]
        self.num_asked = 0

    def rpc_dht_find(self, caller: Any, params: dict[str, Any], body: memoryview) -> Any:
        self.num_asked += 1
        reply = {"contacts": self.contacts, "endpoints": self.endpoints}
        return reply, [self.body] if params["values"] else []

    def rpc_dht_ping(self, caller: Any, params: dict[str, Any], body: memoryview) -> Any:
        return {"endpoints": self.endpoints}


KEY = bytes(32)


@pytest.mark.parametrize(
    "contacts",
    [
        None,
        "contacts",
        [[KEY, ["10.0.0.1:1"]]] * (BUCKET_SIZE + 1),
        [[b"short", ["10.0.0.1:1"]]],
        [[KEY, []]],
        [[KEY, ["nowhere"]]],
        [[KEY, ["10.0.0.1:1"], "more"]],
        [[KEY]],
        [KEY],
        {},
    ],
)
def test_a_peer_that_answers_with_garbage_is_forgotten_and_the_lookup_goes_on(swarm: Any, contacts: Any) -> None:
    owner, liar, asker = swarm.members[:3]
    owner.dht.put(owner.announcement())
    swarm.net.serve(liar.key, Liar(contacts), "worker")
    asker.dht.table.seen(liar.contact)
    assert liar.contact not in asker.dht.lookup(liar.dht.own_id)
    assert liar.key not in asker.dht.table
    assert asker.dht.find_node(owner.key) is not None


def test_values_that_are_forged_or_lie_elsewhere_are_not_found(swarm: Any) -> None:
    owner, liar, asker, other = swarm.members[:4]
    forged = liar.announcement(node_key=owner.key).encode()
    unsigned = Signed(record=owner.announcement().record, signer=owner.key, signature=bytes(64)).encode()
    elsewhere = other.announcement().encode()
    expired = owner.announcement(expires_at_s=1).encode()
    for page in (
        [forged],
        [unsigned],
        [elsewhere],
        [expired],
        [b"garbage"],
        [owner.announcement().encode()] * 40,
    ):
        body = msgspec.msgpack.encode(page)
        for data in (body, body[:-1]):
            swarm.net.serve(liar.key, Liar([], data), "worker")
            asker.dht.table.seen(liar.contact)
            assert asker.dht.find_node(owner.key) is None
            assert liar.key not in asker.dht.table


def test_contacts_that_do_not_exist_cost_a_lookup_little(swarm: Any) -> None:
    """Wrong ids: an id is computed from the key, so that a liar can only name keys, and nobody answers for these."""
    owner, liar, asker = swarm.members[:3]
    owner.dht.put(owner.announcement())
    key = node_id(owner.key)
    invented = sorted((swarm.rng.randbytes(32) for _ in range(5000)), key=lambda each: node_id(each) ^ key)
    swarm.net.serve(liar.key, Liar([[each, ["10.9.9.9:9"]] for each in invented[:BUCKET_SIZE]]), "worker")
    before = swarm.net.num_calls
    assert asker.dht.find_node(owner.key) is not None
    assert swarm.net.num_calls - before < 60
    assert not any(each in asker.dht.table for each in invented)


def test_a_third_of_liars_that_name_each_other_hide_nothing(make_swarm: Callable[..., Any]) -> None:
    swarm = make_swarm(90)
    owners = list(swarm.members)
    for owner in owners:
        owner.dht.put(owner.announcement())
    liars = swarm.rng.sample(swarm.members, 30)
    for liar in liars:
        others = swarm.rng.sample(liars, BUCKET_SIZE)
        swarm.net.serve(liar.key, Liar([each.contact.encode() for each in others]), "worker")
    honest = [member for member in swarm.members if member not in liars]
    found = sum(swarm.rng.choice(honest).dht.find_node(owner.key) is not None for owner in owners)
    assert found >= 0.97 * len(owners)


@pytest.mark.parametrize("endpoints", [7, ["nowhere"], ["10.0.0.1:1"] * 5])
def test_a_peer_that_says_nonsense_of_itself_is_forgotten(swarm: Any, endpoints: Any) -> None:
    asker, liar = swarm.members[:2]
    swarm.net.serve(liar.key, Liar([], endpoints=endpoints), "worker")
    asker.dht.table.seen(liar.contact)
    assert not asker.dht.ping(liar.contact)
    assert liar.key not in asker.dht.table


def test_where_a_node_is_reached_is_what_it_says_itself(swarm: Any) -> None:
    asker, victim = swarm.members[:2]
    asker.dht.table.remove(victim.key)
    assert asker.dht.ping(Contact(victim.key, ("10.6.6.6:6",)))
    assert asker.dht.table.get(victim.key).endpoints == victim.contact.endpoints


def test_a_record_that_ended_a_moment_ago_is_not_found_and_nobody_is_blamed(swarm: Any) -> None:
    owner, holder, asker = swarm.members[:3]
    late = owner.announcement(expires_at_s=int(swarm.clock.unix()) - 5).encode()
    liar = Liar([], msgspec.msgpack.encode([late]), list(holder.contact.endpoints))
    swarm.net.serve(holder.key, liar, "worker")
    asker.dht.table.seen(holder.contact)
    assert asker.dht.find_node(owner.key) is None
    assert liar.num_asked
    assert holder.key in asker.dht.table


def test_nobody_gets_into_a_table_by_hearsay(swarm: Any) -> None:
    asker, liar = swarm.members[:2]
    swarm.net.serve(liar.key, Liar([[KEY, ["10.0.0.1:1"]]]), "worker")
    asker.dht.lookup(node_id(KEY))
    assert KEY not in asker.dht.table


# -- over connections -------------------------------------------------------------------------------------------------


class Connected:
    """A DHT over the nodes of a party."""

    def __init__(self, party: Any, count: int) -> None:
        self.pool = WorkerPool("dht", 8)
        self.nodes: list[Node] = [party.node("validator") for _ in range(count)]
        self.contacts = [Contact(node.node_key, (node.endpoint,)) for node in self.nodes]
        self.dhts = [self.make(node, lambda node=node: [node.endpoint]) for node in self.nodes]

    def make(self, node: Node, endpoints: Callable[[], list[str]]) -> DhtNode:
        dht = DhtNode(
            node.node_key,
            7,
            NodeCalls(node),
            self.pool.run,
            endpoints=endpoints,
            role_of=lambda key: "validator",
        )
        node.serve(dht)
        return dht

    def announcement(self, number: int, sequence: int = 1) -> Any:
        node = self.nodes[number]
        record = Announcement(
            node_key=node.node_key,
            role="validator",
            network_id=7,
            sequence=sequence,
            expires_at_s=int(time.time()) + 100,
            endpoints=[node.endpoint],
            offers={},
        )
        return node.identity.sign(record)


def test_over_authenticated_connections_records_are_put_and_found(party: Any) -> None:
    connected = Connected(party, 6)
    for number in range(1, 6):
        connected.dhts[number].join(connected.contacts[:1])
    assert connected.dhts[2].put(connected.announcement(2)) == 6
    for dht in connected.dhts:
        found = dht.find_node(connected.nodes[2].node_key)
        assert found is not None
        assert found.endpoints == [connected.nodes[2].endpoint]
    connected.nodes[0].stop()
    connected.nodes[3].stop()
    assert connected.dhts[5].find_node(connected.nodes[2].node_key) is not None
    assert connected.dhts[5].put(connected.announcement(5)) == 4
    connected.pool.stop(1.0)


def test_a_peer_that_the_chain_does_not_know_gets_into_no_table(party: Any) -> None:
    class Members:
        def __init__(self) -> None:
            self.keys: set[bytes] = set()

        def admit(self, peer: Any) -> None:
            if peer.node_key not in self.keys:
                raise AuthorityError(f"{peer} is not registered on chain")

    members = Members()
    inside: Node = party.node("validator", authority=members)
    outsider: Node = party.node("validator")
    connected = Connected(party, 0)
    dht = connected.make(inside, lambda: [inside.endpoint])
    other = connected.make(outsider, lambda: [outsider.endpoint])
    assert not other.ping(Contact(inside.node_key, (inside.endpoint,)))
    assert len(dht.table) == len(other.table) == 0
    members.keys.add(outsider.node_key)
    assert other.ping(Contact(inside.node_key, (inside.endpoint,)))
    assert outsider.node_key in dht.table
    connected.pool.stop(1.0)


def test_another_identity_than_the_one_dialled_is_not_taken_in(party: Any) -> None:
    connected = Connected(party, 2)
    wrong = Contact(connected.nodes[0].node_key, (connected.nodes[1].endpoint,))
    asker = party.node("validator")
    dht = connected.make(asker, lambda: [asker.endpoint])
    dht.table.seen(wrong)
    assert not dht.ping(wrong)
    assert wrong.node_key not in dht.table
    assert not asker._addresses.knows(wrong.node_key)
    connected.pool.stop(1.0)


def test_many_lookups_at_once_find_what_is_there(party: Any) -> None:
    connected = Connected(party, 4)
    for dht in connected.dhts[1:]:
        dht.join(connected.contacts[:1])
    for number in range(4):
        connected.dhts[number].put(connected.announcement(number))
    found: list[bool] = []

    def search(dht: DhtNode) -> None:
        for node in connected.nodes:
            try:
                found.append(dht.find_node(node.node_key) is not None)
            except SmartnodesError:
                found.append(False)

    threads = [threading.Thread(target=search, args=(dht,)) for dht in connected.dhts for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [True] * 48
    connected.pool.stop(1.0)
