"""Who the chain lets in, who it drops, and what happens when it cannot be reached."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from smartnodes_core.chain.base import Member
from smartnodes_core.chain.signing import new_key
from smartnodes_core.errors import AuthorityError, ChainUnreachableError
from smartnodes_core.identity import Identity, make_binding
from smartnodes_core.nodes.authority import ChainAuthority, OpenAuthority, WatchingAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.renewing import Renewer
from smartnodes_core.records import Binding, SignedBinding
from smartnodes_core.transport.base import Peer

WAIT_S = 10.0


class Chain:
    """A list of members that can become unreachable."""

    def __init__(self) -> None:
        self.listed: dict[bytes, Member] = {}
        self.reachable = True
        self.num_reads = 0

    def members(self) -> list[Member]:
        self.num_reads += 1
        if not self.reachable:
            raise ChainUnreachableError("nobody answers at the RPC endpoint")
        return list(self.listed.values())

    def register(self, binding: Binding, **changes: Any) -> None:
        member = Member(
            account=binding.account,
            role=binding.role,
            key_hash=hashlib.sha256(binding.node_key).digest(),
            reputation=100,
            stake_wei=1,
            live=True,
            index=0,
            tip=b"",
            exit_at_s=0,
            verified=True,
        )
        self.listed[binding.node_key] = dataclasses.replace(member, **changes)


@pytest.fixture
def chain() -> Chain:
    return Chain()


@pytest.fixture
def watched(chain: Chain) -> Iterator[ChainAuthority]:
    authority = ChainAuthority(chain.members, poll_interval_s=0.05, min_refresh_interval_s=0.0)
    yield authority
    authority.stop()


def make_peer(party: Any, role: str = "worker", **changes: Any) -> Peer:
    identity = Identity.create()
    binding = Binding.decode(party.bind(identity, role, **changes).binding)
    return Peer(node_key=identity.node_key, binding=binding, role=binding.role, endpoint="a:1")


def binding_of(peer: Peer) -> Binding:
    assert peer.binding is not None
    return peer.binding


def test_a_registered_peer_is_admitted(memory_party: Any, chain: Chain, watched: ChainAuthority) -> None:
    peer = make_peer(memory_party)
    chain.register(binding_of(peer))
    watched.admit(peer)
    assert isinstance(watched, WatchingAuthority)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"reputation": 0}, "blacklisted"),
        ({"role": "validator"}, "registered as validator, not as worker"),
        ({"account": b"\x01" * 20}, "its binding does not name"),
        ({"live": False, "stake_wei": 0, "exit_at_s": 5}, "it has left"),
        ({"live": False}, "stake on chain is below"),
    ],
)
def test_who_is_not_in_good_standing_is_refused(
    memory_party: Any, chain: Chain, watched: ChainAuthority, changes: dict[str, Any], complaint: str
) -> None:
    peer = make_peer(memory_party)
    chain.register(binding_of(peer), **changes)
    with pytest.raises(AuthorityError, match=complaint):
        watched.admit(peer)


def test_those_on_the_way_in_or_out_are_admitted(memory_party: Any, chain: Chain, watched: ChainAuthority) -> None:
    joining, leaving = make_peer(memory_party, "validator"), make_peer(memory_party)
    chain.register(binding_of(joining), live=False, verified=False)
    chain.register(binding_of(leaving), live=False, exit_at_s=5)
    watched.admit(joining)
    watched.admit(leaving)


def test_a_member_whose_stake_was_slashed_does_not_come_in_again_with_another_key(
    memory_party: Any, chain: Chain
) -> None:
    authority = ChainAuthority(chain.members, min_refresh_interval_s=0.0, stake_wei=lambda role: 5)
    peer = make_peer(memory_party)
    chain.register(binding_of(peer), live=False, verified=False, stake_wei=5)
    authority.admit(peer)
    chain.register(binding_of(peer), live=False, verified=False, stake_wei=4)
    authority._read_chain()
    with pytest.raises(AuthorityError, match="stake on chain is below"):
        authority.admit(peer)


def test_strangers_and_expired_bindings_are_refused(memory_party: Any, chain: Chain, watched: ChainAuthority) -> None:
    with pytest.raises(AuthorityError, match="not registered on chain"):
        watched.admit(make_peer(memory_party))
    stale = make_peer(memory_party, expires_at_s=1)
    chain.register(binding_of(stale))
    with pytest.raises(AuthorityError, match="expired"):
        watched.admit(stale)


def test_unknown_peers_make_the_chain_be_read_again_but_not_too_often(memory_party: Any, chain: Chain) -> None:
    authority = ChainAuthority(chain.members, min_refresh_interval_s=60.0)
    for _ in range(5):
        with pytest.raises(AuthorityError):
            authority.admit(make_peer(memory_party))
    assert chain.num_reads == 1


def test_without_the_chain_known_peers_stay_and_new_ones_wait(
    memory_party: Any, chain: Chain, watched: ChainAuthority
) -> None:
    known, new = make_peer(memory_party), make_peer(memory_party)
    chain.register(binding_of(known))
    watched.admit(known)
    chain.reachable = False
    chain.register(binding_of(new))
    with pytest.raises(AuthorityError, match="nobody answers"):
        watched.admit(new)
    watched.admit(known)
    chain.reachable = True
    watched.admit(new)


def test_a_live_peer_is_dropped_when_the_chain_blacklists_it(party: Any, chain: Chain, watched: ChainAuthority) -> None:
    a: Node = party.node("validator", watched)
    b: Node = party.node("worker")
    assert b.signed_binding is not None
    binding = Binding.decode(b.signed_binding.binding)
    chain.register(binding)
    b.connect(a.endpoint)
    dropped, noticed = threading.Event(), threading.Event()
    a.on_peer_lost(lambda key, reason: dropped.set())
    b.on_peer_lost(lambda key, reason: noticed.set())  # until then b holds its end for good, and does not dial again
    chain.register(binding, reputation=0)
    assert dropped.wait(WAIT_S)
    assert noticed.wait(WAIT_S)
    with pytest.raises(AuthorityError, match="blacklisted"):
        b.connect(a.endpoint)


def test_a_blacklisted_peer_is_gone_with_the_next_look_at_the_chain(party: Any, chain: Chain) -> None:
    """With its bulk connection; looks happen only when the test says so."""
    authority = ChainAuthority(chain.members, poll_interval_s=3600, min_refresh_interval_s=3600)
    a: Node = party.node("validator", authority)
    b: Node = party.node("worker")
    assert b.signed_binding is not None
    binding = Binding.decode(b.signed_binding.binding)
    chain.register(binding)
    authority._read_chain()
    got = threading.Event()
    a.on_stream("t", lambda peer, header, size: memoryview(bytearray(size)), lambda *_: got.set())
    b.connect(a.endpoint)
    b.stream(a.node_key, "t", {}, [b"tensor"])
    assert got.wait(WAIT_S)
    chain.register(binding, reputation=0)
    a._check_live_peers()
    assert len(a.peers()) == 1  # the chain has not been looked at
    connections = [*a._links.all(), *a._bulk.all()]
    assert len(connections) == 2
    authority._read_chain()
    a._check_live_peers()
    for connection in connections:
        assert connection.join(WAIT_S)
    assert a.peers() == []


def test_a_key_that_was_replaced_on_chain_is_revoked_and_the_new_one_admitted(party: Any, chain: Chain) -> None:
    """A stolen node key: its owner gives the account another."""
    authority = ChainAuthority(chain.members, poll_interval_s=0.05, min_refresh_interval_s=0.0)
    a: Node = party.node("validator", authority)
    account, stolen, fresh = new_key(), Identity.create(), Identity.create()
    place = ("worker", party.chain_id, party.registry, party.network_id, int(time.time()) + 3600)
    nodes = []
    for identity in (stolen, fresh):
        binding = make_binding(identity, account, *place)
        nodes.append(Node(identity, binding, party.transport(identity, binding), OpenAuthority(), endpoint=None))
    thief, owner = nodes
    chain.register(Binding.decode(thief.signed_binding.binding))
    thief.connect(a.endpoint)
    lost = threading.Event()
    thief.on_peer_lost(lambda key, reason: lost.set())
    chain.listed.clear()
    chain.register(Binding.decode(owner.signed_binding.binding))
    assert lost.wait(WAIT_S)
    with pytest.raises(AuthorityError, match=r"revoked node key: account 0x.* is registered with another"):
        thief.connect(a.endpoint)
    assert owner.connect(a.endpoint).node_key == a.node_key
    thief.stop()
    owner.stop()


def test_a_node_whose_binding_expires_is_dropped_and_let_in_again_with_a_new_one(
    party: Any, chain: Chain, watched: ChainAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    a: Node = party.node("validator", watched)
    account, identity = new_key(), Identity.create()
    place = ("worker", party.chain_id, party.registry, party.network_id)
    binding = make_binding(identity, account, *place, int(time.time()) + 1000)
    b = Node(identity, binding, party.transport(identity, binding), OpenAuthority(), endpoint=None)
    chain.register(Binding.decode(binding.binding))
    b.connect(a.endpoint)
    lost = threading.Event()
    b.on_peer_lost(lambda key, reason: lost.set())
    later = types.SimpleNamespace(time=lambda: time.time() + 2000, monotonic=time.monotonic)
    monkeypatch.setattr("smartnodes_core.nodes.authority.time", later)
    assert lost.wait(WAIT_S)
    with pytest.raises(AuthorityError, match="has expired"):
        b.connect(a.endpoint)
    renewed = threading.Event()

    def bind() -> SignedBinding:
        renewed.set()
        return make_binding(identity, account, *place, int(time.time()) + 5000)

    renewer = Renewer(b, bind, interval_s=0.01)
    renewer.start()
    assert renewed.wait(WAIT_S)
    renewer.stop()
    assert b.connect(a.endpoint).node_key == a.node_key
    b.stop()


def test_an_unregistered_peer_never_gets_to_call(party: Any, watched: ChainAuthority) -> None:
    a: Node = party.node("validator", watched)
    b: Node = party.node("worker")
    with pytest.raises(AuthorityError, match=r"refused us: .*not registered"):
        b.connect(a.endpoint)
    assert a.peers() == []
