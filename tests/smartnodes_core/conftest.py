"""A network of transports and nodes for tests, over TLS or in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from smartnodes_core.chain.signing import new_key
from smartnodes_core.identity import Identity, make_binding
from smartnodes_core.nodes.authority import Authority, OpenAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import Role, SignedBinding
from smartnodes_core.transport.base import Transport
from smartnodes_core.transport.memory import MemoryHub, MemoryTransport
from smartnodes_core.transport.tls import TlsTransport

CHAIN_ID, REGISTRY, NETWORK_ID = 31337, b"\x11" * 20, 7


class Party:
    """Makes identities, transports and nodes of one network, and stops the nodes."""

    chain_id, registry, network_id = CHAIN_ID, REGISTRY, NETWORK_ID

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.hub = MemoryHub()
        self._nodes: list[Node] = []

    def bind(self, identity: Identity, role: Role = "worker", **changes: Any) -> SignedBinding:
        expires_at_s = changes.pop("expires_at_s", int(time.time()) + 3600)
        terms = {"chain_id": CHAIN_ID, "registry": REGISTRY, "network_id": NETWORK_ID, **changes}
        return make_binding(identity, new_key(), role, expires_at_s=expires_at_s, **terms)

    def transport(self, identity: Identity, binding: SignedBinding | None, **options: Any) -> Transport:
        if self.kind == "tls":
            return TlsTransport(identity, binding, **options)
        return MemoryTransport(self.hub, identity, binding)

    def node(
        self,
        role: Role = "worker",
        authority: Authority | None = None,
        identity: Identity | None = None,
        **options: Any,
    ) -> Node:
        identity = identity or Identity.create()
        binding = self.bind(identity, role)
        transport = self.transport(identity, binding)
        node = Node(identity, binding, transport, authority or OpenAuthority(), **options)
        node.start()
        self._nodes.append(node)
        return node

    def stop(self) -> None:
        for node in self._nodes:
            node.stop()


@pytest.fixture(params=["memory", "tls"])
def party(request: pytest.FixtureRequest) -> Iterator[Party]:
    """Over both transports in turn."""
    made = Party(request.param)
    yield made
    made.stop()


@pytest.fixture
def tls_party() -> Iterator[Party]:
    made = Party("tls")
    yield made
    made.stop()


@pytest.fixture
def memory_party() -> Iterator[Party]:
    made = Party("memory")
    yield made
    made.stop()
