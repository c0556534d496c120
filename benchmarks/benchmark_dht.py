"""The DHT: how much of what was stored is found, over how many hops, how fast, and after how many nodes are gone.

    python benchmarks/benchmark_dht.py [--nodes 1000] [--sockets 100] [--report FILE]

First `--nodes` nodes in this process, over the in-memory twin of calls (real signatures, encodings and caps; no network
in between). Then `--sockets` nodes in `--processes` processes that talk over TLS on loopback, of which three tenths are
killed at once. Both times each node stores its announcement, and each is looked for from some other node. Hivemind
publishes, for its own DHT, 14.9 ms for a store and 6.6 ms for a get.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from typing import Any

from smartnodes_core.chain.signing import new_key
from smartnodes_core.dht.asking import NodeCalls
from smartnodes_core.dht.contacts import Contact, node_id
from smartnodes_core.dht.memory import MemoryDht
from smartnodes_core.dht.node import NUM_REPLICAS, DhtNode
from smartnodes_core.dht.routing import RoutingTable
from smartnodes_core.dht.upkeep import REPUBLISH_S, maintain
from smartnodes_core.dht.values import ValueStore
from smartnodes_core.identity import Identity, make_binding
from smartnodes_core.nodes.authority import OpenAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import Announcement, Signed
from smartnodes_core.rpc.pool import WorkerPool
from smartnodes_core.transport.tls import TlsTransport

NETWORK_ID = 1
HIVEMIND_STORE_MS, HIVEMIND_GET_MS = 14.9, 6.6
#: How many nodes the waves of `leave_by_halves` take, one after the other.
NUM_WAVES = 3
THREADS = 16


def announcement(identity: Identity, endpoint: str, lifetime_s: int = 3000) -> Signed:
    return identity.sign(
        Announcement(
            node_key=identity.node_key,
            role="worker",
            network_id=NETWORK_ID,
            sequence=1,
            expires_at_s=int(time.time()) + lifetime_s,
            endpoints=[endpoint],
            offers={"memory_bytes": 24 << 30, "free_slots": 1},
        )
    )


def spread(times_s: list[float]) -> dict[str, float]:
    """Milliseconds: median, mean, and the one that 99 in a hundred are below."""
    ordered = sorted(each * 1000 for each in times_s)
    return {
        "median_ms": round(statistics.median(ordered), 3),
        "mean_ms": round(statistics.fmean(ordered), 3),
        "p99_ms": round(ordered[int(len(ordered) * 0.99)], 3),
    }


class InProcess:
    """Nodes over the in-memory twin. `offset_s` is how far time was put forward."""

    def __init__(self, count: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.net = MemoryDht()
        self.offset_s = 0.0
        self.identities = [Identity.from_seed(self.rng.randbytes(32)) for _ in range(count)]
        self.dhts: dict[bytes, DhtNode] = {}
        self.alive: list[Contact] = []
        began_s = time.perf_counter()
        for number, identity in enumerate(self.identities):
            contact = Contact(identity.node_key, (f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:9000",))
            dht = self.dhts[identity.node_key] = self._node(contact)
            self.net.serve(identity.node_key, dht, "worker")
            dht.join(self.rng.sample(self.alive, min(3, len(self.alive))))
            self.alive.append(contact)
        self.join_s = time.perf_counter() - began_s

    def _node(self, contact: Contact) -> DhtNode:
        def clock() -> float:
            return time.monotonic() + self.offset_s

        return DhtNode(
            contact.node_key,
            NETWORK_ID,
            self.net.calls_of(contact.node_key, "worker"),
            lambda job: job(),
            endpoints=lambda: contact.endpoints,
            role_of=lambda key: "worker",
            values=ValueStore(NETWORK_ID, clock=clock),
            table=RoutingTable(contact.node_key, clock=clock),
            rng=self.rng,
        )

    def any(self) -> DhtNode:
        return self.dhts[self.rng.choice(self.alive).node_key]

    def store_all(self) -> dict[str, Any]:
        times_s, before = [], self.net.num_calls
        for identity in self.identities:
            dht, signed = self.dhts[identity.node_key], announcement(identity, "10.0.0.1:9000")
            began_s = time.perf_counter()
            dht.put(signed)
            times_s.append(time.perf_counter() - began_s)
        return {**spread(times_s), "calls": round((self.net.num_calls - before) / len(times_s), 1)}

    def get_all(self) -> dict[str, Any]:
        """Each announcement, also of nodes that are gone, from a random node that is there and does not keep it."""
        times_s, hops, before = [], [], self.net.num_calls
        for identity in self.identities:
            dht, key = self.any(), node_id(identity.node_key)
            while dht.values.entries(key) and len(self.alive) > 2 * NUM_REPLICAS:
                dht = self.any()
            began_s = time.perf_counter()
            found = dht.get(key)
            times_s.append(time.perf_counter() - began_s)
            if found:
                hops.append(dht.num_hops)
        return {
            **spread(times_s),
            "calls": round((self.net.num_calls - before) / len(times_s), 1),
            "found": len(hops),
            "of": len(times_s),
            "mean_hops": round(statistics.fmean(hops), 2),
            "max_hops": max(hops),
        }

    def vanish(self, count: int) -> None:
        for contact in self.rng.sample(self.alive, count):
            self.net.vanish(contact.node_key)
            self.alive.remove(contact)

    def leave_by_halves(self) -> None:
        """Half of all nodes vanish in waves; between these, those that stay do their upkeep once."""
        half = len(self.identities) // 2
        for _ in range(NUM_WAVES):
            self.vanish(half // NUM_WAVES)
            self.offset_s += 2 * REPUBLISH_S
            for contact in self.alive:
                maintain(self.dhts[contact.node_key], timeout_s=60.0)


def run_in_process(count: int, seed: int) -> dict[str, Any]:
    network = InProcess(count, seed)
    figures: dict[str, Any] = {
        "nodes": count,
        "join_ms": round(network.join_s / count * 1000, 2),
        "mean_contacts": round(statistics.fmean(len(dht.table) for dht in network.dhts.values()), 1),
        "hops_limit": math.ceil(math.log2(count)),
        "store": network.store_all(),
        "get": network.get_all(),
    }
    network.vanish(count * 3 // 10)
    figures["get_after_30_percent_vanished"] = network.get_all()
    waves = InProcess(count, seed + 1)
    waves.store_all()
    waves.leave_by_halves()
    figures["get_after_half_left"] = waves.get_all()
    return figures


# -- sockets ----------------------------------------------------------------------------------------------------------


class OverTls:
    """Some nodes of the network in a process of their own, driven by lines of JSON on its standard input."""

    def __init__(self, count: int) -> None:
        self.pool = WorkerPool("dht", THREADS)
        self.nodes: list[Node] = []
        self.dhts: list[DhtNode] = []
        for _ in range(count):
            identity = Identity.create()
            terms = {"chain_id": 1, "registry": bytes(20), "network_id": NETWORK_ID}
            binding = make_binding(identity, new_key(), "worker", expires_at_s=int(time.time()) + 3600, **terms)
            node = Node(identity, binding, TlsTransport(identity, binding), OpenAuthority())
            node.start()
            dht = DhtNode(
                node.node_key,
                NETWORK_ID,
                NodeCalls(node),
                self.pool.run,
                endpoints=lambda node=node: [node.endpoint],  # type: ignore[misc]
                role_of=lambda key: "worker",
            )
            node.serve(dht)
            self.nodes.append(node)
            self.dhts.append(dht)

    def contacts(self) -> list[list[str]]:
        return [[node.node_key.hex(), node.endpoint] for node in self.nodes]

    def join(self, contacts: list[list[str]]) -> None:
        for dht in self.dhts:
            dht.join([Contact(bytes.fromhex(key), (endpoint,)) for key, endpoint in contacts])

    def store(self) -> list[float]:
        times_s = []
        for node, dht in zip(self.nodes, self.dhts, strict=True):
            signed = announcement(node.identity, node.endpoint)
            began_s = time.perf_counter()
            dht.put(signed)
            times_s.append(time.perf_counter() - began_s)
        return times_s

    def get(self, keys: list[str]) -> list[tuple[float, int]]:
        """Seconds and hops of each; -1 hops: not found."""
        found = []
        for number, key in enumerate(keys):
            dht = self.dhts[number % len(self.dhts)]
            began_s = time.perf_counter()
            records = dht.get(node_id(bytes.fromhex(key)))
            found.append((time.perf_counter() - began_s, dht.num_hops if records else -1))
        return found

    def serve(self) -> None:
        for line in sys.stdin:
            asked = json.loads(line)
            result = getattr(self, asked["do"])(*asked["with"])
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


class Far:
    """A process of `OverTls` as its parent sees it."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, __file__, "--far", str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str, *arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, "with": arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def call(self, what: str, *arguments: Any) -> Any:
        self.ask(what, *arguments)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def run_over_tls(count: int, num_processes: int, rng: random.Random) -> dict[str, Any]:
    processes = [Far(count // num_processes) for _ in range(num_processes)]
    try:
        contacts = [contact for each in processes for contact in each.call("contacts")]
        began_s = time.perf_counter()
        for each in processes:
            each.call("join", rng.sample(contacts, 3))
        join_s = time.perf_counter() - began_s
        for each in processes:  # all connections that a store needs are made by the first
            each.call("store")
        figures: dict[str, Any] = {
            "nodes": len(contacts),
            "processes": num_processes,
            "join_ms": round(join_s / len(contacts) * 1000, 2),
            "hops_limit": math.ceil(math.log2(len(contacts))),
            "store": spread([time_s for each in processes for time_s in each.call("store")]),
        }
        keys = rng.sample([key for key, _ in contacts], len(contacts))
        figures["first_get"] = _get(processes, keys)  # with the handshakes of connections that it needs
        figures["get"] = _get(processes, keys)
        killed = rng.sample(processes, num_processes * 3 // 10)
        for each in killed:
            each.kill()
        left = [each for each in processes if each not in killed]
        figures["get_after_30_percent_vanished"] = _get(left, keys)
        return figures
    finally:
        for each in processes:
            each.kill()


def _get(processes: list[Far], keys: list[str]) -> dict[str, Any]:
    """Every key from some process, one process after the other; from the same ones each time."""
    share = math.ceil(len(keys) / len(processes))
    found = [
        tuple(item)
        for number, each in enumerate(processes)
        for item in each.call("get", keys[number * share : (number + 1) * share])
    ]
    hops = [each for _, each in found if each >= 0]
    return {
        **spread([time_s for time_s, _ in found]),
        "found": len(hops),
        "of": len(found),
        "mean_hops": round(statistics.fmean(hops), 2),
        "max_hops": max(hops),
    }


def show(title: str, figures: dict[str, Any]) -> None:
    print(f"\n{title}: {figures['nodes']} nodes, joined in {figures['join_ms']:.1f} ms each")
    for name in ("store", "first_get", "get", "get_after_30_percent_vanished", "get_after_half_left"):
        row = figures.get(name)
        if row is None:
            continue
        line = f"{name.replace('_', ' '):32}{row['median_ms']:8.2f} ms median {row['p99_ms']:8.2f} ms 99 %"
        if "calls" in row:
            line += f", {row['calls']:.0f} calls"
        if "found" in row:
            line += f", found {row['found']} of {row['of']}"
            line += f", hops {row['mean_hops']} mean, {row['max_hops']} most (limit {figures['hops_limit']})"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--far", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--nodes", type=int, default=1000, help="in this process; 0: leave this part out")
    parser.add_argument("--sockets", type=int, default=100, help="over TLS; 0: leave this part out")
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", help="write the figures to this JSON file")
    options = parser.parse_args()
    if options.far is not None:
        OverTls(options.far).serve()
        return
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "hivemind_published": {"store_ms": HIVEMIND_STORE_MS, "get_ms": HIVEMIND_GET_MS},
    }
    print(figures["machine"])
    if options.nodes:
        figures["memory"] = run_in_process(options.nodes, options.seed)
        show("in memory", figures["memory"])
    if options.sockets:
        figures["tls"] = run_over_tls(options.sockets, options.processes, random.Random(options.seed))
        show("over TLS", figures["tls"])
    print(f"\nhivemind publishes {HIVEMIND_STORE_MS} ms for a store and {HIVEMIND_GET_MS} ms for a get")
    if options.report:
        with open(options.report, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
