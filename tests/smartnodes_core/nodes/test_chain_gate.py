"""The chain behind its gate is served to machines that showed the owner's secret, and to nobody else."""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from smartnodes_core.errors import AuthorityError, ChainUnreachableError, ProtocolError
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.chain_gate import ChainDoor, ChainGate

SECRET = b"s" * 16


class Chain(BaseHTTPRequestHandler):
    """Answers every request with itself."""

    def do_POST(self) -> None:
        body = b"answer to " + self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def chain():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chain)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def make_gate(chain, tmp_path):
    made = []

    def make(rpc_url=None):
        identity = Identity.from_seed(bytes([1] * 32))
        members = tmp_path / "machines.json"
        gate = ChainGate(
            identity, "127.0.0.1:0", rpc_url or chain, SECRET, members, lambda number: {"account": 4 + number}
        )
        gate.start()
        made.append(gate)
        return gate

    yield make
    for gate in made:
        gate.stop()


@pytest.fixture
def make_door():
    made = []

    def make(gate, number=2):
        door = ChainDoor(Identity.from_seed(bytes([number] * 32)), gate.node.endpoint, gate.node.node_key)
        made.append(door)
        return door

    yield make
    for door in made:
        door.close()


def test_a_machine_that_shows_the_secret_speaks_to_the_chain(make_gate, make_door):
    door = make_door(make_gate())
    assert door.join(SECRET) == {"account": 4}
    url = door.open()
    assert requests.post(url, data=b'{"id": 1}', timeout=10).content == b'answer to {"id": 1}'


def test_each_machine_keeps_its_number_also_when_the_gate_is_opened_again(make_gate, make_door):
    def number_of(machine):
        door = make_door(gate, machine)
        try:
            return door.join(SECRET)["account"]
        finally:
            door.close()

    gate = make_gate()
    assert [number_of(machine) for machine in (2, 3, 2)] == [4, 5, 4]
    gate = make_gate()
    assert [number_of(machine) for machine in (4, 3)] == [6, 5]
    door = make_door(gate, 2)  # joined before this gate was opened
    assert requests.post(door.open(), data=b"x", timeout=10).content == b"answer to x"


def test_a_wrong_secret_is_refused_and_the_chain_stays_shut(make_gate, make_door):
    door = make_door(make_gate())
    with pytest.raises(AuthorityError, match="not that of this network"):
        door.join(b"t" * 16)
    with pytest.raises(ProtocolError):
        door.join(b"t" * 65)
    with pytest.raises(AuthorityError, match="has not joined"):
        door._ask(b"x")
    assert requests.post(door.open(), data=b"x", timeout=10).status_code == 502


def test_web_pages_and_oversize_requests_are_refused_at_the_door(make_gate, make_door):
    door = make_door(make_gate())
    door.join(SECRET)
    url = door.open()
    assert requests.post(url, data=b"x", headers={"Origin": "https://evil.example"}, timeout=10).status_code == 400
    client = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    client.putrequest("POST", "/")
    client.putheader("Content-Length", str(2 << 20))
    client.endheaders()
    assert client.getresponse().status == 400
    client.close()


def test_a_gate_with_another_key_than_the_codes_is_refused(make_gate, make_door):
    gate = make_gate()
    door = ChainDoor(Identity.from_seed(bytes([2] * 32)), gate.node.endpoint, bytes([9] * 32))
    with pytest.raises(AuthorityError, match="expected was"):
        door.join(SECRET)
    door.close()


def test_a_chain_that_is_gone_is_said_to_be(make_gate, make_door):
    door = make_door(make_gate("http://127.0.0.1:9"))
    door.join(SECRET)
    with pytest.raises(ChainUnreachableError, match="does not answer"):
        door._ask(b"x")
