"""The in-process twin of a node's calls: the same methods, rules, caps and errors, without a connection or a thread.

A thousand nodes of a DHT fit so into one process. Parameters travel as the header of a frame, encoded and decoded.
`MemoryDht` is the network; it can lose calls, and nodes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from smartnodes_core.dht.contacts import Contact
from smartnodes_core.errors import DeadlineError, PeerUnreachableError, ProtocolError, SmartnodesError
from smartnodes_core.records import NodeKey, Role
from smartnodes_core.remote_errors import from_wire, to_wire
from smartnodes_core.rpc import Reply
from smartnodes_core.rpc.serving import Method, methods_of
from smartnodes_core.transport.base import Peer
from smartnodes_core.wire import PREFIX_BYTES, Buffer, byte_views, decode_header, encode_prefix_and_header


class MemoryDht:
    """Nodes that call each other. Of calls, `lost` (0 to 1) get no answer: half of these were carried out."""

    def __init__(self, lost: float = 0.0, rng: random.Random | None = None) -> None:
        self.lost, self._rng = lost, rng or random.Random(0)
        self._served: dict[NodeKey, tuple[dict[str, Method], Role]] = {}
        self.num_calls = 0

    def serve(self, node_key: NodeKey, obj: object, role: Role) -> None:
        """Lets the others call the methods of `obj` named `rpc_…`."""
        self._served[node_key] = (methods_of(obj), role)

    def vanish(self, node_key: NodeKey) -> None:
        """A node is gone, and does not say so."""
        del self._served[node_key]

    def role_of(self, node_key: NodeKey) -> Role | None:
        """As the chain would say it."""
        served = self._served.get(node_key)
        return served[1] if served is not None else None

    def calls_of(self, node_key: NodeKey, role: Role) -> MemoryCalls:
        """What the node `node_key` calls others with."""
        return MemoryCalls(self, Peer(node_key, None, role, f"memory:{node_key.hex()[:8]}"))


class MemoryCalls:
    """See `asking.Calls`. A call runs on the caller's thread."""

    def __init__(self, network: MemoryDht, caller: Peer) -> None:
        self._network, self._caller = network, caller

    def call(
        self,
        contact: Contact,
        method: str,
        params: dict[str, Any],
        body: Sequence[Buffer] = (),
        *,
        timeout_s: float,
        max_body_bytes: int,
    ) -> Reply:
        """See `Calls`."""
        network = self._network
        network.num_calls += 1
        served = network._served.get(contact.node_key)
        if served is None:
            raise PeerUnreachableError(f"{contact} cannot be reached")
        lost = network.lost and network._rng.random() < network.lost
        if lost and network._rng.random() < 0.5:
            raise DeadlineError(f"{contact} did not answer {method}")
        data = memoryview(b"".join(byte_views(body)))
        try:
            result = self._deliver(served[0], method, _carried(params), data)
        except SmartnodesError as error:
            raise from_wire(dict(to_wire(error)), str(contact), contact.node_key) from None
        if lost:
            raise DeadlineError(f"{contact} did not answer {method} in {timeout_s:g} s")
        reply_params, reply_body = result if isinstance(result, tuple) else (result or {}, ())
        reply = Reply(_carried(reply_params), memoryview(b"".join(byte_views(reply_body))))
        if reply.body.nbytes > max_body_bytes:
            raise ProtocolError(
                f"{contact} answered with {reply.body.nbytes} bytes, at most {max_body_bytes} are taken"
            )
        return reply

    def _deliver(self, methods: dict[str, Method], name: str, params: dict[str, Any], body: memoryview) -> Any:
        method = methods.get(name)
        if method is None:
            raise ProtocolError(f"there is no method {name!r} here")
        method.check(self._caller, params, body.nbytes)
        return method.handler(self._caller, params, body)


def _carried(params: dict[str, Any]) -> dict[str, Any]:
    return decode_header(encode_prefix_and_header(params, 0)[PREFIX_BYTES:])
