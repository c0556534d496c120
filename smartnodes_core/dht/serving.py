"""What a node of the DHT serves to the others.

    dht_ping                                     is somebody there?
    dht_find  {"target", "values"}               {"contacts": the nearest known} + records, if they are asked for
    dht_store + a signed record                  {"fresh"}: whether it is newer than what was kept here

Question and answer hold `endpoints`: where their sender is reached. Who names one is taken into the other's routing
table, for it has been admitted: its key, binding and registration were checked before its first call. Where a third
node is reached is what somebody says, and tried. A node that does not listen (a user's) names nothing, and only asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from smartnodes_core.dht.contacts import ID_BITS, MAX_ENDPOINTS, Contact, endpoints_in
from smartnodes_core.dht.routing import BUCKET_SIZE, RoutingTable
from smartnodes_core.dht.rules import MAX_RECORD_BYTES
from smartnodes_core.dht.values import ValueStore
from smartnodes_core.errors import AuthorityError, ProtocolError
from smartnodes_core.records import NodeKey, Role, Signed
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

MAX_SIGNED_BYTES = MAX_RECORD_BYTES + 256
#: The records of one answer; what is over it is found at another node.
MAX_ANSWER_BYTES = 4 * MAX_SIGNED_BYTES


class DhtService:
    """Keeps records and names contacts. `endpoints` gives where this node is reached (nothing: it only asks), `role_of`
    the role on chain of whoever signed a record that another passes on; None refuses it.
    """

    def __init__(
        self,
        table: RoutingTable,
        values: ValueStore,
        endpoints: Callable[[], Sequence[str]],
        role_of: Callable[[NodeKey], Role | None],
    ) -> None:
        self.table, self.values = table, values
        self._endpoints, self._role_of = endpoints, role_of

    @allow(max_body_bytes=0, passing=True)
    def rpc_dht_ping(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """Whether this node is there."""
        self._hear(caller, params)
        return self._with_endpoints()

    @allow(max_body_bytes=0, passing=True)
    def rpc_dht_find(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The contacts nearest to `target`, and with `values` the records under it."""
        self._hear(caller, params)
        target, with_values = params.get("target"), params.get("values", False)
        if not isinstance(target, bytes) or len(target) != ID_BITS // 8 or not isinstance(with_values, bool):
            raise ProtocolError(f"find takes target: {ID_BITS // 8} bytes, and values: true or false")
        key = int.from_bytes(target)
        nearest = [each for each in self.table.closest(key, BUCKET_SIZE + 1) if each.node_key != caller.node_key]
        reply = self._with_endpoints(contacts=[contact.encode() for contact in nearest[:BUCKET_SIZE]])
        return reply, [msgspec.msgpack.encode(self._page(key))] if with_values else []

    @allow(max_body_bytes=MAX_SIGNED_BYTES, passing=True)
    def rpc_dht_store(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """Keep a record, of the caller or passed on; whether it is newer than what was kept."""
        self._hear(caller, params)
        entry = self.values.entry_of(Signed.decode(body))
        role = caller.role if caller.node_key == entry.owner else self._role_of(entry.owner)
        if role != entry.role:
            found = f"is a {role}" if role else "is not registered, or blacklisted"
            raise AuthorityError(f"a {type(entry.record).__name__} of a {entry.role}, and who signed it {found}")
        return self._with_endpoints(fresh=self.values.store(entry))

    def _with_endpoints(self, **params: Any) -> dict[str, Any]:
        return {**params, "endpoints": list(self._endpoints())[:MAX_ENDPOINTS]}

    def _hear(self, caller: Peer, params: dict[str, Any]) -> None:
        endpoints = endpoints_in(params.get("endpoints"))
        if endpoints:
            self.table.seen(Contact(caller.node_key, endpoints))

    def _page(self, key: int) -> list[bytes]:
        page, num_bytes = [], 0
        for entry in self.values.entries(key):
            encoded = entry.signed.encode()
            num_bytes += len(encoded) + 5
            if num_bytes > MAX_ANSWER_BYTES:
                break
            page.append(encoded)
        return page
