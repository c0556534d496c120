"""A node of the DHT: what it asks of the others, beside what it serves (`serving.py`).

It is light: no thread and no socket of its own. `calls` is the network, `run` has something run beside the caller, and
`upkeep.maintain` is called from time to time.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from smartnodes_core.dht.asking import LOOKUP_TIMEOUT_S, Calls, Patience, Run, run_lookup
from smartnodes_core.dht.contacts import ID_BITS, Contact, contacts_in, endpoints_in, job_id, node_id
from smartnodes_core.dht.lookup import Lookup
from smartnodes_core.dht.routing import BUCKET_SIZE, RoutingTable
from smartnodes_core.dht.rules import CLOCKS_DIFFER_S, Entry, check_signature
from smartnodes_core.dht.serving import MAX_ANSWER_BYTES, DhtService
from smartnodes_core.dht.values import MAX_OWNERS_PER_KEY, ValueStore
from smartnodes_core.errors import (
    PeerFault,
    RecordError,
    SmartnodesError,
    Unavailable,
)
from smartnodes_core.records import Announcement, JobNotice, NodeKey, Role, Signed
from smartnodes_core.remote_errors import raised_by
from smartnodes_core.rpc import Reply

logger = logging.getLogger(__name__)

#: How many nodes keep a record. Where three tenths of all nodes vanish at once, all of these are among them once in
#: 15,000 times; storing takes as many calls, and twice as many for the lookup.
NUM_REPLICAS = 8
#: A search for a value asks more nodes than keep it, if it must: some are gone, and some may lie.
SEARCH_WIDTH = 16

_records = msgspec.msgpack.Decoder(list[bytes])


class DhtNode(DhtService):
    """The place of the node `own_key` in the DHT; see `DhtService` for `endpoints` and `role_of`."""

    def __init__(
        self,
        own_key: NodeKey,
        network_id: int,
        calls: Calls,
        run: Run,
        *,
        endpoints: Callable[[], Sequence[str]] = tuple,
        role_of: Callable[[NodeKey], Role | None],
        values: ValueStore | None = None,
        table: RoutingTable | None = None,
        rng: random.Random | None = None,
    ) -> None:
        table = table if table is not None else RoutingTable(own_key)
        values = values if values is not None else ValueStore(network_id)
        super().__init__(table, values, endpoints, role_of)
        self.own_key, self.own_id = own_key, node_id(own_key)
        self.run = run
        self.rng = rng or random.SystemRandom()
        self._calls = calls
        self._patience = Patience()
        self._lock = threading.Lock()
        self.num_hops = 0  # of the last search that found something

    def __repr__(self) -> str:
        return f"DhtNode({self.own_key.hex()[:8]}, {self.table!r}, {self.values!r})"

    def join(self, contacts: Sequence[Contact], timeout_s: float = LOOKUP_TIMEOUT_S) -> int:
        """Become known, through nodes whose address is known; how many are in the routing table then."""
        for contact in contacts:
            self.ping(contact)
        self.lookup(self.own_id, timeout_s)
        return len(self.table)

    def lookup(self, target: int, timeout_s: float = LOOKUP_TIMEOUT_S, count: int = NUM_REPLICAS) -> list[Contact]:
        """The nodes nearest to `target` that answer, nearest first."""
        lookup, _ = self._search(target, timeout_s, for_value=False)
        return lookup.closest(count)

    def put(self, signed: Signed, timeout_s: float = LOOKUP_TIMEOUT_S) -> int:
        """Have a record kept by the nodes nearest to it; how many have it now, this one included where it is one.

        Raises RecordError or SignatureError for what nobody would keep, Unavailable when nobody took it.
        """
        entry = self.values.entry_of(signed)
        deadline_s = time.monotonic() + timeout_s
        nearest = self.lookup(entry.key, timeout_s)
        num_kept = self.hand(entry, nearest, deadline_s)
        if self._endpoints() and self._is_near(entry.key, nearest):
            self.values.store(entry)
            num_kept += 1
        if not num_kept:
            raise Unavailable(
                f"none of {len(nearest)} nodes keeps this {type(entry.record).__name__}: is the network reached?"
            )
        return num_kept

    def get(self, key: int, timeout_s: float = LOOKUP_TIMEOUT_S) -> list[Entry]:
        """The records under an id, the newest of each owner that was found; each has been checked. Nothing where there
        is none.

        What is not found is looked for once more from other contacts: the first may all have been liars.
        """
        deadline_s = time.monotonic() + timeout_s
        lookup, found = self._search(key, timeout_s, for_value=True)
        if not found:
            lookup, found = self._search(key, deadline_s - time.monotonic(), for_value=True, avoid=lookup)
        for entry in self.values.entries(key):
            _keep_newest(found, entry)
        if found:
            self.num_hops = lookup.num_hops or 0
        return list(found.values())

    def find_node(self, node_key: NodeKey, timeout_s: float = LOOKUP_TIMEOUT_S) -> Announcement | None:
        """What a node announced last; None where that is not found."""
        records = [entry.record for entry in self.get(node_id(node_key), timeout_s)]
        return next((record for record in records if isinstance(record, Announcement)), None)

    def find_job(self, job: bytes, timeout_s: float = LOOKUP_TIMEOUT_S) -> list[JobNotice]:
        """Who says that it keeps the record of a job."""
        records = [entry.record for entry in self.get(job_id(job), timeout_s)]
        return [record for record in records if isinstance(record, JobNotice)]

    def ping(self, contact: Contact) -> bool:
        """Whether it answers; the routing table is told."""
        try:
            self._call(contact, "dht_ping", {}, max_body_bytes=0)
        except SmartnodesError as error:
            logger.debug("%s does not answer: %s", contact, error)
            return False
        return True

    def hand(self, entry: Entry, to: Sequence[Contact], deadline_s: float) -> int:
        """Have these nodes keep a record, all at once; how many have it now."""
        lookup = Lookup(entry.key, self.own_key, to, width=len(to), num_parallel=max(1, len(to)), num_paths=1)

        def store(contact: Contact) -> tuple[Sequence[Contact], bool]:
            self.give(entry, contact)
            return (), False

        if to:
            run_lookup(lookup, store, self.run, self._patience, deadline_s)
        return len(lookup.closest(len(to)))

    def give(self, entry: Entry, to: Contact) -> bool:
        """Have one node keep a record; whether it is newer than what that node had. Raises a SmartnodesError."""
        reply = self._call(to, "dht_store", {}, [entry.signed.encode()], max_body_bytes=0)
        return reply.params.get("fresh") is True

    def _is_near(self, key: int, nearest: Sequence[Contact]) -> bool:
        return len(nearest) < NUM_REPLICAS or self.own_id ^ key < nearest[-1].id ^ key

    def _search(
        self, key: int, timeout_s: float, *, for_value: bool, avoid: Lookup | None = None
    ) -> tuple[Lookup, dict[NodeKey, Entry]]:
        """A lookup, and the records that it found. It starts with contacts that `avoid` did not ask."""
        found: dict[NodeKey, Entry] = {}
        params = {"target": key.to_bytes(ID_BITS // 8), "values": for_value}
        self.table.looked_up(key)

        def ask(contact: Contact) -> tuple[Sequence[Contact], bool]:
            reply = self._call(contact, "dht_find", params, max_body_bytes=MAX_ANSWER_BYTES if for_value else 0)
            try:
                contacts = contacts_in(reply.params.get("contacts"), BUCKET_SIZE)
                entries = self._entries_in(reply.body, key) if for_value else []
            except PeerFault as fault:
                self._blame(contact, fault)
                raise
            with self._lock:
                for entry in entries:
                    _keep_newest(found, entry)
            return contacts, bool(entries)

        known = self.table.closest(key, BUCKET_SIZE if avoid is None else 4 * BUCKET_SIZE)
        start = [each for each in known if avoid is None or not avoid.was_asked(each)][:BUCKET_SIZE]
        width = SEARCH_WIDTH if for_value else NUM_REPLICAS
        lookup = Lookup(key, self.own_key, start, width=width, for_value=for_value)
        run_lookup(lookup, ask, self.run, self._patience, time.monotonic() + timeout_s)
        with self._lock:
            return lookup, dict(found)

    def _entries_in(self, body: memoryview, key: int) -> list[Entry]:
        """The live records that a node gave for `key`. Raises RecordError or SignatureError for what is none, but not
        for one that has ended a moment ago: clocks differ a little.
        """
        try:
            page = _records.decode(body)
        except msgspec.DecodeError as error:
            raise RecordError(f"not a list of records: {error}") from None
        if len(page) > MAX_OWNERS_PER_KEY:
            raise RecordError(f"{len(page)} records under one id: at most {MAX_OWNERS_PER_KEY} are kept")
        entries = [self.values.entry_of(Signed.decode(data), late_s=CLOCKS_DIFFER_S) for data in page]
        for entry in entries:
            if entry.key != key:
                raise RecordError("a record that lies under another id")
            check_signature(entry)
        return [entry for entry in entries if self.values.is_live(entry)]

    def _call(
        self, contact: Contact, method: str, params: dict[str, Any], body: Sequence[bytes] = (), *, max_body_bytes: int
    ) -> Reply:
        """A call that the routing table and the deadlines learn from."""
        contact = self.table.get(contact.node_key) or contact  # as it said itself, rather than as somebody says
        params = self._with_endpoints(**params)
        timeout_s, began_s = self._patience.timeout_s, time.monotonic()
        try:
            reply = self._calls.call(contact, method, params, body, timeout_s=timeout_s, max_body_bytes=max_body_bytes)
        except SmartnodesError as error:
            if raised_by(error) is None and isinstance(error, PeerFault):
                self._blame(contact, error)
            elif raised_by(error) is None or method != "dht_store":  # who does not keep a record may be fine
                self.table.failed(contact.node_key)
            raise
        self._patience.measured(time.monotonic() - began_s)
        try:
            self.table.seen(Contact(contact.node_key, endpoints_in(reply.params.get("endpoints"))))
        except PeerFault as fault:
            self._blame(contact, fault)
            raise
        return reply

    def _blame(self, contact: Contact, fault: PeerFault) -> None:
        """Somebody else answers at its address, or it broke the protocol."""
        logger.info("%s is forgotten: %s", contact, fault)
        self.table.remove(contact.node_key)


def _keep_newest(found: dict[NodeKey, Entry], entry: Entry) -> None:
    known = found.get(entry.owner)
    if known is None or known.record.sequence < entry.record.sequence:
        found[entry.owner] = entry
