"""A node of a test, as a process: `nat_child.py SETTINGS`, JSON on standard input and output, a line each.

{"do": "connect", "endpoint"}   {"do": "call", "node", "text"}   {"do": "assess"}
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from smartnodes_core.errors import SmartnodesError
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.authority import OpenAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.introducing import IntroductionDesk
from smartnodes_core.nodes.meeting import MeetingDesk
from smartnodes_core.nodes.reachability import Reachability, assess
from smartnodes_core.rpc import Result
from smartnodes_core.transport.base import Peer
from smartnodes_core.transport.relay import Relay
from smartnodes_core.transport.tls import TlsTransport


class Echo:
    def rpc_echo(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        return {"from": caller.node_key.hex()}, [bytes(body)]


def main() -> None:
    settings = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    identity = Identity.from_seed(bytes([settings["number"]] * 32))
    node = Node(identity, None, TlsTransport(identity, None), OpenAuthority(), settings["endpoint"])
    relay = Relay(settings["relay"]) if "relay" in settings else None
    IntroductionDesk(node, relay)
    meetings = MeetingDesk(node)
    if relay is not None:
        relay.start()
    node.serve(Echo())
    node.start()
    introducers: list[bytes] = []
    reached: list[Reachability] = []

    def do(order: dict[str, Any]) -> dict[str, Any]:
        if order["do"] == "connect":
            introducers.append(node.connect(order["endpoint"]).node_key)
            return {}
        if order["do"] == "assess":
            found = assess(node, introducers)
            reached.append(found)
            return {"kind": found.kind, "endpoints": found.endpoints, "why": found.why}
        peer = bytes.fromhex(order["node"])
        for endpoint in order.get("endpoints", []):
            node.add_address(peer, endpoint)
        reply = node.call(peer, "echo", {}, [order["text"].encode() * order.get("times", 1)], timeout_s=20)
        route = meetings.route_to(peer)
        return {"num_bytes": len(reply.body), "from": reply.params["from"], "route": route.kind, "why": route.why}

    sys.stdout.write(json.dumps({"node": identity.node_key.hex()}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        try:
            told = do(json.loads(line))
        except SmartnodesError as error:
            told = {"error": str(error)}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
    for found in reached:
        found.close()
    node.stop()
    if relay is not None:
        relay.stop()


if __name__ == "__main__":
    main()
