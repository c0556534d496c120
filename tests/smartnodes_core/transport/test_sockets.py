"""What sockets are set to."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from smartnodes_core.errors import ConfigError
from smartnodes_core.identity import Identity
from smartnodes_core.rpc import RpcEndpoint
from smartnodes_core.transport.sockets import check_congestion_control, tune
from smartnodes_core.transport.tls import TlsTransport

needs_choice = pytest.mark.skipif(
    not hasattr(socket, "TCP_CONGESTION"), reason="this system lets nobody choose the congestion control"
)


@needs_choice
def test_an_unknown_congestion_control_is_named_with_those_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"'nonesuch', which this kernel lacks: it has .*(cubic|reno).*leave it empty"
    ):
        check_congestion_control("nonesuch")
    with pytest.raises(ConfigError, match="nonesuch"):
        TlsTransport(Identity.create(), None, congestion_control="nonesuch")


def test_none_is_asked_for_by_default() -> None:
    check_congestion_control("")


def test_a_system_without_the_choice_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "TCP_CONGESTION", raising=False)
    with pytest.raises(ConfigError, match="lets nobody choose"):
        check_congestion_control("bbr")


@needs_choice
def test_both_ends_of_a_connection_have_the_one_that_was_named(tls_party: Any) -> None:
    available = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()
    name = next((each for each in available if each != "cubic"), "cubic")
    opened: list[Any] = []
    server = TlsTransport(Identity.create(), None, congestion_control=name)
    listener = server.listen("127.0.0.1:0", RpcEndpoint(opened=opened.append), lambda peer: None)
    near = server.dial(listener.endpoint, RpcEndpoint(), lambda peer: None)
    found = near._tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    assert found.rstrip(b"\0").decode() == name
    near.close("done")
    assert near.join(10)
    listener.close()


def test_calls_are_not_held_up_by_nagle_and_dead_links_are_noticed() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        tune(tcp)
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
