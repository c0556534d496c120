"""A node's state for Prometheus, read when somebody asks: nothing is collected in between. And, for programs on the
same machine alone, the record of a job that the node looks up: at /jobs/ID, as JSON.

Counters are those of `counters.py`, bytes and CPU seconds those of `usage.py`; what is so now (peers, circuits, how
this node is reached) is asked of the station.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from typing import Any

from smartnodes_core.counters import COUNTERS, HELP
from smartnodes_core.errors import AuthorityError, ConfigError, PortInUseError, SmartnodesError
from smartnodes_core.jobs import job_named
from smartnodes_core.nodes.station import Station
from smartnodes_core.transport.base import split_endpoint
from smartnodes_core.usage import USAGE

PREFIX = "smartnodes"
JOBS = "/jobs/"


class StationCollector:
    """A `prometheus_client` collector."""

    def __init__(self, station: Station) -> None:
        self._station = station

    def collect(self) -> Iterator[Any]:
        """Every family, those without samples too, so that what may come is known from the start."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        counts = COUNTERS.read()
        for name, (label, text) in HELP.items():
            family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=[label])
            for (counted, value), count in sorted(counts.items()):
                if counted == name:
                    family.add_metric([value], count)
            yield family
        yield from self._usage(CounterMetricFamily)
        station = self._station
        peers = GaugeMetricFamily(f"{PREFIX}_peers", "peers that are connected now", labels=["role", "route"])
        for (role, route), count in sorted(self._peers().items()):
            peers.add_metric([role, route], count)
        yield peers
        if station.relay is not None:
            circuits = station.relay.accounts
            yield GaugeMetricFamily(f"{PREFIX}_relay_circuits", "circuits open now", circuits.num_circuits)
            yield CounterMetricFamily(f"{PREFIX}_relayed_bytes", "bytes passed on for others", circuits.num_bytes)
        reached = station.reachability
        info = {"role": station.role, "node_key": station.node.node_key.hex()}
        if reached is not None:
            info |= {"reached": reached.kind, "why": reached.why, "endpoint": reached.endpoints[0]}
        yield InfoMetricFamily(f"{PREFIX}_node", "who this is and how others reach it", value=info)

    def _usage(self, counter: Any) -> Iterator[Any]:
        transferred = counter(f"{PREFIX}_bytes", "bytes to and from peers", labels=["direction"])
        cpu = counter(
            f"{PREFIX}_cpu_seconds", "CPU time, of the whole process and of what the network adds", labels=["of"]
        )
        for name, amount in sorted(USAGE.read().items()):
            if name.endswith("_bytes"):
                transferred.add_metric([name.removesuffix("_bytes")], amount)
            elif name.endswith("_ns"):
                cpu.add_metric([name.removesuffix("_ns")], amount / 1e9)
        yield transferred
        yield cpu

    def _peers(self) -> Counter[tuple[str, str]]:
        station = self._station
        return Counter(
            (peer.role or "none", station.meetings.route_to(peer.node_key).kind) for peer in station.node.peers()
        )


Answer = Callable[[str, list[tuple[str, str]]], object]


class JobPages:
    """A WSGI application that answers /jobs/ID, and passes everything else on to `rest`."""

    def __init__(self, station: Station, rest: Callable[[dict[str, Any], Answer], Iterable[bytes]]) -> None:
        self._station, self._rest = station, rest

    def __call__(self, environ: dict[str, Any], answer: Answer) -> Iterable[bytes]:
        path = str(environ.get("PATH_INFO", ""))
        if not path.startswith(JOBS):
            return self._rest(environ, answer)
        status, found = self._find(path.removeprefix(JOBS), str(environ.get("REMOTE_ADDR", "")))
        answer(status, [("Content-Type", "application/json")])
        return [json.dumps(found).encode()]

    def _find(self, name: str, asker: str) -> tuple[str, dict[str, Any]]:
        try:
            if not ip_address(asker).is_loopback:
                raise AuthorityError("jobs are shown to programs on the node's machine alone")
            return "200 OK", self._station.find_job(job_named(name)).summary()
        except SmartnodesError as error:
            return "404 Not Found", {"error": str(error)}


class MetricsServer:
    """Serves metrics at `where`: "port" (on loopback) or "host:port". Raises PortInUseError, ConfigError."""

    def __init__(self, station: Station, where: str) -> None:
        from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

        host, port = split_endpoint(where if ":" in where else f"127.0.0.1:{where}")
        registry = CollectorRegistry()
        registry.register(StationCollector(station))
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except PermissionError:
            raise ConfigError(f"port {port} may not be opened by this user: choose one over 1023 for metrics") from None
        except OSError as error:
            raise PortInUseError(f"metrics cannot be served at {host}:{port}: {error.strerror}") from None
        self._server.set_app(JobPages(station, make_wsgi_app(registry)))
        self.port = int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)
