"""Ask many peers the same at once, and go on when enough have answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
A = TypeVar("A")


def ask_all(
    peers: Iterable[T], ask: Callable[[T], A], is_enough: Callable[[dict[T, A]], bool], timeout_s: float, late_s: float
) -> dict[T, A]:
    """The answers by peer. Returns when all have answered, `late_s` after `is_enough` says so, or after `timeout_s`.

    `ask` runs on a thread for each peer and must not raise; one that hangs is not waited for.
    """
    asked = list(peers)
    changed = threading.Condition()
    answers: dict[T, A] = {}

    def run(peer: T) -> None:
        answer = ask(peer)
        with changed:
            answers[peer] = answer
            changed.notify_all()

    for peer in asked:
        threading.Thread(target=run, args=(peer,), name="ask", daemon=True).start()
    with changed:
        changed.wait_for(lambda: len(answers) == len(asked) or is_enough(answers), timeout_s)
        if len(answers) < len(asked) and is_enough(answers):
            changed.wait_for(lambda: len(answers) == len(asked), late_s)
        return dict(answers)
