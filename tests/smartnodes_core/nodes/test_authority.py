"""Who the chain lets in, who it drops, and what happens when it cannot be reached."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from smartnodes_core.chain.base import Member
from smartnodes_core.errors import AuthorityError, ChainUnreachableError
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.authority import ChainAuthority, WatchingAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import Binding
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


def test_an_unregistered_peer_never_gets_to_call(party: Any, watched: ChainAuthority) -> None:
    a: Node = party.node("validator", watched)
    b: Node = party.node("worker")
    with pytest.raises(AuthorityError, match=r"refused us: .*not registered"):
        b.connect(a.endpoint)
    assert a.peers() == []
