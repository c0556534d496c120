"""JSON-RPC 2.0 over HTTP on loopback, one thread per connection, answers in one segment each."""

from __future__ import annotations

import errno
import json
import logging
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from smartnodes_core.chain.devnet.methods import INVALID_REQUEST, PARSE_ERROR, SERVER_ERROR, Methods, RpcError
from smartnodes_core.errors import PortInUseError
from smartnodes_core.nesting import bounded_json

MAX_BODY_BYTES = 8 << 20
MAX_BATCH = 1000
IDLE_S = 120.0
_LOG = logging.getLogger(__name__)


class RpcServer(ThreadingHTTPServer):
    """Listens when constructed; `serve_forever` answers. Raises PortInUseError where the port is taken."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, methods: Methods, host: str, port: int):
        self.methods = methods
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            what = "is in use" if error.errno == errno.EADDRINUSE else "may not be opened by this user"
            raise PortInUseError(
                f"port {port} on {host} {what}: choose another with --port, or 0 for any free one"
            ) from None

    def server_bind(self) -> None:
        # Not HTTPServer's: it looks the host's name up, which can take seconds where there is no resolver.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        _LOG.debug("a connection ended early", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = IDLE_S
    server: RpcServer

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            return self._reply(411, _error(None, INVALID_REQUEST, "a Content-Length is needed"), close=True)
        if int(length) > MAX_BODY_BYTES:
            text = f"a body of {length} bytes: at most {MAX_BODY_BYTES} are read"
            return self._reply(413, _error(None, INVALID_REQUEST, text), close=True)
        # A web page the user has open could post here; browsers name their origin, chain clients do not.
        if self.headers.get("Origin"):
            return self._reply(403, _error(None, INVALID_REQUEST, "requests from web pages are refused"), close=True)
        return self._reply(200, answer(self.server.methods, self.rfile.read(int(length))))

    def _reply(self, status: int, content: Any, close: bool = False) -> None:
        body = json.dumps(content, separators=(",", ":")).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if close:
            self.send_header("Connection", "close")
        self.end_headers_with(body)

    def end_headers_with(self, body: bytes) -> None:
        """Headers and body in one write: two would wait for each other's acknowledgement."""
        buffer: list[bytes] = self._headers_buffer  # type: ignore[attr-defined]
        self.wfile.write(b"".join([*buffer, b"\r\n", body]))
        buffer.clear()

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def log_message(self, format: str, *args: Any) -> None:
        _LOG.debug(format, *args)


def answer(methods: Methods, body: bytes) -> Any:
    """The JSON answer to one request or a batch of them."""
    try:
        request = bounded_json(body)
    except ValueError:
        return _error(None, PARSE_ERROR, "not JSON")
    if not isinstance(request, list):
        return _answer_one(methods, request)
    if not 0 < len(request) <= MAX_BATCH:
        return _error(None, INVALID_REQUEST, f"a batch of {len(request)}: 1 to {MAX_BATCH} requests are answered")
    return [_answer_one(methods, item) for item in request]


def _answer_one(methods: Methods, request: Any) -> dict[str, Any]:
    if not isinstance(request, dict):
        return _error(None, INVALID_REQUEST, "a request is an object")
    number = request.get("id")
    try:
        result = methods.call(request.get("method"), request.get("params", []))
    except RpcError as error:
        return {"jsonrpc": "2.0", "id": number, "error": error.answer}
    except Exception as error:  # a fault of ours must not end the connection of a client
        _LOG.exception("the devnet failed on %s", request.get("method"))
        return _error(number, SERVER_ERROR, f"internal error: {type(error).__name__}: {error}")
    return {"jsonrpc": "2.0", "id": number, "result": result}


def _error(number: Any, code: int, message: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": message}}
