"""Whom a node knows: k-buckets by distance, each holding those seen for longest. No I/O; the clock is given.

Only nodes that have proven themselves over an authenticated connection get in (`seen`); hearsay does not. A full bucket
keeps whom it has while they answer, so that a flood of new nodes displaces nobody: who was seen least recently is to be
pinged (`to_ping`), and makes room when it is gone. At most MAX_PER_SUBNET of a bucket are of one subnet, and
MAX_PER_SUBNET_IN_ALL of the table.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from smartnodes_core.dht.contacts import ID_BITS, Contact, node_id, subnet_of
from smartnodes_core.records import NodeKey

BUCKET_SIZE = 20
#: How many wait for a place in a full bucket.
MAX_WAITING = 10
#: A contact that failed so often is forgotten, where nobody waits for its place.
MAX_FAILURES = 2
#: Who was not seen for so long is pinged: where somebody waits for its place, and in any case.
FRESH_S, GHOST_S = 60.0, 600.0
MAX_PER_SUBNET, MAX_PER_SUBNET_IN_ALL = 2, 10


@dataclass
class _Entry:
    contact: Contact
    seen_s: float
    num_failures: int = 0


@dataclass
class _Bucket:
    entries: dict[NodeKey, _Entry] = field(default_factory=dict)  # seen least recently first
    waiting: dict[NodeKey, Contact] = field(default_factory=dict)  # seen last, last
    looked_up_s: float = 0.0


class RoutingTable:
    """The contacts of the node `own_key`. Safe to use from several threads; `clock` is monotonic, in seconds."""

    def __init__(
        self, own_key: NodeKey, *, bucket_size: int = BUCKET_SIZE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.own_id = node_id(own_key)
        self.bucket_size, self._own_key, self._clock = bucket_size, own_key, clock
        self._buckets: dict[int, _Bucket] = {}
        self._subnets: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(len(bucket.entries) for bucket in self._buckets.values())

    def __repr__(self) -> str:
        return f"RoutingTable({len(self)} contacts in {len(self._buckets)} buckets)"

    def __contains__(self, node_key: NodeKey) -> bool:
        return self.get(node_key) is not None

    def get(self, node_key: NodeKey) -> Contact | None:
        """A node as it said itself where it is reached."""
        with self._lock:
            bucket = self._buckets.get(self._index(node_id(node_key)))
            entry = bucket.entries.get(node_key) if bucket is not None else None
        return entry.contact if entry is not None else None

    def contacts(self) -> list[Contact]:
        """Everybody in it, the nearest buckets first."""
        with self._lock:
            found = sorted(self._buckets.items())
            return [entry.contact for _, bucket in found for entry in bucket.entries.values()]

    def seen(self, contact: Contact) -> None:
        """This node has just proven that it is there. Where its bucket is full, it waits for somebody to be gone."""
        if contact.node_key == self._own_key or not contact.endpoints:
            return
        now_s = self._clock()
        with self._lock:
            bucket = self._buckets.setdefault(self._index(contact.id), _Bucket(looked_up_s=now_s))
            known = bucket.entries.pop(contact.node_key, None)
            if known is not None:
                self._count(known.contact, -1)
            bucket.waiting.pop(contact.node_key, None)
            if not self._has_subnet_room(bucket, contact):
                return
            if len(bucket.entries) < self.bucket_size:
                bucket.entries[contact.node_key] = _Entry(contact, now_s)
                self._count(contact, 1)
                return
            bucket.waiting[contact.node_key] = contact
            if len(bucket.waiting) > MAX_WAITING:
                del bucket.waiting[next(iter(bucket.waiting))]

    def failed(self, node_key: NodeKey) -> None:
        """It did not answer. Its place goes to who waits for it; where nobody does, it is forgotten the second time."""
        with self._lock:
            bucket = self._buckets.get(self._index(node_id(node_key)))
            if bucket is None:
                return
            bucket.waiting.pop(node_key, None)
            entry = bucket.entries.get(node_key)
            if entry is None:
                return
            entry.num_failures += 1
            if bucket.waiting or entry.num_failures >= MAX_FAILURES:
                self._take_out(bucket, node_key)

    def remove(self, node_key: NodeKey) -> None:
        """Forgets a node that broke the protocol, or was taken off the chain."""
        with self._lock:
            bucket = self._buckets.get(self._index(node_id(node_key)))
            if bucket is not None:
                bucket.waiting.pop(node_key, None)
                if node_key in bucket.entries:
                    self._take_out(bucket, node_key)

    def closest(self, target: int, count: int) -> list[Contact]:
        """Up to `count` contacts, nearest to `target` first: of those that answered last time, or, where nobody did (it
        may be this node that was cut off), of all."""
        with self._lock:
            entries = [entry for bucket in self._buckets.values() for entry in bucket.entries.values()]
        good = [entry.contact for entry in entries if not entry.num_failures] or [entry.contact for entry in entries]
        return heapq.nsmallest(count, good, key=lambda contact: contact.id ^ target)

    def looked_up(self, target: int) -> None:
        """A lookup of `target` is made, which refreshes the bucket that it lies in."""
        with self._lock:
            bucket = self._buckets.get(self._index(target))
            if bucket is not None:
                bucket.looked_up_s = self._clock()

    def to_refresh(self, age_s: float, rng: random.Random) -> list[int]:
        """A random id in each bucket, from the nearest that holds anybody, not looked up in for `age_s`."""
        now_s = self._clock()
        with self._lock:
            held = [index for index, bucket in self._buckets.items() if bucket.entries]
            stale = []
            for index in range(min(held, default=ID_BITS), ID_BITS):
                bucket = self._buckets.setdefault(index, _Bucket(looked_up_s=now_s - age_s))
                if now_s - bucket.looked_up_s >= age_s:
                    stale.append(index)
        return [self.own_id ^ (1 << index | rng.getrandbits(index)) for index in stale]

    def to_ping(self) -> list[Contact]:
        """Those who may be gone: whose last call failed, who was seen least recently where somebody waits, and who was
        not seen for GHOST_S. Whoever does not answer is to be told to `failed`."""
        now_s = self._clock()
        found = []
        with self._lock:
            for bucket in self._buckets.values():
                for rank, entry in enumerate(bucket.entries.values()):
                    limit_s = FRESH_S if bucket.waiting and rank == 0 else GHOST_S
                    if entry.num_failures or now_s - entry.seen_s > limit_s:
                        found.append(entry.contact)
        return found

    def _index(self, target: int) -> int:
        """The bucket of an id: the number of its highest bit that differs from ours (-1 for our own)."""
        return (self.own_id ^ target).bit_length() - 1

    def _take_out(self, bucket: _Bucket, node_key: NodeKey) -> None:
        self._count(bucket.entries.pop(node_key).contact, -1)
        for key in reversed(bucket.waiting):
            if self._has_subnet_room(bucket, bucket.waiting[key]):
                contact = bucket.waiting.pop(key)
                bucket.entries[key] = _Entry(contact, self._clock())
                self._count(contact, 1)
                return

    def _has_subnet_room(self, bucket: _Bucket, contact: Contact) -> bool:
        subnet = subnet_of(contact.endpoints)
        if subnet is None:
            return True
        inside = sum(subnet_of(entry.contact.endpoints) == subnet for entry in bucket.entries.values())
        return inside < MAX_PER_SUBNET and self._subnets[subnet] < MAX_PER_SUBNET_IN_ALL

    def _count(self, contact: Contact, by: int) -> None:
        subnet = subnet_of(contact.endpoints)
        if subnet is not None:
            self._subnets[subnet] += by
            if not self._subnets[subnet]:
                del self._subnets[subnet]
