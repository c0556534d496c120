"""A DHT in this process: many nodes over the in-memory twin of calls, deterministic and without threads."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from smartnodes_core.dht.contacts import Contact
from smartnodes_core.dht.memory import MemoryDht
from smartnodes_core.dht.node import DhtNode
from smartnodes_core.dht.routing import RoutingTable
from smartnodes_core.dht.values import ValueStore
from smartnodes_core.identity import Identity
from smartnodes_core.records import Announcement, JobNotice, Role, Signed

NETWORK_ID = 7


class Clock:
    """Time that passes when a test says so: monotonic when called, Unix time by `unix`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def unix(self) -> float:
        return time.time() - 1000.0 + self.now_s


class Member:
    """One node of the DHT with its identity."""

    def __init__(self, swarm: Swarm, role: Role = "worker", listens: bool = True) -> None:
        self.identity = Identity.from_seed(swarm.rng.randbytes(32))
        self.key, self.role = self.identity.node_key, role
        self.contact = Contact(self.key, (f"10.0.0.1:{len(swarm.members) + 1}",))
        self.swarm, self.clock = swarm, swarm.clock
        self.dht = DhtNode(
            self.key,
            NETWORK_ID,
            swarm.net.calls_of(self.key, role),
            lambda job: job(),
            endpoints=lambda: self.contact.endpoints if listens else (),
            role_of=lambda key: swarm.roles.get(key),
            values=ValueStore(NETWORK_ID, now_s=swarm.clock.unix, clock=swarm.clock),
            table=RoutingTable(self.key, clock=swarm.clock),
            rng=random.Random(swarm.rng.random()),
        )
        swarm.roles[self.key] = role
        if listens:
            swarm.net.serve(self.key, self.dht, role)

    def announcement(self, **changes: Any) -> Signed:
        fields: dict[str, Any] = {
            "node_key": self.key,
            "role": self.role,
            "network_id": NETWORK_ID,
            "sequence": 1,
            "expires_at_s": int(self.clock.unix()) + 3000,
            "endpoints": list(self.contact.endpoints),
            "offers": {},
            **changes,
        }
        return self.identity.sign(Announcement(**fields))

    def notice(self, job: bytes, **changes: Any) -> Signed:
        fields: dict[str, Any] = {
            "job": job,
            "keeper": self.key,
            "network_id": NETWORK_ID,
            "plan_version": 0,
            "state": "open",
            "sequence": 1,
            "expires_at_s": int(self.clock.unix()) + 3000,
            **changes,
        }
        return self.identity.sign(JobNotice(**fields))


class Swarm:
    """Members that have joined through each other."""

    def __init__(self, count: int, seed: int = 0, lost: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.net = MemoryDht(lost, random.Random(seed + 1))
        self.roles: dict[bytes, Role] = {}
        self.members: list[Member] = []
        for _ in range(count):
            self.add()

    def add(self, role: Role = "worker", listens: bool = True) -> Member:
        member = Member(self, role, listens)
        if self.members:
            known = self.rng.sample(self.members, min(3, len(self.members)))
            member.dht.join([each.contact for each in known])
        if listens:
            self.members.append(member)
        return member

    def vanish(self, gone: list[Member]) -> None:
        for member in gone:
            self.net.vanish(member.key)
            self.members.remove(member)

    def pick(self) -> Member:
        return self.rng.choice(self.members)


@pytest.fixture
def make_swarm() -> Callable[..., Swarm]:
    return Swarm
