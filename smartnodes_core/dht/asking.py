"""Runs lookups: asks several nodes at once, over whatever calls it is given; deadlines follow what was measured.

`Calls` is all that the DHT needs of a network: `NodeCalls` is a node's authenticated connections, `memory.py` the twin.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from smartnodes_core.dht.contacts import Contact
from smartnodes_core.dht.lookup import Lookup
from smartnodes_core.errors import SmartnodesError
from smartnodes_core.nodes.base import Node
from smartnodes_core.rpc import Reply
from smartnodes_core.wire import Buffer

logger = logging.getLogger(__name__)

LOOKUP_TIMEOUT_S = 20.0
#: Bounds of a call's deadline, which covers dialling, and of when somebody else is asked meanwhile.
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 1.0, 5.0
MIN_PATIENCE_S = 0.05

Run = Callable[[Callable[[], None]], None]


class Calls(Protocol):
    """How the nodes of a DHT call each other."""

    def call(
        self,
        contact: Contact,
        method: str,
        params: dict[str, Any],
        body: Sequence[Buffer] = (),
        *,
        timeout_s: float,
        max_body_bytes: int,
    ) -> Reply:
        """Waits for the answer. Raises a SmartnodesError."""
        ...


class NodeCalls:
    """Calls over the authenticated connections of a `Node`, which dials where there is none."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def call(
        self,
        contact: Contact,
        method: str,
        params: dict[str, Any],
        body: Sequence[Buffer] = (),
        *,
        timeout_s: float,
        max_body_bytes: int,
    ) -> Reply:
        """See `Calls`."""
        deadline_s = time.monotonic() + timeout_s
        self._node.reach(contact.node_key, timeout_s, hearsay=contact.endpoints, passing=True)
        left_s = max(0.001, deadline_s - time.monotonic())
        return self._node.call(
            contact.node_key, method, params, body, timeout_s=left_s, max_body_bytes=max_body_bytes, passing=True
        )


class Patience:
    """How long an answer is waited for: the mean of what was measured and four times its deviation, as TCP does it
    (RFC 6298).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mean_s, self._deviation_s = 0.25, 0.125

    def measured(self, took_s: float) -> None:
        with self._lock:
            self._deviation_s += (abs(took_s - self._mean_s) - self._deviation_s) / 4
            self._mean_s += (took_s - self._mean_s) / 8

    @property
    def overdue_s(self) -> float:
        """When somebody else is asked meanwhile."""
        return min(MAX_TIMEOUT_S, max(MIN_PATIENCE_S, self._mean_s + 4 * self._deviation_s))

    @property
    def timeout_s(self) -> float:
        """When it is given up."""
        return min(MAX_TIMEOUT_S, max(MIN_TIMEOUT_S, 4 * self.overdue_s))


def run_lookup(
    lookup: Lookup,
    ask: Callable[[Contact], tuple[Sequence[Contact], bool]],
    run: Run,
    patience: Patience,
    deadline_s: float,
) -> None:
    """Drives `lookup` until it is finished or the monotonic clock reads `deadline_s`.

    `ask` gives the contacts that a node named, and whether it gave a value; what it raises (a SmartnodesError) is a
    failure. `run` has it run on another thread, or at once.
    """
    outcomes: queue.SimpleQueue[tuple[Contact, tuple[Sequence[Contact], bool] | None]] = queue.SimpleQueue()
    asked_s: dict[Contact, float] = {}

    def attempt(contact: Contact) -> None:
        outcome = None
        try:
            outcome = ask(contact)
        except SmartnodesError as error:
            logger.debug("%s: %s", contact, error)
        finally:
            outcomes.put((contact, outcome))

    while not lookup.finished:
        now_s = time.monotonic()
        if now_s >= deadline_s:
            return
        for contact in [each for each, since_s in asked_s.items() if now_s - since_s >= patience.overdue_s]:
            del asked_s[contact]
            lookup.overdue(contact)
        for contact in lookup.next():
            asked_s[contact] = time.monotonic()
            run(lambda contact=contact: attempt(contact))  # type: ignore[misc]
        wait_s = min([deadline_s, *(since_s + patience.overdue_s for since_s in asked_s.values())]) - time.monotonic()
        try:
            contact, outcome = outcomes.get(timeout=max(0.001, wait_s))
        except queue.Empty:
            continue
        asked_s.pop(contact, None)
        if outcome is None:
            lookup.failed(contact)
        else:
            lookup.answered(contact, outcome[0], has_value=outcome[1])
