"""Large data in pieces: counted, hashed, gone on with where it broke off, from whoever has it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from smartnodes_core.errors import AuthorityError, ConnectionLostError, DeadlineError, ProtocolError, RecordError
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.transfer import PIECE_BYTES, Fetch, Manifest, Shelf, manifest_of
from smartnodes_core.rpc import Result
from smartnodes_core.transport.base import Peer

WAIT_S = 20.0
DATA = memoryview(random.Random(1).randbytes(5 * PIECE_BYTES + 7))


class Moody(Shelf):
    """A shelf that does something else when it gives out a piece for the n-th time."""

    def __init__(self, moods: dict[int, Any]) -> None:
        super().__init__(lambda peer, digest: None)
        self.moods, self.num_pieces = moods, 0

    def rpc_piece(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        self.num_pieces += 1
        mood = self.moods.get(self.num_pieces)
        return mood(params) if mood is not None else super().rpc_piece(caller, params, body)


def node_with(party: Any, shelf: Shelf, fetcher: Node) -> tuple[Node, bytes]:
    node: Node = party.node("worker")
    node.serve(shelf)
    fetcher.add_address(node.node_key, node.endpoint)
    return node, shelf.put(DATA)


@pytest.fixture
def near(party: Any) -> Node:
    return party.node("user")  # type: ignore[no-any-return]


def test_data_arrives_whole_under_its_name(party: Any, near: Node) -> None:
    far, digest = node_with(party, Moody({}), near)
    fetch = Fetch(near, digest, len(DATA))
    assert fetch.run([far.node_key], WAIT_S) == DATA
    assert (fetch.num_arrived, fetch.num_refetched) == (6, 0)
    assert "6 pieces, 0 missing" in repr(fetch)


@pytest.mark.parametrize("num_bytes", [0, 1, PIECE_BYTES, PIECE_BYTES + 1])
def test_any_size_is_a_transfer(party: Any, near: Node, num_bytes: int) -> None:
    far, _ = node_with(party, shelf := Moody({}), near)
    digest = shelf.put(DATA[:num_bytes])
    assert Fetch(near, digest, num_bytes).run([far.node_key], WAIT_S) == DATA[:num_bytes]


def test_a_lost_connection_costs_what_was_under_way_and_no_more(party: Any, near: Node) -> None:
    def hang_up(params: dict[str, Any]) -> Result:
        far.drop(near.node_key, "a test")
        raise ConnectionLostError("gone")

    shelf = Moody({4: hang_up})
    far, digest = node_with(party, shelf, near)
    fetch = Fetch(near, digest, len(DATA))
    assert fetch.run([far.node_key], WAIT_S) == DATA
    assert shelf.num_pieces <= 6 + fetch.num_refetched
    assert fetch.num_refetched <= 6


def test_it_goes_on_in_a_later_run_with_what_is_missing(party: Any, near: Node) -> None:
    def refuse(params: dict[str, Any]) -> Result:
        raise AuthorityError("not any more")

    shelf = Moody(dict.fromkeys(range(3, 100), refuse))
    far, digest = node_with(party, shelf, near)
    fetch = Fetch(near, digest, len(DATA))
    with pytest.raises(DeadlineError, match="was not complete"):
        fetch.run([far.node_key], 1.0)
    assert fetch.num_arrived <= 2
    shelf.moods.clear()
    assert fetch.run([far.node_key], WAIT_S) == DATA
    assert fetch.num_arrived == 6


def test_a_forged_piece_is_found_and_fetched_from_another(party: Any, near: Node) -> None:
    forged = Moody(dict.fromkeys(range(1, 100), lambda params: ({}, [bytes(PIECE_BYTES)])))
    liar, digest = node_with(party, forged, near)
    honest, same = node_with(party, Moody({}), near)
    assert digest == same
    assert Fetch(near, digest, len(DATA)).run([liar.node_key, honest.node_key], WAIT_S) == DATA


def test_a_manifest_of_other_data_is_refused(party: Any, near: Node) -> None:
    far, digest = node_with(party, shelf := Moody({}), near)
    shelf._held[digest] = (manifest_of(DATA[:9]), DATA[:9])
    with pytest.raises(DeadlineError, match="manifest of other data"):
        Fetch(near, digest, len(DATA)).run([far.node_key], 1.0)


@pytest.mark.parametrize("num_pieces", [0, 1, 3])
def test_a_manifest_whose_count_is_wrong_is_refused_before_memory_is_taken(
    party: Any, near: Node, num_pieces: int
) -> None:
    far, _ = node_with(party, shelf := Moody({}), near)
    lie = Manifest(num_bytes=PIECE_BYTES + 1, pieces=[bytes(32)] * num_pieces)
    shelf._held[lie.digest()] = (lie, DATA)
    with pytest.raises(DeadlineError, match=f"in {num_pieces} pieces"):
        Fetch(near, lie.digest(), 1 << 40).run([far.node_key], 1.0)


def test_more_than_was_expected_is_refused_before_memory_is_taken(party: Any, near: Node) -> None:
    far, digest = node_with(party, Moody({}), near)
    with pytest.raises(ProtocolError, match="more than the 100"):
        Fetch(near, digest, 100).run([far.node_key], WAIT_S)


def test_who_may_not_fetch_gets_nothing_and_what_is_gone_is_said(party: Any, near: Node) -> None:
    def refuse(peer: Peer, digest: bytes) -> None:
        raise AuthorityError("for workers of the job")

    far, digest = node_with(party, Shelf(refuse), near)
    with pytest.raises(AuthorityError, match="for workers of the job"):
        near.call(far.node_key, "manifest", {"digest": digest})
    other, digest = node_with(party, shelf := Shelf(lambda peer, digest: None), near)
    for index in (-1, 6, "0"):
        with pytest.raises(ProtocolError):
            near.call(other.node_key, "piece", {"digest": digest, "index": index})
    shelf.remove(digest)
    with pytest.raises(DeadlineError, match="not held here"):
        Fetch(near, digest, len(DATA)).run([other.node_key], 1.0)


def test_a_name_says_what_the_data_is() -> None:
    assert manifest_of(DATA).digest() != manifest_of(DATA[1:]).digest()
    assert Manifest.decode(manifest_of(DATA).encode()) == manifest_of(DATA)
    with pytest.raises(RecordError):
        Manifest.decode(b"x")
