"""What has happened in this process, counted by name and one label, since it started; `metrics.py` shows it.

    COUNTERS.add("calls_served", "open_job")

Labels come from a fixed few (methods, roles, findings), never from what a peer chooses.
"""

from __future__ import annotations

import threading
from collections import Counter

#: Every name that is counted, with its label and what it says.
HELP = {
    "connections": ("role", "connections that both sides admitted"),
    "lost_connections": ("role", "connections that ended while this node ran"),
    "refused_peers": ("reason", "peers that were refused in their handshake, or dropped when the chain changed"),
    "introductions": ("kind", "peers met by introduction: punched or relayed"),
    "calls_made": ("method", "calls of peers' methods"),
    "calls_served": ("method", "calls and notifications of peers that were let in"),
    "jobs": ("event", "jobs that were opened, taken up and closed here"),
    "commitments": ("event", "commitments made (a worker) or taken (a validator)"),
    "verdicts": ("finding", "verdicts that this validator gave"),
    "rounds": ("event", "rounds on chain that this validator followed, or executed itself"),
}


class Counters:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, label: str) -> None:
        """One more. Raises KeyError for a name that HELP lacks."""
        if name not in HELP:
            raise KeyError(name)
        with self._lock:
            self._counts[name, label] += 1

    def read(self) -> dict[tuple[str, str], int]:
        """The counts by name and label."""
        with self._lock:
            return dict(self._counts)


COUNTERS = Counters()
