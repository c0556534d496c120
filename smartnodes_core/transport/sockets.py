"""What every TCP socket of a node is set to."""

from __future__ import annotations

import socket
from pathlib import Path

from smartnodes_core.errors import ConfigError

_AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


def tune(tcp: socket.socket, congestion_control: str = "") -> None:
    """No Nagle, for delayed acknowledgements would hold calls up; dead links are noticed within about half a minute."""
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000)):
        option = getattr(socket, name, None)  # not every system has each
        if option is not None:
            tcp.setsockopt(socket.IPPROTO_TCP, option, value)
    if congestion_control:
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion_control.encode())


def check_congestion_control(name: str) -> None:
    """Raises ConfigError, naming those that there are, when this system has no congestion control of that name."""
    if not name:
        return
    if not hasattr(socket, "TCP_CONGESTION"):
        raise ConfigError(f"congestion_control is {name!r}, but this system lets nobody choose one: leave it empty")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        try:
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except PermissionError:
            raise ConfigError(
                f"congestion_control is {name!r}, which only root may choose here: "
                f"add it to net.ipv4.tcp_allowed_congestion_control (sysctl), or leave it empty"
            ) from None
        except OSError:
            found = _AVAILABLE.read_text().strip() if _AVAILABLE.exists() else "unknown"
            raise ConfigError(
                f"congestion_control is {name!r}, which this kernel lacks: it has {found}; "
                f"load it (modprobe tcp_{name}), name another, or leave it empty"
            ) from None
