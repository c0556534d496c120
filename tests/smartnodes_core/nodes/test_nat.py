"""Two rigs at home, behind routers that translate addresses, reach each other; who introduces them sees ciphertext."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD, ROUTER = (Path(__file__).with_name(name) for name in ("nat_child.py", "nat_pmp_router.py"))
SECRET = "the gradient of somebody's model; "
SNIFF = """
import socket, sys
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
tap.settimeout(0.2)
with open(sys.argv[1], "wb", buffering=0) as file:
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    while True:
        try:
            file.write(tap.recv(65536))
        except TimeoutError:
            pass
"""


class Rig:
    def __init__(self, net, place, number, folder, **settings):
        self.log = folder / f"{place}.log"
        with open(self.log, "w") as log:
            self.process = net.popen(
                place,
                [sys.executable, str(CHILD), json.dumps({"number": number, **settings})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.node = self._read()["node"]

    def do(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        told = self._read()
        assert "error" not in told, f"{told['error']}\n{self.log.read_text()[-3000:]}"
        return told

    def _read(self):
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        return json.loads(line)


def neighbourhood(net, folder, **public):
    """A public node, and two rigs at home that are connected to it."""
    server = Rig(net, "public0", 1, folder, endpoint="203.0.113.50:9000", **public)
    rigs = [Rig(net, f"home{side}", number, folder, endpoint="0.0.0.0:9100") for number, side in ((2, "A"), (3, "B"))]
    for rig in rigs:
        rig.do(do="connect", endpoint="203.0.113.50:9000")
    return server, *rigs


def test_rigs_behind_routers_that_keep_ports_meet_directly(homes, tmp_path):
    net = homes(symmetric=False)
    server, one, other = neighbourhood(net, tmp_path)
    told = one.do(do="assess")
    assert told["kind"] == "introduced"
    assert told["endpoints"] == ["192.168.1.2:9100"]
    assert "203.0.113.11" in told["why"]
    told = one.do(do="call", node=other.node, endpoints=["192.168.2.2:9100"], text=SECRET, times=1000)
    assert (told["route"], told["from"], told["num_bytes"]) == ("punched", one.node, len(SECRET) * 1000)
    server.process.kill()  # nobody is between them
    assert other.do(do="call", node=one.node, text="back")["route"] == "punched"


def test_rigs_behind_routers_that_change_ports_meet_through_a_relay_that_sees_ciphertext(homes, tmp_path):
    net = homes(symmetric=True)
    capture = tmp_path / "capture"
    sniffer = net.popen(
        "public0",
        [sys.executable, "-c", SNIFF, str(capture)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert sniffer.stdout.readline() == "ready\n"
    _, one, other = neighbourhood(net, tmp_path, relay="203.0.113.50:9001")
    told = one.do(do="call", node=other.node, endpoints=["192.168.2.2:9100"], text=SECRET, times=10_000)
    assert (told["route"], told["from"]) == ("relayed", one.node)
    assert "another port" in told["why"]  # it says why it was not met directly
    seen = capture.read_bytes()
    assert len(seen) > 4 * len(SECRET) * 10_000  # there and back, in and out
    assert SECRET.encode() not in seen
    assert b"SNR1" in seen  # it is there that what is not encrypted can be read


def test_a_rig_that_a_validator_reaches_says_so(homes, tmp_path):
    net = homes(symmetric=False, num_public=2)
    Rig(net, "public0", 1, tmp_path, endpoint="203.0.113.50:9000")
    rig = Rig(net, "public1", 2, tmp_path, endpoint="0.0.0.0:9100")
    rig.do(do="connect", endpoint="203.0.113.50:9000")
    told = rig.do(do="assess")
    assert (told["kind"], told["endpoints"]) == ("direct", ["203.0.113.51:9100"])


def test_a_router_that_gives_ports_makes_a_rig_dialled(homes, tmp_path):
    net = homes(symmetric=True)
    router = net.popen(
        "routerA", [sys.executable, str(ROUTER), "203.0.113.11", "to-inet"], stdout=subprocess.PIPE, text=True
    )
    assert router.stdout.readline() == "ready\n"
    _, one, other = neighbourhood(net, tmp_path)
    told = one.do(do="assess")
    assert (told["kind"], told["endpoints"]) == ("mapped", ["203.0.113.11:40000", "192.168.1.2:9100"])
    assert "by NAT-PMP the router gave 203.0.113.11:40000" in told["why"]
    told = other.do(do="call", node=one.node, endpoints=told["endpoints"][:1], text=SECRET)
    assert told["route"] == "direct"
    one.process.stdin.close()
    assert one.process.wait(20) == 0  # and gives its port back
    assert "40000" not in net.run("routerA", "iptables", "-t", "nat", "-S")


def test_without_a_relay_the_error_says_what_was_tried(homes, tmp_path):
    net = homes(symmetric=True)
    _, one, other = neighbourhood(net, tmp_path)
    with pytest.raises(AssertionError, match=r"punch through .* another port.*does not relay"):
        one.do(do="call", node=other.node, endpoints=["192.168.2.2:9100"], text="x")
