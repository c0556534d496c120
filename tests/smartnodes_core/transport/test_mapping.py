"""A router's port, by NAT-PMP and by UPnP, against routers that this test plays."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from smartnodes_core.errors import PeerUnreachableError
from smartnodes_core.transport import mapping
from smartnodes_core.transport.mapping import by_upnp, map_port

DESCRIPTION = """<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major><minor>0</minor></specVersion><device>
<deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType><serviceList><service>
<serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>
<serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId><controlURL>/control</controlURL>
<eventSubURL>/events</eventSubURL><SCPDURL>/scpd.xml</SCPDURL></service></serviceList></device></deviceList>
</device></deviceList></device></root>"""


class NatPmpRouter:
    """Answers as RFC 6886 says, or as `mood` does: silent, refusing, confused."""

    def __init__(self, mood: str = "") -> None:
        self.mood, self.leases, self.num_asked = mood, {}, 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                request, sender = self._socket.recvfrom(64)
                self.num_asked += 1
                if self.mood == "silent" or (self.mood == "loses one" and self.num_asked == 1):
                    continue
                self._socket.sendto(self._answer(request), sender)
            except OSError:  # closed
                return

    def _answer(self, request: bytes) -> bytes:
        if self.mood == "refuses":
            return struct.pack("!BBHI", 0, request[1] | 0x80, 2, 7)
        if request[1] == 0:
            return struct.pack("!BBHI4s", 0, 0x80, 0, 7, socket.inet_aton("203.0.113.7"))
        _, _, _, inside, outside, lifetime_s = struct.unpack("!BBHHHI", request)
        self.leases[inside] = lifetime_s
        inside += self.mood == "confused"
        outside = 40_000 + outside % 1000 if lifetime_s else 0
        return struct.pack("!BBHIHHI", 0, 0x82, 0, 7, inside, outside, lifetime_s)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def router(request: pytest.FixtureRequest) -> Iterator[NatPmpRouter]:
    made = NatPmpRouter(getattr(request, "param", ""))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_real_router(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(port: int) -> None:
        raise PeerUnreachableError("not asked")

    monkeypatch.setattr(mapping, "by_upnp", none)
    monkeypatch.setattr(mapping, "_FIRST_WAIT_S", 0.05)


def test_nat_pmp_gives_a_port_that_is_given_back(router):
    found = map_port(9100, "127.0.0.1", nat_pmp_port=router.port)
    assert (found.endpoint, found.means) == ("203.0.113.7:40100", "NAT-PMP")
    assert router.leases == {9100: mapping.LEASE_S}
    found.keep()
    found.close()
    found.close()
    assert router.leases == {9100: 0}


@pytest.mark.parametrize("router", ["loses one"], indirect=True)
def test_a_lost_question_is_asked_again(router):
    assert map_port(9100, "127.0.0.1", nat_pmp_port=router.port).means == "NAT-PMP"


@pytest.mark.parametrize(
    ("router", "why"),
    [
        ("silent", "127.0.0.1 does not answer"),
        ("refuses", "refused by the router's settings"),
        ("confused", "answered for port 9101, not for 9100"),
    ],
    indirect=["router"],
)
def test_why_there_is_no_port_is_said_for_each_means(router, why):
    with pytest.raises(PeerUnreachableError, match=f"NAT-PMP: .*{why}; UPnP: not asked"):
        map_port(9100, "127.0.0.1", nat_pmp_port=router.port)


def test_a_router_that_listens_to_nothing_is_told_apart(router):
    router.close()
    with pytest.raises(PeerUnreachableError, match=r"does not (speak it|answer)"):
        map_port(9100, "127.0.0.1", nat_pmp_port=router.port)


class Igd(ThreadingHTTPServer):
    """An Internet gateway device."""

    daemon_threads = True

    def __init__(self, *, generous: bool) -> None:
        self.generous, self.mappings = generous, {}
        super().__init__(("127.0.0.1", 0), IgdHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/root.xml"


class IgdHandler(BaseHTTPRequestHandler):
    server: Igd

    def do_GET(self) -> None:
        self._send(200, DESCRIPTION)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        action = self.headers["SOAPAction"].strip('"').split("#")[1]
        port = re.search(r"<NewExternalPort>(\d+)<", body)
        if action == "GetExternalIPAddress":
            return self._answer(action, "<NewExternalIPAddress>203.0.113.8</NewExternalIPAddress>")
        if action == "AddPortMapping" and self.server.generous:
            self.server.mappings[int(port[1])] = re.search(r"<NewLeaseDuration>(\d+)<", body)[1]
        elif action == "DeletePortMapping":
            self.server.mappings.pop(int(port[1]), None)
        else:
            return self._send(500, "<s:Envelope><errorCode>606</errorCode></s:Envelope>")
        return self._answer(action, "")

    def _answer(self, action: str, content: str) -> None:
        name = f"u:{action}Response"
        body = f'<{name} xmlns:u="urn:schemas-upnp-org:service:WANIPConnection:1">{content}</{name}>'
        self._send(200, f'<?xml version="1.0"?><s:Envelope><s:Body>{body}</s:Body></s:Envelope>')

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def igd(request: pytest.FixtureRequest) -> Iterator[Igd]:
    made = Igd(generous=request.param)
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("igd", [True], indirect=True)
def test_upnp_gives_a_port_that_is_given_back(igd):
    found = by_upnp(9100, igd.url)
    assert (found.endpoint, found.means) == ("203.0.113.8:9100", "UPnP")
    assert igd.mappings == {9100: str(mapping.LEASE_S)}
    found.close()
    assert igd.mappings == {}


@pytest.mark.parametrize("igd", [False], indirect=True)
def test_a_router_that_gives_no_port_by_upnp_is_told_apart(igd):
    with pytest.raises(PeerUnreachableError, match="the router gives no port"):
        by_upnp(9100, igd.url)
    assert igd.mappings == {}


def test_a_description_that_is_none_is_told_apart(router):
    with pytest.raises(PeerUnreachableError, match="no router gives ports away"):
        by_upnp(9100, f"http://127.0.0.1:{router.port}/root.xml")
