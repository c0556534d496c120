"""The cumulative rewards that a validator knows: under the last root, as the base of the next round, and under earlier
ones, for members that claim. The last ones are on disk before anybody has the signature: a validator that is alone in
its network has nobody to ask for them when it starts again, and without them no round could follow.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smartnodes_core.chain.base import Chain, RoundState
from smartnodes_core.errors import LocalError, RecordError, Unavailable
from smartnodes_core.journal import write_durably
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.params import digest_in
from smartnodes_core.nodes.rewards import fetch_reward_totals, reward_root
from smartnodes_core.records import NO_DIGEST, NodeKey, canonical
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

#: Roots whose leaves are kept: as many as the contract keeps.
MAX_PUBLISHED = 64
#: Roots whose leaves are on disk: the last, and those that were signed and may follow it.
NUM_KEPT = 4


class RewardBooks:
    """Totals in wei by account, by root. `others` gives the validators to ask, `signed` the totals under a root that
    was signed here and of whose execution nothing has been heard yet, `path` the file that keeps the last ones."""

    def __init__(
        self,
        node: Node,
        chain: Chain,
        network_id: int,
        others: Callable[[], list[NodeKey]],
        signed: Callable[[bytes], dict[bytes, int] | None],
        path: Path | None = None,
    ):
        self._node, self._chain, self._network_id = node, chain, network_id
        self._others, self._signed = others, signed
        self._lock = threading.Lock()
        self._totals_wei: dict[bytes, int] = {}
        self._root = NO_DIGEST
        self._path = path
        self._published = self._load()
        node.serve(self)

    @property
    def totals_wei(self) -> dict[bytes, int]:
        """Under the last root."""
        with self._lock:
            return self._totals_wei

    def knows(self, state: RoundState) -> bool:
        """Whether the totals under the chain's last root are known here; else asks the other validators for them."""
        with self._lock:
            if self._root == state.latest_root:
                return True
            known = self._published.get(state.latest_root)
        if known is not None:  # a round was undone
            self.publish(known)
            return True
        try:
            totals = fetch_reward_totals(self._node, self._chain, self._network_id, self._others(), state.latest_root)
        except Unavailable as error:
            logger.warning("%s", error)
            return False
        self.publish(totals)
        return True

    def under(self, root: bytes) -> dict[bytes, int]:
        """The totals under a root on chain, from the other validators where they are not kept here. Raises
        Unavailable."""
        with self._lock:
            known = self._published.get(root)
        return known or fetch_reward_totals(self._node, self._chain, self._network_id, self._others(), root)

    def publish(self, totals_wei: dict[bytes, int]) -> None:
        """These are the totals under the last root now."""
        root = reward_root(self._chain, self._network_id, totals_wei)
        with self._lock:
            self._totals_wei, self._root = totals_wei, root
        self.keep(totals_wei)

    def keep(self, totals_wei: dict[bytes, int]) -> None:
        """These may be the totals under the last root soon: they were signed, and nobody was told yet."""
        root = reward_root(self._chain, self._network_id, totals_wei)
        with self._lock:
            self._published.pop(root, None)
            self._published[root] = totals_wei
            trim(self._published, MAX_PUBLISHED)
            self._save(list(self._published.values())[-NUM_KEPT:])

    def _load(self) -> dict[bytes, dict[bytes, int]]:
        """What was kept, by the roots that it really has."""
        if self._path is None or not self._path.exists():
            return {}
        try:
            kept = [
                {bytes.fromhex(account): int(wei) for account, wei in totals.items()}
                for totals in json.loads(self._path.read_text(encoding="utf-8"))
            ]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.error("the rewards in %s cannot be read, other validators are asked for them: %s", self._path, error)
            return {}
        return {reward_root(self._chain, self._network_id, totals_wei): totals_wei for totals_wei in kept}

    def _save(self, kept: list[dict[bytes, int]]) -> None:
        if self._path is None:
            return
        content = [{account.hex(): str(wei) for account, wei in totals.items()} for totals in kept]
        try:
            write_durably(self._path, json.dumps(content).encode())
        except LocalError as error:
            logger.error("the rewards are not kept: %s", error)

    @allow(max_body_bytes=0)
    def rpc_reward_totals(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The cumulative rewards under a root on chain: anybody may check them against it and build a claim."""
        root = digest_in(params, "root")
        with self._lock:
            totals = self._published.get(root)
        if totals is None:
            totals = self._signed(root)
        if totals is None:
            raise RecordError("the rewards under this root are not known here")
        return {}, [canonical({account.hex(): str(wei) for account, wei in totals.items()})]


def trim(table: dict[Any, Any], most: int) -> None:
    """Forget the oldest entries over `most`."""
    for digest in list(table)[: max(0, len(table) - most)]:
        del table[digest]
