"""Where things lie in the DHT: the ids of nodes and of records, and how a node is named to others.

Ids are hashes of what is authenticated (a node key, a job's digest), so that nobody chooses where it sits but by trying
keys, each of which has to be registered on chain before anybody talks to it. The distance of two ids is their XOR
(Maymounkov and Mazières, Kademlia, 2002).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from smartnodes_core.errors import ConfigError, ProtocolError
from smartnodes_core.records import NodeKey, digest_of
from smartnodes_core.transport.base import split_endpoint

ID_BITS = 256
MAX_ENDPOINTS, MAX_ENDPOINT_CHARS = 4, 256


@lru_cache(maxsize=1 << 16)
def node_id(node_key: NodeKey) -> int:
    """Where a node sits, and where its announcement is kept."""
    return int.from_bytes(digest_of("dht node", node_key))


def job_id(job: bytes) -> int:
    """Where it is kept who has the record of a job."""
    return int.from_bytes(digest_of("dht job", job))


@dataclass(frozen=True)
class Contact:
    """A node and where it says that it is reached. Equal when the node key is."""

    node_key: NodeKey
    endpoints: tuple[str, ...] = field(compare=False)

    @property
    def id(self) -> int:
        return node_id(self.node_key)

    def __str__(self) -> str:
        return f"node {self.node_key.hex()[:8]}"

    def encode(self) -> list[object]:
        """As it travels."""
        return [self.node_key, list(self.endpoints)]


def contacts_in(value: object, most: int) -> list[Contact]:
    """The contacts that a peer sent, at most `most`. Raises ProtocolError."""
    if not isinstance(value, list) or len(value) > most:
        raise ProtocolError(f"a list of at most {most} contacts is needed, found {_shown(value)}")
    found = []
    for item in value:
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], bytes) or len(item[0]) != 32:
            raise ProtocolError("a contact is a node key of 32 bytes and a list of endpoints")
        found.append(Contact(item[0], endpoints_in(item[1])))
        if not found[-1].endpoints:
            raise ProtocolError("a contact without an endpoint cannot be reached")
    return found


def endpoints_in(value: object) -> tuple[str, ...]:
    """The endpoints that a peer sent, none for one that does not listen. Raises ProtocolError."""
    if not isinstance(value, list) or len(value) > MAX_ENDPOINTS:
        raise ProtocolError(f"a list of at most {MAX_ENDPOINTS} endpoints is needed, found {_shown(value)}")
    for item in value:
        if not isinstance(item, str) or len(item) > MAX_ENDPOINT_CHARS:
            raise ProtocolError(f"an endpoint is text of at most {MAX_ENDPOINT_CHARS} characters")
        try:
            split_endpoint(item)
        except ConfigError as error:  # ours to say of our settings, here it is the peer's
            raise ProtocolError(str(error)) from None
    return tuple(value)


def subnet_of(endpoints: Sequence[str]) -> str | None:
    """What one owner gets cheaply many addresses of: the /24 or /48 of the first endpoint, or its host's name.

    None for addresses that are nobody's in particular (loopback, private networks), which are not counted.
    """
    host, _ = split_endpoint(endpoints[0])
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower()
    if not address.is_global:
        return None
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 48), strict=False))


def _shown(value: object) -> str:
    return f"{len(value)}" if isinstance(value, list) else type(value).__name__
