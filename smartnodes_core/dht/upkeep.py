"""What keeps a node of the DHT in it: ghosts are pinged, stale buckets refreshed, records passed on; and a good leave.

Owners send their records again long before these expire. A record is passed on by who keeps it when nobody has sent it
for a while: to make up for those that vanished meanwhile, with one lookup for all who keep it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from smartnodes_core.dht.contacts import Contact
from smartnodes_core.dht.node import NUM_REPLICAS, DhtNode
from smartnodes_core.dht.rules import Entry
from smartnodes_core.errors import SmartnodesError

logger = logging.getLogger(__name__)

INTERVAL_S = 15.0
#: A node that knows nobody tries again so soon: the others may just be starting too.
ALONE_INTERVAL_S = 1.0
REFRESH_S = 900.0
REPUBLISH_S = 300.0
#: How much is done in one turn: the rest is due in the next.
MAX_PINGS, MAX_REFRESHES, MAX_REPUBLISHED = 32, 8, 64
LEAVE_TIMEOUT_S = 3.0
#: A leaving node's records are offered to whoever comes next, and before to so many that should have them.
NUM_DOUBTFUL = 2


def maintain(
    dht: DhtNode, *, refresh_s: float = REFRESH_S, republish_s: float = REPUBLISH_S, timeout_s: float = INTERVAL_S
) -> None:
    """One turn, about every INTERVAL_S. Nothing is raised for what does not succeed; `timeout_s` bounds it."""
    deadline_s = time.monotonic() + timeout_s
    for contact in dht.table.to_ping()[:MAX_PINGS]:
        dht.run(partial(_ping, dht, contact))
    for target in dht.table.to_refresh(refresh_s, dht.rng)[-MAX_REFRESHES:]:
        dht.lookup(target, max(0.0, deadline_s - time.monotonic()))
    # not all who keep a record at the same time: the first to pass it on has the others wait again
    for entry in dht.values.unheard_for(republish_s * (1 + dht.rng.random() / 2), MAX_REPUBLISHED):
        left_s = max(0.0, deadline_s - time.monotonic())
        dht.hand(entry, dht.lookup(entry.key, left_s), deadline_s)


def _ping(dht: DhtNode, contact: Contact) -> None:
    dht.ping(contact)  # the routing table is told


def _give(dht: DhtNode, entry: Entry, heir: Contact) -> bool:
    try:
        return dht.give(entry, heir)
    except SmartnodesError as error:
        logger.debug("%s does not take a record over: %s", heir, error)
        return False


def leave(dht: DhtNode, timeout_s: float = LEAVE_TIMEOUT_S) -> int:
    """Give each record that this node keeps to the next that has it not; how many were taken by somebody."""
    deadline_s = time.monotonic() + timeout_s
    num_taken = 0
    for entry in dht.values.unheard_for(0.0):
        if time.monotonic() >= deadline_s:
            break
        heirs = dht.table.closest(entry.key, 2 * NUM_REPLICAS)[NUM_REPLICAS - NUM_DOUBTFUL :]
        num_taken += any(_give(dht, entry, heir) for heir in heirs if time.monotonic() < deadline_s)
    return num_taken


class Upkeep:
    """Joins through `contacts`, asked whenever nobody is known, and maintains `dht`; on a thread of its own. `tidy` is
    called after every turn.
    """

    def __init__(
        self,
        dht: DhtNode,
        contacts: Callable[[], Sequence[Contact]],
        interval_s: float = INTERVAL_S,
        tidy: Callable[[], object] = lambda: None,
    ) -> None:
        self._dht, self._contacts, self._interval_s, self._tidy = dht, contacts, interval_s, tidy
        self._stopping = threading.Event()
        self.joined = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dht upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends it; a turn under way is not waited for longer than a moment. Harmless when repeated."""
        self._stopping.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2.0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if len(self._dht.table) == 0:  # at the start, or everybody is gone
                    self._dht.join(self._contacts())
                self.joined.set()
                maintain(self._dht, timeout_s=self._interval_s)
                self._tidy()
            except SmartnodesError as error:
                logger.warning("the DHT is not maintained this time: %s", error)
            except Exception:
                logger.exception("maintaining the DHT")
            alone = len(self._dht.table) == 0
            self._stopping.wait(min(self._interval_s, ALONE_INTERVAL_S) if alone else self._interval_s)
