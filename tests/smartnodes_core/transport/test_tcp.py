"""TCP connections share their local port with others of the process, and say why they did not come about."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from smartnodes_core.errors import ConfigError, DeadlineError, PeerUnreachableError
from smartnodes_core.transport.tcp import open_from_both_sides, open_tcp, shareable


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def endpoint_of(server):
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_the_port_of_a_connection_is_used_again_towards_another(listener):
    with open_tcp(endpoint_of(listener), 5.0) as first, socket.create_server(("127.0.0.1", 0)) as other:
        port = first.getsockname()[1]
        with open_from_both_sides(port, endpoint_of(other), time.monotonic() + 5.0) as second:
            assert second.getsockname()[1] == port
            met, address = other.accept()
            with met:
                assert address[1] == port


def test_a_side_that_comes_later_is_waited_for():
    with shareable(socket.AF_INET) as late:
        late.bind(("127.0.0.1", 0))
        endpoint = endpoint_of(late)
        timer = threading.Timer(0.3, late.listen)
        timer.start()
        with open_from_both_sides(0, endpoint, time.monotonic() + 10.0) as tcp:
            assert f"127.0.0.1:{tcp.getpeername()[1]}" == endpoint
        timer.join()


def test_who_never_comes_is_a_deadline_that_says_what_it_may_be():
    began = time.monotonic()
    with pytest.raises(DeadlineError, match="gives each connection another port"):
        open_from_both_sides(0, "127.0.0.1:9", time.monotonic() + 0.3)
    assert time.monotonic() - began < 2.0


def test_a_port_that_another_program_has_cannot_be_met_from(listener):
    with pytest.raises(PeerUnreachableError, match="cannot be met from port"):
        open_from_both_sides(listener.getsockname()[1], "127.0.0.1:9", time.monotonic() + 0.3)


def test_nobody_there_no_such_name_and_no_endpoint_are_told_apart():
    with pytest.raises(PeerUnreachableError, match=r"nobody can be reached at 127.0.0.1:9"):
        open_tcp("127.0.0.1:9", 5.0)
    with pytest.raises(PeerUnreachableError, match=r"nobody can be reached at nowhere.invalid"):
        open_tcp("nowhere.invalid:9", 5.0)
    with pytest.raises(ConfigError, match="is not an endpoint"):
        open_tcp("nowhere", 5.0)
