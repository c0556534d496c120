"""Ask the router at home for a port of its own that leads to ours: NAT-PMP (RFC 6886), then UPnP.

A mapping is a lease, renewed by `PortMapping.renew` and given back by `close`. NAT-PMP is two datagrams and is written
out here; UPnP is miniupnpc's, and is left out where that is not installed.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from smartnodes_core.errors import PeerUnreachableError
from smartnodes_core.transport.base import join_endpoint

logger = logging.getLogger(__name__)

LEASE_S = 3600
NAT_PMP_PORT = 5351
_FIRST_WAIT_S, _NUM_TRIES = 0.25, 3
_DISCOVERY_MS = 500  # for each of four kinds of device
_MAP_TCP, _ADDRESS = 2, 0
_RESULTS = {1: "version", 2: "refused by the router's settings", 3: "it has no connection", 4: "it has no room"}


class PortMapping:
    """`endpoint` on the router leads to a port of this machine, until `close`; `means` is "NAT-PMP" or "UPnP"."""

    def __init__(self, endpoint: str, means: str, renew: Callable[[], None], give_back: Callable[[], None]) -> None:
        self.endpoint, self.means = endpoint, means
        self._renew, self._give_back = renew, give_back
        self._ended = threading.Event()

    def keep(self) -> None:
        """Renews the lease from now on, in the background."""
        threading.Thread(target=self._run, name="port mapping", daemon=True).start()

    def close(self) -> None:
        """Gives the port back, if the router still listens. Harmless when repeated."""
        if not self._ended.is_set():
            self._ended.set()
            with contextlib.suppress(PeerUnreachableError):
                self._give_back()

    def _run(self) -> None:
        while not self._ended.wait(LEASE_S / 2):
            try:
                self._renew()
            except PeerUnreachableError as error:
                logger.warning("the router's port %s is not renewed: %s", self.endpoint, error)


def map_port(port: int, router: str | None = None, *, nat_pmp_port: int = NAT_PMP_PORT) -> PortMapping:
    """A port of the router that leads to `port` here; `router` is its address (None: that of the default route).

    Raises PeerUnreachableError that says what each means came to.
    """
    tried = []
    router = router or default_router()
    if router is None:
        tried.append("NAT-PMP: there is no default route")
    else:
        try:
            return _by_nat_pmp(port, (router, nat_pmp_port))
        except PeerUnreachableError as error:
            tried.append(f"NAT-PMP: {error}")
    try:
        return by_upnp(port)
    except PeerUnreachableError as error:
        tried.append(f"UPnP: {error}")
    raise PeerUnreachableError("; ".join(tried))


def default_router() -> str | None:
    """The address of the default route's router, where the system tells (Linux)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/net/route").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == "00000000" and fields[2] != "00000000":
                return socket.inet_ntoa(struct.pack("<I", int(fields[2], 16)))
    return None


# -- NAT-PMP ----------------------------------------------------------------------------------------------------------


def _by_nat_pmp(port: int, router: tuple[str, int]) -> PortMapping:
    address = socket.inet_ntoa(_ask(router, bytes([0, _ADDRESS]), 12)[8:12])

    def lease(lifetime_s: int, outside: int) -> int:
        request = struct.pack("!BBHHHI", 0, _MAP_TCP, 0, port, outside, lifetime_s)
        _, inside, granted, _ = struct.unpack("!IHHI", _ask(router, request, 16)[4:16])
        if inside != port:
            raise PeerUnreachableError(f"the router answered for port {inside}, not for {port}")
        return int(granted)

    outside = lease(LEASE_S, port)
    return PortMapping(
        join_endpoint(address, outside),
        "NAT-PMP",
        lambda: _same(outside, lease(LEASE_S, outside)),
        lambda: _same(0, lease(0, 0)),
    )


def _same(wanted: int, found: int) -> None:
    if wanted != found:
        raise PeerUnreachableError(f"the router now gives port {found}, before it was {wanted}")


def _ask(router: tuple[str, int], request: bytes, num_bytes: int) -> bytes:
    """The router's answer, its result checked."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        wait_s = _FIRST_WAIT_S
        try:
            udp.connect(router)
            for _ in range(_NUM_TRIES):
                udp.send(request)
                udp.settimeout(wait_s)
                wait_s *= 2
                try:
                    answer = udp.recv(64)
                except TimeoutError:
                    continue
                if len(answer) < 4 or answer[1] != request[1] | 0x80:
                    continue
                result = int.from_bytes(answer[2:4], "big")
                if result:
                    raise PeerUnreachableError(f"the router says: {_RESULTS.get(result, f'result {result}')}")
                if len(answer) >= num_bytes:
                    return answer
        except OSError as error:
            raise PeerUnreachableError(f"{router[0]} does not speak it ({error.strerror or error})") from None
    raise PeerUnreachableError(f"{router[0]} does not answer")


# -- UPnP -------------------------------------------------------------------------------------------------------------


def by_upnp(port: int, description_url: str | None = None) -> PortMapping:
    """As `map_port`; `description_url` is the router's, where it need not be looked for."""
    try:
        import miniupnpc
    except ImportError:
        raise PeerUnreachableError("miniupnpc is not installed") from None
    router = miniupnpc.UPnP()
    router.discoverdelay = _DISCOVERY_MS
    try:
        if description_url is None and not router.discover():
            raise PeerUnreachableError("no router answers")
        router.selectigd(description_url) if description_url else router.selectigd()
        address, inside = str(router.externalipaddress()), str(router.lanaddr)
    except Exception as error:  # it raises bare Exception
        if isinstance(error, PeerUnreachableError):
            raise
        raise PeerUnreachableError(f"no router gives ports away: {error}") from None

    def lease() -> None:
        try:
            taken = router.addportmapping(port, "TCP", inside, port, "smartnodes", "", LEASE_S)
        except Exception as error:
            raise PeerUnreachableError(f"the router gives no port: {error}") from None
        if not taken:
            raise PeerUnreachableError(f"the router gives port {port} to nobody")

    def give_back() -> None:
        with contextlib.suppress(Exception):
            router.deleteportmapping(port, "TCP")

    lease()
    return PortMapping(join_endpoint(address, port), "UPnP", lease, give_back)
