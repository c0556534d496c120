"""A node's place in the DHT from its start to its end, over real connections and in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from smartnodes_core.dht import running
from smartnodes_core.dht.contacts import Contact
from smartnodes_core.dht.running import RunningDht
from smartnodes_core.errors import ConnectionLostError, PeerUnreachableError
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import Announcement

WAIT_S = 20.0


def seat(party: Any, bootstrap: Node | None = None) -> tuple[Node, RunningDht]:
    node: Node = party.node("worker")
    contacts = [Contact(bootstrap.node_key, (bootstrap.endpoint,))] if bootstrap else []
    made = RunningDht(node, party.network_id, lambda key: "worker", lambda: contacts)
    made.take_part([node.endpoint])
    made.start()
    assert made._upkeep.joined.wait(WAIT_S)
    return node, made


def announced(node: Node) -> Any:
    return node.identity.sign(
        Announcement(
            node_key=node.node_key,
            role="worker",
            network_id=7,
            sequence=1,
            expires_at_s=int(time.time()) + 100,
            endpoints=[node.endpoint],
            offers={},
        )
    )


def eventually(condition: Callable[[], Any]) -> None:
    deadline_s, pause = time.monotonic() + WAIT_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s
        pause.wait(0.01)


def test_a_peer_whose_address_is_unknown_is_found_and_called(party: Any) -> None:
    first, first_dht = seat(party)
    second, second_dht = seat(party, first)
    third, third_dht = seat(party, first)
    second_dht.dht.put(announced(second))
    assert third.call(second.node_key, "binding").body
    for each in (third_dht, second_dht, first_dht):
        each.close()
        each.close()


def test_who_is_not_found_is_not_looked_for_again_at_once(memory_party: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node, made = seat(memory_party)
    searches: list[int] = []
    monkeypatch.setattr(made.dht, "find_node", lambda key, timeout_s: searches.append(1))
    for _ in range(3):
        with pytest.raises(PeerUnreachableError):
            node.call(bytes(32), "binding")
    assert len(searches) == 1
    monkeypatch.setattr(running, "MAX_MISSING", 3)
    for number in range(10):
        made.find_address(bytes([number] * 32), 1.0)
    assert len(made._missing) == 3
    made.close()


def test_after_its_end_nothing_waits_for_an_answer(memory_party: Any) -> None:
    first, first_dht = seat(memory_party)
    second, second_dht = seat(memory_party, first)
    eventually(lambda: second.node_key in first_dht.dht.table)
    second_dht.close()
    began_s = time.monotonic()
    with pytest.raises(ConnectionLostError, match="leaving"):
        second_dht.dht.put(announced(second))
    assert time.monotonic() - began_s < 5
    assert second.find_address is None
    first_dht.close()
