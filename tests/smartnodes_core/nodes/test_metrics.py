"""What a node counts, and how it is reached, can be read by Prometheus, from this machine alone unless told so."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest

from smartnodes_core.counters import HELP, Counters
from smartnodes_core.errors import ConfigError, JobError, PortInUseError
from smartnodes_core.nodes.meeting import Route
from smartnodes_core.nodes.metrics import JobPages, MetricsServer
from smartnodes_core.nodes.reachability import Reachability

WORKER, VALIDATOR = b"w" * 32, b"v" * 32


@pytest.fixture
def station():
    routes = {WORKER: Route("relayed", "because"), VALIDATOR: Route("direct", "because")}
    peers = [SimpleNamespace(node_key=WORKER, role="worker"), SimpleNamespace(node_key=VALIDATOR, role="validator")]
    return SimpleNamespace(
        role="worker",
        node=SimpleNamespace(node_key=b"n" * 32, peers=lambda: peers),
        meetings=SimpleNamespace(route_to=routes.get),
        relay=SimpleNamespace(accounts=SimpleNamespace(num_circuits=2, num_bytes=4096)),
        reachability=Reachability("mapped", ("203.0.113.7:9000",), "by NAT-PMP the router gave it"),
    )


@pytest.fixture
def served(station):
    servers = []

    def serve(where="0"):
        servers.append(MetricsServer(station, where))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


def read(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_a_node_tells_peers_routes_relay_and_how_it_is_reached(served):
    text = read(served().port)
    assert 'smartnodes_peers{role="worker",route="relayed"} 1.0' in text
    assert 'smartnodes_peers{role="validator",route="direct"} 1.0' in text
    assert "smartnodes_relay_circuits 2.0" in text
    assert "smartnodes_relayed_bytes_total 4096.0" in text
    assert 'reached="mapped"' in text
    assert 'smartnodes_cpu_seconds_total{of="process"}' in text
    for name in HELP:
        assert f"# TYPE smartnodes_{name}_total counter" in text or f"# TYPE smartnodes_{name} counter" in text


def test_a_port_alone_is_on_loopback(served):
    server = served()
    assert server._server.server_address[0] == "127.0.0.1"
    with pytest.raises(PortInUseError, match="metrics cannot be served"):
        served(str(server.port))
    with pytest.raises(ConfigError):
        served("host:port")


def test_a_job_s_record_is_shown_to_programs_on_this_machine_alone(served, station):
    def find_job(job_id):
        if job_id != b"j" * 32:
            raise JobError("the record of this job is not found")
        return SimpleNamespace(summary=lambda: {"state": "open"})

    station.find_job = find_job
    port = served().port

    def ask(name):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/jobs/{name}", timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]

    assert ask((b"j" * 32).hex()) == (200, {"state": "open"})
    assert ask((b"k" * 32).hex()) == (404, "the record of this job is not found")
    assert "needed its id of 64 hexadecimal digits" in ask("xyz")[1]
    said = []
    pages = JobPages(station, lambda environ, answer: [b"metrics"])
    elsewhere = {"PATH_INFO": "/jobs/" + (b"j" * 32).hex(), "REMOTE_ADDR": "203.0.113.7"}
    [body] = pages(elsewhere, lambda status, headers: said.append(status))
    assert said == ["404 Not Found"]
    assert "on the node's machine alone" in json.loads(body)["error"]


def test_counters_count_by_label_and_know_their_names():
    counters = Counters()
    for role in ("worker", "user", "worker"):
        counters.add("connections", role)
    assert counters.read() == {("connections", "worker"): 2, ("connections", "user"): 1}
    with pytest.raises(KeyError):
        counters.add("unheard_of", "x")
