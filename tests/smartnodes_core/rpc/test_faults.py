"""Calls over a network that drops, doubles, delays, reorders, truncates and goes dead: seeded schedules.

Every call ends with its own result or a clear error by its deadline, and its handler ran at most once.
`--fault-schedules` says how many schedules are tried (the long mode: 10000).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from smartnodes_core.errors import ProtocolError, Unavailable
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.authority import OpenAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.transport.base import Peer
from smartnodes_core.transport.faults import Faults
from smartnodes_core.transport.memory import MemoryHub, MemoryTransport

TIMEOUT_S = 0.25
SLACK_S = 2.0  # of a loaded machine
NUM_CALLS = 12
SIDE_BY_SIDE = 16
KINDS = ("drop", "duplicate", "delay", "reorder", "truncate", "half_open")


class Service:
    """Counts how often each call ran."""

    def __init__(self) -> None:
        self.runs: Counter[int] = Counter()
        self.lock = threading.Lock()

    def rpc_double(self, caller: Peer, params: dict[str, Any], body: memoryview) -> tuple[dict[str, Any], list[bytes]]:
        with self.lock:
            self.runs[params["n"]] += 1
        return {"n": params["n"], "twice": 2 * params["x"]}, [bytes(body[::-1])]


def node_on(hub: MemoryHub) -> Node:
    identity = Identity.from_seed(random.randbytes(32))
    node = Node(identity, None, MemoryTransport(hub, identity, None), OpenAuthority())
    node.start()
    return node


def schedule_of(seed: int) -> Faults:
    """One kind of fault, or all of them a little."""
    chance = random.Random(seed)
    if seed % (len(KINDS) + 1) == len(KINDS):
        return Faults(seed, drop=0.05, duplicate=0.1, delay=0.3, reorder=0.2, truncate=0.02, half_open=0.1)
    return Faults(seed, **{KINDS[seed % (len(KINDS) + 1)]: chance.uniform(0.1, 0.6)})


def play(seed: int) -> Counter[str]:
    """One schedule: how its calls ended. Raises AssertionError where one ended wrongly."""
    hub, service = MemoryHub(schedule_of(seed)), Service()
    near, far = node_on(hub), node_on(hub)
    far.serve(service)
    near.add_address(far.node_key, far.endpoint)
    ends: Counter[str] = Counter()
    chance = random.Random(-seed)

    def call(number: int, num_bytes: int, bulk: bool) -> str:
        body = bytes([number]) * num_bytes + b"end"
        started_s = time.monotonic()
        try:
            params = {"n": number, "x": number * 7}
            reply = near.call(far.node_key, "double", params, [body], bulk=bulk, timeout_s=TIMEOUT_S)
        except (Unavailable, ProtocolError) as error:
            end = type(error).__name__
        else:
            end = "result"
            assert reply.params == {"n": number, "twice": number * 14}, (seed, number, reply.params)
            assert bytes(reply.body) == body[::-1], (seed, number)
        assert time.monotonic() - started_s < TIMEOUT_S + SLACK_S, (seed, number, end)
        return end

    try:
        with ThreadPoolExecutor(4) as threads:
            sizes = [(number, chance.choice((0, 100, 70_000)), chance.random() < 0.2) for number in range(NUM_CALLS)]
            ends.update(threads.map(lambda each: call(*each), sizes))
        assert all(count == 1 for count in service.runs.values()), (seed, service.runs)
        assert sum(ends.values()) == NUM_CALLS
        assert len(near._rpc._pending) == 0
    finally:
        near.stop()
        far.stop()
    return ends


def test_every_call_ends_once_and_in_time_whatever_the_network_does(request: pytest.FixtureRequest) -> None:
    logging.getLogger("smartnodes_core").setLevel(logging.CRITICAL)
    num_schedules = request.config.getoption("--fault-schedules")
    ends: Counter[str] = Counter()
    try:
        with ThreadPoolExecutor(SIDE_BY_SIDE) as threads:
            for each in threads.map(play, range(num_schedules)):
                ends.update(each)
    finally:
        logging.getLogger("smartnodes_core").setLevel(logging.NOTSET)
    print(f"{num_schedules} schedules: {dict(ends)}")
    assert sum(ends.values()) == num_schedules * NUM_CALLS
    assert ends["result"] > 0.3 * sum(ends.values())
    assert ends["DeadlineError"]
    assert ends["ConnectionLostError"]


def test_a_network_without_faults_loses_nothing() -> None:
    hub = MemoryHub(Faults(0))
    near, far = node_on(hub), node_on(hub)
    far.serve(Service())
    near.add_address(far.node_key, far.endpoint)
    for number in range(20):
        assert near.call(far.node_key, "double", {"n": number, "x": 1}, [b"ab"]).params["twice"] == 2
    near.stop()
    far.stop()


def test_a_call_that_comes_twice_runs_once_and_is_answered_once() -> None:
    hub, service = MemoryHub(Faults(0, duplicate=1.0)), Service()
    near, far = node_on(hub), node_on(hub)
    far.serve(service)
    near.add_address(far.node_key, far.endpoint)
    for number in range(20):
        assert near.call(far.node_key, "double", {"n": number, "x": 1}).params["n"] == number
    assert set(service.runs.values()) == {1}
    near.stop()
    far.stop()
