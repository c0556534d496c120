"""Keeps a node findable: announces it again, with a higher sequence number, before its announcement expires."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from smartnodes_core.dht.directory import Directory, announce
from smartnodes_core.errors import SmartnodesError
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import Announcement, Role, Signed

logger = logging.getLogger(__name__)

LIFETIME_S = 600


class Announcer:
    """Announces `node` now and every `interval_s` until stopped: at the directories of `bootstrap_keys`, at the node's
    own, `directory`, where it keeps one, and, on the announcer's thread, with `publish`: in the DHT.

    `offers` is asked each time, so that an announcement says what is so now. A directory that cannot be reached is
    tried again at the next turn; `update` makes that now.
    """

    def __init__(
        self,
        node: Node,
        bootstrap_keys: Sequence[bytes],
        role: Role,
        network_id: int,
        offers: Callable[[], dict[str, int | str]],
        *,
        endpoints: Sequence[str] | None = None,
        directory: Directory | None = None,
        publish: Callable[[Signed], object] = lambda signed: None,
        interval_s: float = LIFETIME_S / 3,
        lifetime_s: int = LIFETIME_S,
    ) -> None:
        self._node, self._keys, self._role, self._network_id = node, list(bootstrap_keys), role, network_id
        self._offers, self._endpoints, self._directory = offers, endpoints, directory
        self._publish = publish
        self._interval_s, self._lifetime_s = interval_s, lifetime_s
        self._wake = threading.Event()
        self._stopped = False
        self._sequence_lock = threading.Lock()
        self._sequence = 0
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)

    def start(self) -> None:
        """Announces once at the directories, raising what went wrong, then keeps announcing on a thread."""
        self.announce_now()
        self._thread.start()

    def announce_now(self) -> int:
        """Announces at every directory; how many took it. Raises as `directory.announce`."""
        announcement, num_own = self.announcement(), 0
        if self._directory is not None:
            self._directory.store(self._node.identity.sign(announcement))
            num_own = 1
            if not self._keys:
                return num_own
        return num_own + announce(self._node, self._keys, announcement)

    def announcement(self) -> Announcement:
        """What is announced now. Sequence numbers are Unix milliseconds, and so rise over restarts."""
        now_s = time.time()
        with self._sequence_lock:
            self._sequence = max(self._sequence + 1, int(now_s * 1000))
            sequence = self._sequence
        return Announcement(
            node_key=self._node.node_key,
            role=self._role,
            network_id=self._network_id,
            sequence=sequence,
            expires_at_s=int(now_s) + self._lifetime_s,
            endpoints=list(self._endpoints) if self._endpoints is not None else [self._node.endpoint],
            offers=self._offers(),
        )

    def update(self) -> None:
        """Announces soon, for something has changed."""
        self._wake.set()

    def stop(self) -> None:
        """Ends announcing. Harmless when repeated."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2.0)

    def _run(self) -> None:
        while True:
            try:
                self._publish(self._node.identity.sign(self.announcement()))
            except SmartnodesError as error:
                logger.info("this node is not found in the DHT yet, and announced there again: %s", error)
            self._wake.wait(self._interval_s)
            self._wake.clear()
            if self._stopped:
                return
            try:
                self.announce_now()
            except SmartnodesError as error:
                logger.warning("this node could not be announced and is tried again: %s", error)
