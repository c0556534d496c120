"""`tensorlink status --node` says what a running node says of itself."""

from __future__ import annotations

import http.server
import threading
from types import SimpleNamespace

import pytest

from smartnodes_core.errors import PeerUnreachableError, ProtocolError
from smartnodes_core.nodes.meeting import Route
from smartnodes_core.nodes.metrics import MetricsServer
from smartnodes_core.nodes.reachability import Reachability
from tensorlink.cli.status import node_rows


@pytest.fixture
def port():
    peer = SimpleNamespace(node_key=b"v" * 32, role="validator")
    station = SimpleNamespace(
        role="worker",
        node=SimpleNamespace(node_key=b"n" * 32, peers=lambda: [peer]),
        meetings=SimpleNamespace(route_to=lambda key: Route("direct", "because")),
        relay=None,
        reachability=Reachability("introduced", ("192.168.1.2:9000",), 'the router gave no port: "none"'),
    )
    server = MetricsServer(station, "0")
    yield server.port
    server.close()


def test_who_it_is_how_it_is_reached_and_who_is_connected(port):
    rows = list(node_rows(str(port)))
    assert rows[0] == f"worker {(b'n' * 32).hex()}"
    assert rows[1] == 'reached at 192.168.1.2:9000, introduced: the router gave no port: "none"'
    assert "peers: validator direct 1" in rows


def test_a_node_that_is_not_there_and_what_is_no_node_are_told_apart():
    with pytest.raises(PeerUnreachableError, match=r"start it with --metrics 127.0.0.1:9"):
        list(node_rows("127.0.0.1:9"))
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=other.serve_forever, args=(0.05,), daemon=True).start()
    with pytest.raises(ProtocolError, match="no node's metrics"):
        list(node_rows(str(other.server_address[1])))
    other.shutdown()
    other.server_close()
