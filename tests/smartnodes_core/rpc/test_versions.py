"""Messages of newer minor versions are understood, those of other major versions refused with both named."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from smartnodes_core.errors import ProtocolError, VersionError
from smartnodes_core.nodes.base import Node
from smartnodes_core.rpc import Version, allow, called_version
from smartnodes_core.rpc.versions import FIRST, Versions, stream_of
from smartnodes_core.transport.base import Peer

WAIT_S = 10.0


class Adder:
    """Adds `x` and `y`; has heard of nothing else."""

    def __init__(self) -> None:
        self.noted: queue.Queue[tuple[int, Version]] = queue.Queue()

    @allow(max_body_bytes=8 << 20)
    def rpc_add(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        return {"sum": params["x"] + params["y"], "asked": list(called_version())}

    def rpc_note(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        self.noted.put((params["n"], called_version()))


@pytest.fixture
def adder() -> Adder:
    return Adder()


@pytest.fixture
def old(party: Any, adder: Adder) -> Node:
    node: Node = party.node("worker")
    node.serve(adder)
    return node


@pytest.fixture
def new(party: Any, old: Node) -> Node:
    node: Node = party.node("user")
    node.add_address(old.node_key, old.endpoint)
    return node


def test_what_nobody_declared_is_of_the_first_version_also_without_the_field(new: Node, old: Node) -> None:
    assert new.call(old.node_key, "add", {"x": 1, "y": 2}).params == {"sum": 3, "asked": [1, 0]}
    connection = new._links.get(old.node_key)
    assert connection is not None
    connection.send({"kind": "call", "id": 99, "method": "add", "params": {"x": 1, "y": 2}, "timeout_ms": 1000})
    assert new.call(old.node_key, "add", {"x": 2, "y": 2}).params["sum"] == 4


def test_a_newer_minor_version_is_understood_and_its_unknown_fields_are_ignored(
    new: Node, old: Node, adder: Adder
) -> None:
    new.declare("add", Version(1, 4))
    new.declare("note", Version(1, 2))
    assert new.call(old.node_key, "add", {"x": 1, "y": 2, "rounding": "down"}).params == {"sum": 3, "asked": [1, 4]}
    new.notify(old.node_key, "note", {"n": 7, "colour": "red"})
    assert adder.noted.get(timeout=WAIT_S) == (7, Version(1, 2))


def test_a_newer_major_version_is_refused_with_both_named_before_its_body_is_read(
    new: Node, old: Node, adder: Adder
) -> None:
    new.declare("add", Version(2, 1))
    new.declare("note", Version(3))
    with pytest.raises(VersionError, match=r"speaks version 2\.1 of add, here is 1\.0: update the older of the two"):
        new.call(old.node_key, "add", {"x": 1, "y": 2}, [bytes(4 << 20)])
    new.notify(old.node_key, "note", {"n": 1})
    new.declare("note", Version(1))
    new.notify(old.node_key, "note", {"n": 2})
    assert adder.noted.get(timeout=WAIT_S)[0] == 2  # the other was dropped, and the connection lives


def test_a_node_may_understand_older_major_versions_and_answers_in_theirs(new: Node, old: Node) -> None:
    old.declare("add", Version(3, 5), oldest_major=1)
    assert new.call(old.node_key, "add", {"x": 1, "y": 2}).params == {"sum": 3, "asked": [1, 0]}
    old.declare("add", Version(3, 5), oldest_major=2)
    with pytest.raises(VersionError, match=r"version 1\.0 of add, here is 3\.5 and versions from 2\.0 on: update"):
        new.call(old.node_key, "add", {"x": 1, "y": 2})


def test_an_answer_of_another_major_version_is_refused(new: Node, old: Node) -> None:
    old._rpc.versions.answering = lambda message, asked: Version(2)  # type: ignore[method-assign]
    with pytest.raises(VersionError, match=r"speaks version 2\.0 of add, here is 1\.0"):
        new.call(old.node_key, "add", {"x": 1, "y": 2})


def test_streams_have_versions_beside_methods_of_the_same_name(new: Node, old: Node) -> None:
    arrived: queue.Queue[tuple[dict[str, Any], bytes]] = queue.Queue()
    old.on_stream(
        "add",
        lambda peer, header, size: memoryview(bytearray(size)),
        lambda peer, header, body: arrived.put((header, bytes(body))),
    )
    new.declare(stream_of("add"), Version(2))
    new.stream(old.node_key, "add", {"n": 1}, [b"newer"])
    assert new.call(old.node_key, "add", {"x": 1, "y": 2}).params["sum"] == 3
    new.declare(stream_of("add"), Version(1, 9))
    new.stream(old.node_key, "add", {"n": 2, "unit": "cm"}, [b"newer, and understood"])
    header, body = arrived.get(timeout=WAIT_S)
    assert (header["n"], body) == (2, b"newer, and understood")
    assert arrived.empty()
    assert old._rpc.num_refused_streams == 1


@pytest.mark.parametrize("version", [None, 1, "1.0", [1], [1, 0, 0], [1, -1], [1, True], [1 << 16, 0], [0.5, 1]])
def test_what_is_no_version_is_a_fault(new: Node, old: Node, version: Any) -> None:
    with pytest.raises(ProtocolError, match="of no version"):
        Versions().check(Peer(b"k" * 32, None, "user", "a:1"), "add", {"version": version})


@pytest.mark.parametrize(("version", "oldest"), [(Version(0, 1), None), (Version(1), 2), (Version(2, -1), None)])
def test_only_versions_are_declared(version: Version, oldest: int | None) -> None:
    with pytest.raises(ValueError, match="is none"):
        Versions().declare("add", version, oldest)
    assert Versions().of("add") == FIRST
