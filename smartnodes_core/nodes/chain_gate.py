"""The chain of one owner's network, for that owner's other machines: JSON-RPC through an authenticated connection.

The embedded chain listens on loopback and its accounts' secrets are public, so it must never be reachable by others.
`ChainGate`, beside the chain, serves it to machines that showed the owner's secret once, and remembers their node keys
in a file. `ChainDoor`, on such a machine, is a JSON-RPC endpoint on its loopback that goes through the gate.
"""

from __future__ import annotations

import hmac
import json
import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests

from smartnodes_core.errors import AuthorityError, ChainUnreachableError, ConfigError, SmartnodesError
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.authority import OpenAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.params import bytes_in
from smartnodes_core.records import NodeKey
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer
from smartnodes_core.transport.tls import TlsTransport

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES, MAX_ANSWER_BYTES = 1 << 20, 8 << 20
CHAIN_TIMEOUT_S = 30.0
MAX_MACHINES = 32


class ChainGate:
    """Serves the chain at `rpc_url` to machines that know `secret`. Whoever joins gets what `welcome(number)` says,
    where `number` counts the machines from 0. `members` is the file with their node keys.

    Anybody may shake hands; nobody is served anything before the secret was shown.
    """

    def __init__(
        self,
        identity: Identity,
        endpoint: str,
        rpc_url: str,
        secret: bytes,
        members: Path,
        welcome: Callable[[int], dict[str, Any]],
    ) -> None:
        self._rpc_url, self._secret, self._path, self._welcome = rpc_url, secret, members, welcome
        self._lock = threading.Lock()
        known = json.loads(members.read_text()) if members.exists() else []
        self._members = [bytes.fromhex(each) for each in known]
        self.node = Node(identity, None, TlsTransport(identity, None), OpenAuthority(), endpoint)
        self.node.serve(self)

    def start(self) -> None:
        """Listens. Raises PortInUseError, ConfigError."""
        self.node.start()

    def stop(self) -> None:
        self.node.stop()

    @allow(max_body_bytes=0)
    def rpc_join(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """Takes a machine in, once it has shown the secret; again gives the same answer."""
        if not hmac.compare_digest(bytes_in(params, "secret", 64), self._secret):
            raise AuthorityError("the code is not that of this network: `tensorlink home start` prints it")
        with self._lock:
            if caller.node_key not in self._members:
                if len(self._members) >= MAX_MACHINES:
                    raise AuthorityError(f"{MAX_MACHINES} machines have joined, no more are taken")
                self._members.append(caller.node_key)
                part = self._path.with_name(self._path.name + ".part")
                part.write_text(json.dumps([key.hex() for key in self._members]))
                part.replace(self._path)
            return self._welcome(self._members.index(caller.node_key))

    @allow(max_body_bytes=MAX_REQUEST_BYTES, check="_check_member")
    def rpc_chain(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """One JSON-RPC request, passed on to the chain."""
        return {}, [_post(self._rpc_url, bytes(body))]

    def _check_member(self, caller: Peer, params: dict[str, Any], num_body_bytes: int) -> None:
        with self._lock:
            known = caller.node_key in self._members
        if not known:
            raise AuthorityError("this machine has not joined: `tensorlink home join` with the code comes first")


def _post(url: str, body: bytes) -> bytes:
    try:
        with requests.post(
            url, data=body, headers={"Content-Type": "application/json"}, timeout=CHAIN_TIMEOUT_S, stream=True
        ) as answer:
            found = answer.raw.read(MAX_ANSWER_BYTES + 1)
    except requests.RequestException as error:
        raise ChainUnreachableError(f"the chain beside the gate does not answer: {error}") from None
    if len(found) > MAX_ANSWER_BYTES:
        raise ChainUnreachableError(f"the chain's answer is over {MAX_ANSWER_BYTES} bytes: ask for less at a time")
    return bytes(found)


class ChainDoor:
    """A JSON-RPC endpoint on this machine's loopback, at `url`, behind which is the chain of the gate at `endpoint`,
    which must own `gate_key`. Connects again when the connection was lost.
    """

    def __init__(self, identity: Identity, endpoint: str, gate_key: NodeKey) -> None:
        self._gate_key = gate_key
        self._node = Node(identity, None, TlsTransport(identity, None), OpenAuthority(), None)
        self._node.add_address(gate_key, endpoint)
        self._server: _DoorServer | None = None

    def join(self, secret: bytes) -> dict[str, Any]:
        """The gate's welcome. Raises AuthorityError for a wrong secret, Unavailable where nobody answers."""
        return self._node.call(self._gate_key, "join", {"secret": secret}).params

    def open(self, port: int = 0) -> str:
        """Listens on loopback; the URL."""
        self._server = _DoorServer(self._ask, port)
        threading.Thread(target=self._server.serve_forever, name="chain door", daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Harmless when repeated."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        self._node.stop()

    def _ask(self, body: bytes) -> bytes:
        reply = self._node.call(
            self._gate_key, "chain", {}, [body], timeout_s=CHAIN_TIMEOUT_S, max_body_bytes=MAX_ANSWER_BYTES
        )
        return bytes(reply.body)


class _DoorServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, ask: Callable[[bytes], bytes], port: int) -> None:
        self.ask = ask
        try:
            super().__init__(("127.0.0.1", port), _DoorHandler)
        except OSError as error:
            raise ConfigError(f"cannot listen on 127.0.0.1:{port}: {error.strerror or error}") from None


class _DoorHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _DoorServer

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        # browsers name their origin, chain clients do not
        if not length.isdigit() or int(length) > MAX_REQUEST_BYTES or self.headers.get("Origin"):
            self.close_connection = True
            return self._reply(400, b"{}")
        body = self.rfile.read(int(length))
        try:
            return self._reply(200, self.server.ask(body))
        except SmartnodesError as error:
            logger.warning("the chain is not reached: %s", error)
            return self._reply(502, b"{}")

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
