"""TCP connections as transports need them: from a local port that can be used again, and opened from both sides.

Routers that translate addresses mostly keep a local port's outside port whoever it speaks to. Every connection is
therefore made so that its local port may be shared: the port through which a validator sees a node is the one from
which `open_from_both_sides` then reaches a peer (Ford, Srisuresh, Kegel: Peer-to-Peer Communication Across Network
Address Translators, section 4).
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
import time

from smartnodes_core.errors import ConfigError, DeadlineError, PeerUnreachableError
from smartnodes_core.transport.base import split_endpoint

RETRY_S = 0.1
_RETRIED = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ETIMEDOUT)


def open_tcp(endpoint: str, timeout_s: float) -> socket.socket:
    """A connection to "host:port". Raises DeadlineError, PeerUnreachableError, ConfigError."""
    host, port = split_endpoint(endpoint)
    deadline_s = time.monotonic() + timeout_s
    failure: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise PeerUnreachableError(f"nobody can be reached at {endpoint}: {error.strerror or error}") from None
    for family, _, _, _, address in found:
        tcp = shareable(family)
        try:
            tcp.settimeout(max(0.001, deadline_s - time.monotonic()))
            tcp.connect(address)
            return tcp
        except OSError as error:
            failure = error
            tcp.close()
    if isinstance(failure, TimeoutError):
        raise DeadlineError(f"{endpoint} did not answer in {timeout_s:g} s") from None
    reason = failure.strerror or failure if failure else "it has no address"
    raise PeerUnreachableError(f"nobody can be reached at {endpoint}: {reason}") from None


def open_from_both_sides(local_port: int, endpoint: str, deadline_s: float) -> socket.socket:
    """The connection that comes about when this side and the one at `endpoint` both connect from the ports that each
    was told, until `deadline_s` of the monotonic clock. Raises DeadlineError, PeerUnreachableError, ConfigError.
    """
    host, port = split_endpoint(endpoint)
    pause = threading.Event()
    while True:
        tcp = shareable(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            tcp.bind(("", local_port))
            failure = _connect(tcp, (host, port), deadline_s)
        except OSError as error:
            tcp.close()
            raise PeerUnreachableError(f"{endpoint} cannot be met from port {local_port}: {error.strerror}") from None
        if failure == 0:
            return tcp
        tcp.close()
        if failure not in _RETRIED:
            raise PeerUnreachableError(f"{endpoint} cannot be met from port {local_port}: {errno.errorcode[failure]}")
        if time.monotonic() + RETRY_S >= deadline_s:
            raise DeadlineError(
                f"{endpoint} was not met in time: one of the routers gives each connection another port"
            )
        pause.wait(RETRY_S)


def _connect(tcp: socket.socket, address: tuple[str, int], deadline_s: float) -> int:
    """0, or the error that ended the attempt; ETIMEDOUT at the deadline."""
    tcp.setblocking(False)
    started = tcp.connect_ex(address)
    if started not in (0, errno.EINPROGRESS):
        return started
    poll = select.poll()
    poll.register(tcp, select.POLLOUT)
    if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
        return errno.ETIMEDOUT
    failure = tcp.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    tcp.setblocking(True)
    return failure


def shareable(family: int) -> socket.socket:
    """A socket whose local port others of this process may use beside it. Raises ConfigError."""
    try:
        tcp = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"no socket can be made: {error.strerror or error}") from None
    for name in ("SO_REUSEADDR", "SO_REUSEPORT"):
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):
                tcp.setsockopt(socket.SOL_SOCKET, option, 1)
    return tcp
