"""What a relay costs: bytes a second through it beside a TCP connection of the same bytes, and a call's round trip.

    python benchmarks/benchmark_relay.py [--megabytes 512] [--calls 500]

Everything is on loopback, in one process for the relay's nodes: both ends and the relay share the machine's cores.
"""

from __future__ import annotations

import argparse
import platform
import socket
import statistics
import sys
import threading
import time

from smartnodes_core.identity import Identity
from smartnodes_core.nodes.authority import OpenAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.introducing import IntroductionDesk
from smartnodes_core.nodes.meeting import MeetingDesk
from smartnodes_core.transport.relay import Relay, RelayQuotas, join_circuit
from smartnodes_core.transport.tls import TlsTransport

CHUNK = bytes(1 << 20)
UNBOUND = RelayQuotas(peer_bytes=1 << 50, peer_bytes_per_s=100 << 30)


def rate(one: socket.socket, other: socket.socket, num_chunks: int) -> tuple[float, float]:
    """GB/s from `one` to `other`, and CPU seconds per GB of the whole process."""
    buffer = memoryview(bytearray(1 << 20))
    began_s, cpu_s = time.perf_counter(), time.process_time()
    sender = threading.Thread(target=lambda: [one.sendall(CHUNK) for _ in range(num_chunks)])
    sender.start()
    left = num_chunks * len(CHUNK)
    while left:
        left -= other.recv_into(buffer, min(left, len(buffer)))
    sender.join()
    num_gb = num_chunks * len(CHUNK) / 1e9
    return num_gb / (time.perf_counter() - began_s), (time.process_time() - cpu_s) / num_gb


def plain() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname()[:2])
        return one, server.accept()[0]


def relayed(relay: Relay) -> tuple[socket.socket, socket.socket]:
    one, other = (join_circuit(f"127.0.0.1:{relay.port}", token, 5.0) for token in relay.offer(b"o" * 32))
    return one, other


class Echo:
    def rpc_echo(self, caller, params, body):
        return {}, [bytes(body)]


def node(number: int, endpoint: str | None, relay: Relay | None = None) -> Node:
    identity = Identity.from_seed(bytes([number] * 32))
    made = Node(identity, None, TlsTransport(identity, None), OpenAuthority(), endpoint)
    IntroductionDesk(made, relay)
    MeetingDesk(made)
    made.serve(Echo())
    made.start()
    return made


def round_trip_ms(caller: Node, node_key: bytes, num_calls: int) -> float:
    body, times = bytes(4096), []
    for _ in range(num_calls):
        began_s = time.perf_counter()
        caller.call(node_key, "echo", {}, [body])
        times.append(time.perf_counter() - began_s)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--calls", type=int, default=500)
    options = parser.parse_args()
    say = sys.stdout.write
    say(f"{platform.machine()}, Python {platform.python_version()}, {options.megabytes} MB one way on loopback\n")
    relay = Relay("127.0.0.1:0", UNBOUND)
    relay.start()
    for name, pair in (("TCP", plain()), ("through the relay", relayed(relay))):
        gb_per_s, cpu_s = rate(*pair, options.megabytes)
        say(f"{name:18} {gb_per_s:6.2f} GB/s   {cpu_s:5.2f} CPU s/GB\n")
        for end in pair:
            end.close()
    public = node(1, "127.0.0.1:0", relay)
    others = [node(number, None) for number in (2, 3)]
    for other in others:
        other.connect(public.endpoint)
    began_s = time.perf_counter()
    others[0].call(others[1].node_key, "echo", {}, [b""])
    say(f"introduced and relayed after {time.perf_counter() - began_s:.2f} s\n")
    say(f"a 4 KB call directly      {round_trip_ms(others[0], public.node_key, options.calls):6.2f} ms (median)\n")
    say(f"a 4 KB call through it    {round_trip_ms(others[0], others[1].node_key, options.calls):6.2f} ms (median)\n")
    for each in (*others, public):
        each.stop()
    relay.stop()


if __name__ == "__main__":
    main()
