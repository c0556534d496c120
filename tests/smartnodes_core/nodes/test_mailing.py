from __future__ import annotations

import threading

from smartnodes_core.errors import PeerUnreachableError
from smartnodes_core.nodes import mailing
from smartnodes_core.nodes.mailing import Mailer


class Post:
    """A node that notes what it sends; `down` peers cannot be reached, `slow` ones wait for `gate`."""

    node_key = b"me"

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, str, bytes]] = []
        self.down: set[bytes] = set()
        self.slow: set[bytes] = set()
        self.gate = threading.Event()

    def notify(self, peer, method, params, body=()):
        if peer in self.slow:
            self.gate.wait(60)
        if peer in self.down:
            raise PeerUnreachableError("down")
        self.sent.append((peer, method, b"".join(body)))


def test_messages_arrive_in_order_for_each_peer_and_never_here():
    post = Post()
    mailer = Mailer(post, "mail")
    for number in range(50):
        mailer.post([b"a", b"me", b"b"], "m", {}, b"%d" % number)
    assert mailer.flush(5)
    for peer in (b"a", b"b"):
        assert [body for to, _, body in post.sent if to == peer] == [b"%d" % number for number in range(50)]
    assert not any(to == b"me" for to, _, _ in post.sent)
    mailer.stop()


def test_a_peer_that_is_slow_or_down_holds_up_nobody():
    post = Post()
    post.slow, post.down = {b"slow"}, {b"down"}
    mailer = Mailer(post, "mail")
    for _ in range(3):
        mailer.post([b"slow", b"down", b"good"], "m", {})
    assert not mailer.flush(0.05)
    assert [to for to, _, _ in post.sent] == [b"good"] * 3
    post.gate.set()
    assert mailer.flush(5)
    assert sorted(to for to, _, _ in post.sent) == [b"good"] * 3 + [b"slow"] * 3
    mailer.stop()


def test_what_waits_for_a_peer_is_capped(monkeypatch):
    monkeypatch.setattr(mailing, "MAX_WAITING", 2)
    post = Post()
    post.slow = {b"slow"}
    mailer = Mailer(post, "mail")
    for _ in range(20):
        mailer.post([b"slow"], "m", {})
    post.gate.set()
    assert mailer.flush(5)
    assert 2 <= len(post.sent) <= 3
    mailer.stop()
