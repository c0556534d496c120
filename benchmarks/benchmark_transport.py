"""The transport beside raw TCP on the same loopback in the same run: call round trips, and one-way tensors.

    python benchmarks/benchmark_transport.py [--report FILE]

Each side is a process of its own. CPU seconds are those of both processes. Prints medians over `--rounds` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from smartnodes_core.identity import Identity
from smartnodes_core.nodes.authority import OpenAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.transport.base import Peer
from smartnodes_core.transport.tls import TlsTransport

TENSOR_BYTES = 16 << 20
CALL_BYTES = 4096


class Service:
    """What the far process serves: an echo, and what it has received and used."""

    def __init__(self, node: Node) -> None:
        self._memory = memoryview(bytearray(TENSOR_BYTES))
        self._received = threading.Semaphore(0)
        node.serve(self)
        node.on_stream("tensor", lambda peer, header, num_bytes: self._memory[:num_bytes], self._receive)

    def _receive(self, peer: Peer, header: dict[str, Any], body: memoryview) -> None:
        self._received.release()

    def rpc_echo(
        self, caller: Peer, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[memoryview]]:
        return {}, [body]

    def rpc_wait(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        for _ in range(params["count"]):
            self._received.acquire(timeout=60)
        return {"cpu_s": time.process_time()}


def make_node() -> Node:
    identity = Identity.create()
    node = Node(identity, None, TlsTransport(identity, None), OpenAuthority())
    node.start()
    return node


def receive_raw(server: socket.socket) -> None:
    """Reads tensors until the sender hangs up, then reports the CPU seconds used."""
    memory = memoryview(bytearray(TENSOR_BYTES))
    while True:
        tcp, _ = server.accept()
        with tcp:
            count = 0
            while received := tcp.recv_into(memory[count % TENSOR_BYTES :]):
                count += received
            tcp.sendall(json.dumps(time.process_time()).encode())


def far_process() -> None:
    node = make_node()
    Service(node)
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=receive_raw, args=(server,), daemon=True).start()
    sys.stdout.write(json.dumps({"endpoint": node.endpoint, "raw_port": server.getsockname()[1]}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    node.stop()


def time_calls(node: Node, far: bytes, count: int) -> list[float]:
    body, times_s = os.urandom(CALL_BYTES), []
    for _ in range(count):
        started_s = time.perf_counter()
        node.call(far, "echo", {}, [body])
        times_s.append(time.perf_counter() - started_s)
    return times_s


def time_stream(node: Node, far: bytes, count: int) -> tuple[float, float]:
    """GB/s and CPU seconds of both ends per GB."""
    body = os.urandom(TENSOR_BYTES)
    far_cpu_s = node.call(far, "wait", {"count": 0}).params["cpu_s"]
    cpu_s, started_s = time.process_time(), time.perf_counter()
    for _ in range(count):
        node.stream(far, "tensor", {}, [body])
    far_cpu_s = node.call(far, "wait", {"count": count}, timeout_s=60).params["cpu_s"] - far_cpu_s
    took_s, used_s = time.perf_counter() - started_s, time.process_time() - cpu_s + far_cpu_s
    gigabytes = count * TENSOR_BYTES / 1e9
    return gigabytes / took_s, used_s / gigabytes


def time_raw(port: int, count: int, far_cpu_s: float) -> tuple[float, float, float]:
    """As `time_stream` over plain TCP; also the far process's CPU seconds so far."""
    body = os.urandom(TENSOR_BYTES)
    with socket.create_connection(("127.0.0.1", port)) as tcp:
        cpu_s, started_s = time.process_time(), time.perf_counter()
        for _ in range(count):
            tcp.sendall(body)
        tcp.shutdown(socket.SHUT_WR)
        now_far_s = json.loads(tcp.recv(100))
        took_s, used_s = time.perf_counter() - started_s, time.process_time() - cpu_s + now_far_s - far_cpu_s
    gigabytes = count * TENSOR_BYTES / 1e9
    return gigabytes / took_s, used_s / gigabytes, now_far_s


def run(rounds: int, tensors: int) -> dict[str, Any]:
    far_side = subprocess.Popen(
        [sys.executable, __file__, "--far"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert far_side.stdout is not None
    where = json.loads(far_side.stdout.readline())
    node = make_node()
    far = node.connect(where["endpoint"]).node_key
    time_calls(node, far, 50)
    results: dict[str, list[float]] = {name: [] for name in ("call_ms", "ours_gb_s", "ours_cpu", "tcp_gb_s", "tcp_cpu")}
    for _ in range(rounds):
        results["call_ms"] += [each * 1000 for each in time_calls(node, far, 300)]
        speed, cpu = time_stream(node, far, tensors)
        results["ours_gb_s"].append(speed)
        results["ours_cpu"].append(cpu)
        far_cpu_s = node.call(far, "wait", {"count": 0}).params["cpu_s"]
        speed, cpu, _ = time_raw(where["raw_port"], tensors, far_cpu_s)
        results["tcp_gb_s"].append(speed)
        results["tcp_cpu"].append(cpu)
    node.stop()
    far_side.communicate("", timeout=10)
    medians = {name: round(statistics.median(values), 4) for name, values in results.items()}
    spread = {name: [round(min(values), 4), round(max(values), 4)] for name, values in results.items()}
    calls = sorted(results["call_ms"])
    return {
        "median": medians,
        "spread": spread,
        "call_ms_99": round(calls[int(len(calls) * 0.99)], 4),
        "of_raw_tcp": round(medians["ours_gb_s"] / medians["tcp_gb_s"], 3),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--far", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tensors", type=int, default=20, help="tensors of 16 MiB in a round")
    parser.add_argument("--report", help="write the figures to this JSON file")
    options = parser.parse_args()
    if options.far:
        far_process()
        return
    figures = run(options.rounds, options.tensors)
    if options.report:
        with open(options.report, "w") as file:
            json.dump(figures, file, indent=1)
    middle = figures["median"]
    print(f"{figures['machine']}")
    print(f"4 KB call            {middle['call_ms']:.3f} ms median, {figures['call_ms_99']:.3f} ms 99th percentile")
    print(f"16 MiB one way, ours {middle['ours_gb_s']:.2f} GB/s, {middle['ours_cpu']:.2f} CPU s/GB")
    print(f"16 MiB one way, TCP  {middle['tcp_gb_s']:.2f} GB/s, {middle['tcp_cpu']:.2f} CPU s/GB")
    print(f"ours / TCP           {figures['of_raw_tcp']:.2f}")


if __name__ == "__main__":
    main()
