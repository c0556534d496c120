"""The transport beside raw TCP and plain TLS on the same loopback in the same run: calls, and tensors one way and back.

    python benchmarks/benchmark_transport.py [--report FILE] [--congestion-control NAME] [--hivemind PYTHON]

Each side is a process of its own. CPU seconds are those of both processes. Prints medians over `--rounds` runs.
`--hivemind` names an interpreter that has hivemind installed; its own 4 MB echo is then measured beside ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from smartnodes_core.identity import Identity
from smartnodes_core.nodes.authority import OpenAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.transport.base import Peer
from smartnodes_core.transport.certificate import make_certificate
from smartnodes_core.transport.tls import TlsTransport

TENSOR_BYTES = 16 << 20
ECHO_BYTES = 4 << 20
CALL_BYTES = 4096
NUM_STRIPES = 4


class Service:
    """What the far process serves: echoes, and what it has received and used."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._memory = memoryview(bytearray(TENSOR_BYTES))
        self._received = threading.Semaphore(0)
        node.serve(self)
        node.on_stream("tensor", lambda peer, header, num_bytes: self._memory[:num_bytes], self._receive)
        node.on_stream("echo", lambda peer, header, num_bytes: self._memory[:num_bytes], self._echo)

    def _echo(self, peer: Peer, header: dict[str, Any], body: memoryview) -> None:
        self._node.stream(peer.node_key, "echoed", {}, [body])

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


def make_node(congestion_control: str = "", num_bulk_connections: int = 1) -> Node:
    identity = Identity.create()
    transport = TlsTransport(identity, None, congestion_control=congestion_control)
    node = Node(identity, None, transport, OpenAuthority(), num_bulk_connections=num_bulk_connections)
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


def echo_tls(server: socket.socket, context: ssl.SSLContext) -> None:
    """What plain TLS needs to send ECHO_BYTES and have them back: read them all, write them all."""
    memory = memoryview(bytearray(ECHO_BYTES))
    while True:
        tcp, _ = server.accept()
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(tcp, server_side=True) as tls:
            while read_whole(tls, memory):
                tls.sendall(memory)


def read_whole(tls: ssl.SSLSocket, memory: memoryview) -> bool:
    count = 0
    while count < len(memory):
        received = tls.recv_into(memory[count:])
        if not received:
            return False
        count += received
    return True


def server_context() -> ssl.SSLContext:
    key, certificate = make_certificate(Identity.create(), None)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pem"
        path.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + certificate.public_bytes(Encoding.PEM)
        )
        context.load_cert_chain(path)
    return context


def far_process(congestion_control: str) -> None:
    node = make_node(congestion_control)
    Service(node)
    raw, tls = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=receive_raw, args=(raw,), daemon=True).start()
    threading.Thread(target=echo_tls, args=(tls, server_context()), daemon=True).start()
    ports = {"raw_port": raw.getsockname()[1], "tls_port": tls.getsockname()[1]}
    sys.stdout.write(json.dumps({"endpoint": node.endpoint, **ports}) + "\n")
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


def time_echo(node: Node, far: bytes, count: int, back: threading.Semaphore) -> list[float]:
    """Milliseconds until a tensor of ECHO_BYTES has come back, each."""
    body, times_ms = os.urandom(ECHO_BYTES), []
    for _ in range(count):
        started_s = time.perf_counter()
        node.stream(far, "echo", {}, [body])
        back.acquire(timeout=60)
        times_ms.append((time.perf_counter() - started_s) * 1000)
    return times_ms


def time_tls_echo(port: int, count: int) -> list[float]:
    """As `time_echo` over plain TLS 1.3 of the standard library, blocking, whose server alone has a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    body, memory, times_ms = os.urandom(ECHO_BYTES), memoryview(bytearray(ECHO_BYTES)), []
    with socket.create_connection(("127.0.0.1", port)) as tcp:
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(tcp) as tls:
            for _ in range(count):
                started_s = time.perf_counter()
                tls.sendall(body)
                read_whole(tls, memory)
                times_ms.append((time.perf_counter() - started_s) * 1000)
    return times_ms


HIVEMIND = """
import asyncio, json, time
import hivemind
from hivemind.p2p import P2P
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse, Tensor

async def main():
    far, near = await P2P.create(), await P2P.create()
    async def echo(requests, context):
        async for request in requests:
            for tensor in request.tensors:
                yield ExpertResponse(tensors=[tensor])
    await far.add_protobuf_handler("echo", echo, ExpertRequest, stream_input=True, stream_output=True)
    near2 = await P2P.create(initial_peers=await far.get_visible_maddrs())
    body = bytes(4 << 20)
    part = 1 << 20
    async def parts():
        for at in range(0, len(body), part):
            yield ExpertRequest(uid="x", tensors=[Tensor(buffer=body[at:at + part])])
    times = []
    for _ in range(20):
        started = time.perf_counter()
        count = 0
        async for answer in await near2.iterate_protobuf_handler(far.peer_id, "echo", parts(), ExpertResponse):
            count += sum(len(tensor.buffer) for tensor in answer.tensors)
        assert count == len(body), count
        times.append((time.perf_counter() - started) * 1000)
    print(json.dumps(sorted(times)[len(times) // 2]))
    for each in (near, near2, far):
        await each.shutdown()

asyncio.run(main())
"""


def time_hivemind(python: str) -> float | None:
    """The median milliseconds of hivemind's echo of 4 MiB; None, with its complaint printed, when it does not run."""
    done = subprocess.run([python, "-c", HIVEMIND], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr[-2000:])
        return None
    return float(json.loads(done.stdout.splitlines()[-1]))


def run(rounds: int, tensors: int, congestion_control: str) -> dict[str, Any]:
    arguments = [sys.executable, __file__, "--far", "--congestion-control", congestion_control]
    far_side = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert far_side.stdout is not None
    where = json.loads(far_side.stdout.readline())
    node, striped = make_node(congestion_control), make_node(congestion_control, NUM_STRIPES)
    back = threading.Semaphore(0)
    memory = memoryview(bytearray(ECHO_BYTES))
    node.on_stream("echoed", lambda peer, header, num_bytes: memory[:num_bytes], lambda *_: back.release())
    far = node.connect(where["endpoint"]).node_key
    striped.connect(where["endpoint"])
    time_calls(node, far, 50)
    time_stream(node, far, 1)
    time_stream(striped, far, 1)
    results: dict[str, list[float]] = {}

    def keep(**values: float | list[float]) -> None:
        for name, value in values.items():
            results.setdefault(name, []).extend(value if isinstance(value, list) else [value])

    for _ in range(rounds):
        keep(call_ms=[each * 1000 for each in time_calls(node, far, 300)])
        keep(echo_ms=time_echo(node, far, tensors, back))
        keep(tls_echo_ms=time_tls_echo(where["tls_port"], tensors))
        for name, each in (("one", node), ("striped", striped)):
            speed, cpu = time_stream(each, far, tensors)
            keep(**{f"{name}_gb_s": speed, f"{name}_cpu": cpu})
        far_cpu_s = node.call(far, "wait", {"count": 0}).params["cpu_s"]
        speed, cpu, _ = time_raw(where["raw_port"], tensors, far_cpu_s)
        keep(tcp_gb_s=speed, tcp_cpu=cpu)
    node.stop()
    striped.stop()
    far_side.communicate("", timeout=10)
    medians = {name: round(statistics.median(values), 4) for name, values in results.items()}
    spread = {name: [round(min(values), 4), round(max(values), 4)] for name, values in results.items()}
    calls = sorted(results["call_ms"])
    return {
        "median": medians,
        "spread": spread,
        "call_ms_99": round(calls[int(len(calls) * 0.99)], 4),
        "of_raw_tcp": round(medians["one_gb_s"] / medians["tcp_gb_s"], 3),
        "of_tls_echo": round(medians["echo_ms"] / medians["tls_echo_ms"], 3),
        "congestion_control": congestion_control or "the system's",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--far", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tensors", type=int, default=20, help="tensors of 16 MiB in a round")
    parser.add_argument("--congestion-control", default="", help="of both ends; empty leaves the system's")
    parser.add_argument("--hivemind", metavar="PYTHON", help="an interpreter with hivemind, to measure it beside")
    parser.add_argument("--report", help="write the figures to this JSON file")
    options = parser.parse_args()
    if options.far:
        far_process(options.congestion_control)
        return
    figures = run(options.rounds, options.tensors, options.congestion_control)
    if options.hivemind:
        figures["hivemind_echo_ms"] = time_hivemind(options.hivemind)
    if options.report:
        with open(options.report, "w") as file:
            json.dump(figures, file, indent=1)
    middle = figures["median"]
    print(f"{figures['machine']}, congestion control: {figures['congestion_control']}")
    print(f"4 KB call            {middle['call_ms']:.3f} ms median, {figures['call_ms_99']:.3f} ms 99th percentile")
    print(f"4 MiB echo, ours     {middle['echo_ms']:.2f} ms, {figures['of_tls_echo']:.2f} of plain TLS")
    print(f"4 MiB echo, TLS      {middle['tls_echo_ms']:.2f} ms")
    if figures.get("hivemind_echo_ms"):
        print(f"4 MiB echo, hivemind {figures['hivemind_echo_ms']:.2f} ms")
    for name, label in (
        ("one", "one connection "),
        ("striped", f"{NUM_STRIPES} connections  "),
        ("tcp", "raw TCP        "),
    ):
        speed, cpu = middle[f"{name}_gb_s"], middle[f"{name}_cpu"]
        print(
            f"16 MiB one way, {label} {speed:.2f} GB/s, {cpu:.2f} CPU s/GB, {speed / middle['tcp_gb_s']:.2f} of raw TCP"
        )


if __name__ == "__main__":
    main()
