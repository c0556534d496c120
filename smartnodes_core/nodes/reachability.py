"""How others reach this node, found out at its start: what a validator sees, dialling back, and a port of the router.

In this order: directly; through a port that the router gives away (`transport/mapping.py`); else by introduction
(`meeting.py`), which needs nothing here. The result says which it is and why, in words.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smartnodes_core.errors import PeerUnreachableError, SmartnodesError
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.params import text_in
from smartnodes_core.records import NodeKey
from smartnodes_core.transport.base import join_endpoint, split_endpoint
from smartnodes_core.transport.mapping import PortMapping, map_port

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 8.0


@dataclass(frozen=True)
class Reachability:
    """`kind` is "direct", "mapped", "introduced" or "unknown", `why` says why so; `endpoints` are to be announced, the
    best first.
    """

    kind: str
    endpoints: tuple[str, ...]
    why: str
    mapping: PortMapping | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}"

    def close(self) -> None:
        """Gives the router's port back."""
        if self.mapping is not None:
            self.mapping.close()


def assess(
    node: Node,
    validators: Sequence[NodeKey],
    *,
    may_map: bool = True,
    mapper: Callable[[int], PortMapping] = map_port,
) -> Reachability:
    """Asks the first of `validators`, to which `node` is connected, that answers. Never raises SmartnodesError: what
    is not found out is said. A node on loopback is not asked about.
    """
    host, port = split_endpoint(node.endpoint)
    if ipaddress.ip_address(host).is_loopback:
        return Reachability("direct", (node.endpoint,), "it listens on loopback, for this machine alone")
    kind, why = "unknown", "there is no other validator to be asked"
    for validator in validators:
        try:
            seen = text_in(node.call(validator, "observe", timeout_s=ASK_TIMEOUT_S).params, "endpoint")
            return _assess(node, validator, split_endpoint(seen)[0], host, port, mapper if may_map else None)
        except SmartnodesError as error:
            kind, why = "introduced", f"a validator could not be asked: {error}"
            logger.info("reachability: %s", why)
    return Reachability(kind, _inside(node, host, port), why)


def _assess(
    node: Node, validator: NodeKey, seen_host: str, host: str, port: int, mapper: Callable[[int], PortMapping] | None
) -> Reachability:
    inside = _inside(node, host, port)
    outside = join_endpoint(seen_host, port)
    failure = _dialled_back(node, validator, port)
    if failure is None:
        return Reachability("direct", _distinct(outside, *inside), f"a validator reached {outside}")
    why = f"a validator sees this machine at {seen_host} and does not reach port {port} there ({failure})"
    if mapper is None:
        return Reachability("introduced", inside, f"{why}; the router was not asked for a port (port_mapping)")
    try:
        mapping = mapper(port)
    except PeerUnreachableError as error:
        return Reachability("introduced", inside, f"{why}; the router gave no port: {error}")
    mapped_host, mapped_port = split_endpoint(mapping.endpoint)
    failure = _dialled_back(node, validator, mapped_port)
    if mapped_host == seen_host and failure is None:
        endpoints = _distinct(mapping.endpoint, *inside)
        return Reachability(
            "mapped", endpoints, f"{why}; by {mapping.means} the router gave {mapping.endpoint}", mapping
        )
    mapping.close()
    found = failure or f"a validator sees {seen_host}: there is another router behind it"
    return Reachability(
        "introduced", inside, f"{why}; the router gave {mapping.endpoint}, which does not help ({found})"
    )


def _dialled_back(node: Node, validator: NodeKey, port: int) -> str | None:
    """None where the validator reached that port of ours, else why not. Raises SmartnodesError where it is not told."""
    told = node.call(validator, "dial_back", {"port": port}, timeout_s=ASK_TIMEOUT_S).params
    return None if told.get("reached") is True else text_in(told, "why", "no reason given")


def _inside(node: Node, host: str, port: int) -> tuple[str, ...]:
    """Where this node is reached from its own network: the address it listens on, or those it goes out from."""
    if not ipaddress.ip_address(host).is_unspecified:
        return (node.endpoint,)
    addresses = [node.local_address_to(peer.node_key) for peer in node.peers()]
    return tuple(sorted({join_endpoint(address[0], port) for address in addresses if address})) or (node.endpoint,)


def _distinct(*endpoints: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(endpoints))
