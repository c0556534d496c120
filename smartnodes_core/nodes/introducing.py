"""Introduces peers to each other that cannot dial each other, and tells a peer how it is seen from here.

Both have to be connected to this node, as everybody is to some validator. How they then meet is in `meeting.py`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from smartnodes_core.errors import BusyError, PeerUnreachableError, Unavailable
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.params import count_in, digest_in
from smartnodes_core.records import NodeKey
from smartnodes_core.rpc import allow
from smartnodes_core.transport.base import Peer, join_endpoint, split_endpoint
from smartnodes_core.transport.relay import Relay
from smartnodes_core.transport.tcp import open_tcp

INTRODUCE_TIMEOUT_S = 5.0
DIAL_BACK_S = 2.0
#: So many ports are looked at for a peer in a minute.
MAX_DIALS_BACK = 6


class IntroductionDesk:
    """`relay` is this node's own, if it has one; without it peers are told each other's address only."""

    def __init__(self, node: Node, relay: Relay | None = None) -> None:
        self._node, self._relay = node, relay
        self._lock = threading.Lock()
        self._dialled_back_s: dict[NodeKey, list[float]] = {}
        node.serve(self)

    @allow(max_body_bytes=0)
    def rpc_observe(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """From which address this node sees the caller, which dialled it; whether it relays; its clock (Unix time)."""
        return {"endpoint": caller.endpoint, "relays": self._relay is not None, "now_s": int(time.time())}

    @allow(max_body_bytes=0)
    def rpc_dial_back(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """Whether a port of the caller's own address can be reached from here; nobody else's is tried."""
        port, now_s = count_in(params, "port", 65535), time.monotonic()
        with self._lock:
            looked = {key: [at_s for at_s in all_s if now_s - at_s < 60] for key, all_s in self._dialled_back_s.items()}
            self._dialled_back_s = {key: all_s for key, all_s in looked.items() if all_s}
            mine = self._dialled_back_s.setdefault(caller.node_key, [])
            if len(mine) >= MAX_DIALS_BACK:
                raise BusyError(f"{len(mine)} ports were looked at for you in the last minute: ask again later")
            mine.append(now_s)
        host, _ = split_endpoint(caller.endpoint)
        try:
            open_tcp(join_endpoint(host, port), DIAL_BACK_S).close()
        except Unavailable as error:
            return {"reached": False, "why": str(error)}
        return {"reached": True, "why": ""}

    @allow(max_body_bytes=0)
    def rpc_punch(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """Tells the caller and a peer of ours each other's address, as seen from here, so that both connect now."""
        target = self._connected(digest_in(params, "node"))
        self._node.call(
            target.node_key,
            "meet",
            {"node": caller.node_key, "endpoint": caller.endpoint},
            timeout_s=INTRODUCE_TIMEOUT_S,
        )
        return {"endpoint": target.endpoint}

    @allow(max_body_bytes=0)
    def rpc_circuit(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """Gives the caller and a peer of ours the two ends of a circuit. Raises BusyError over the relay's quotas."""
        if self._relay is None:
            raise PeerUnreachableError("this node does not relay")
        target = self._connected(digest_in(params, "node"))
        mine, theirs = self._relay.offer(caller.node_key)
        offer = {"node": caller.node_key, "port": self._relay.port, "token": theirs}
        self._node.call(target.node_key, "join_circuit", offer, timeout_s=INTRODUCE_TIMEOUT_S)
        return {"port": self._relay.port, "token": mine}

    def _connected(self, node_key: NodeKey) -> Peer:
        for peer in self._node.peers():
            if peer.node_key == node_key:
                return peer
        raise PeerUnreachableError(f"node {node_key.hex()[:16]} is not connected here")
