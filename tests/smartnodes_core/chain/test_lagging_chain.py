"""A chain whose receipts come later than its nonces, and whose answers get lost: nothing is paid twice."""

from __future__ import annotations

import http.server
import json
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.gateway import Gateway
from smartnodes_core.chain.signing import address_of, checksum, new_key

LATE = 5


class Between(http.server.BaseHTTPRequestHandler):
    """Passes requests on to the devnet; `spoil` may change an answer, or make it get lost."""

    target: str
    spoil: Callable[[str, Any], Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with urllib.request.urlopen(self.target, body, timeout=10) as reply:
            answer = json.load(reply)
        answer = type(self).spoil(json.loads(body)["method"], answer)
        if answer is None:
            self.close_connection = True
            return
        sent = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def between(devnet: DevnetProcess) -> Iterator[tuple[str, type[Between]]]:
    handler = type("Handler", (Between,), {"target": devnet.url})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_receipt_that_comes_late_is_waited_for(between: tuple[str, type[Between]]) -> None:
    url, handler = between
    asked: Counter[str] = Counter()

    def late(method: str, answer: Any) -> Any:
        asked[method] += 1
        hidden = method == "eth_getTransactionReceipt" and asked[method] <= LATE
        return answer | {"result": None} if hidden else answer

    handler.spoil = staticmethod(late)
    check_paid_once(url)
    assert asked["eth_getTransactionReceipt"] > LATE
    assert asked["eth_sendRawTransaction"] == 1


def test_an_answer_that_gets_lost_is_asked_for_again_with_the_same_bytes(between: tuple[str, type[Between]]) -> None:
    url, handler = between
    asked: Counter[str] = Counter()

    def lost(method: str, answer: Any) -> Any:
        asked[method] += 1
        if method == "eth_sendRawTransaction" and asked[method] == 1:
            return None
        hidden = method == "eth_getTransactionReceipt" and asked[method] <= LATE
        return answer | {"result": None} if hidden else answer

    handler.spoil = staticmethod(lost)
    check_paid_once(url)
    assert asked["eth_sendRawTransaction"] == 2


def check_paid_once(url: str) -> None:
    gateway, receiver = Gateway(url, devnet_key(61)), address_of(new_key())
    nonce = gateway.next_nonce()
    gateway.send("pay", checksum(receiver), "0x", 1)
    assert gateway.coin_wei(receiver) == 1
    assert gateway.next_nonce() == nonce + 1
