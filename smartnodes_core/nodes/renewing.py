"""A node's binding to its account expires; one that runs for long signs it anew in time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from smartnodes_core.nodes.base import Node
from smartnodes_core.records import SignedBinding

logger = logging.getLogger(__name__)


class Renewer:
    """Signs a node's binding anew every `interval_s`, so that one that runs for long is not cut off."""

    def __init__(self, node: Node, bind: Callable[[], SignedBinding], interval_s: float) -> None:
        self._node, self._bind, self._interval_s = node, bind, interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="binding", daemon=True)

    def start(self) -> None:
        """Begins to wait."""
        self._thread.start()

    def stop(self) -> None:
        """Ends. Harmless when repeated."""
        self._stopping.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self._node.renew(self._bind())
            logger.info("the binding of this node's key to its account was signed anew")
