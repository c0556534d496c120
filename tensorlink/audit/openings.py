"""Openings on their way out of the computing process, part by part: a body may be larger than its memory.

Neighbours: `opening.py` says what is in one, `compute_stages.py` serves it, `stage_compute.py` asks from the node.
"""

from __future__ import annotations

import itertools

from smartnodes_core.errors import AuditError
from smartnodes_core.sandbox_child import ChildChannel
from tensorlink.audit.opening import Opened
from tensorlink.steplog.snapshots import Snapshot

#: More than auditors ask for at once: the oldest is then one whose node gave up.
MAX_OPEN = 8
PART_TIMEOUT_S = 30.0


class Openings:
    """Those that were begun and not yet taken to their end."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[str, Opened]] = {}
        self._ids = itertools.count(1)

    def begin(self, key: str, opened: Opened, snapshot: Snapshot | None = None) -> int:
        """Keeps what the stage `key` opens until the last part was taken; the name for it. What is opened of a
        `snapshot` alone is read from there, else it is copied."""
        while len(self._open) >= MAX_OPEN:
            self._end(next(iter(self._open)))
        opened.hold(snapshot)
        number = next(self._ids)
        self._open[number] = (key, opened)
        return number

    def part(self, channel: ChildChannel, number: int, at: int, num_bytes: int) -> dict[str, int]:
        """Writes bytes of a body into the outbound arena, and says where they are. Raises AuditError where there are
        not so many, or the opening was given up."""
        if number not in self._open:
            raise AuditError("the opening was given up: its stage is gone, or too many were asked for at once")
        opened = self._open[number][1]
        left = opened.num_bytes - at
        if not (at >= 0 and 0 <= num_bytes <= left):
            raise AuditError(f"{num_bytes} bytes at {at} of an opening of {opened.num_bytes}")
        piece = channel.outbound.allocate(num_bytes, PART_TIMEOUT_S)
        try:
            opened.write(piece.view, at)
        except Exception:
            channel.outbound.free(piece.offset)
            raise
        if num_bytes == left:
            self._end(number)
        return {"offset": piece.offset, "num_bytes": num_bytes}

    def drop(self, key: str) -> None:
        """The stage is gone."""
        for number in [number for number, (of, _) in self._open.items() if of == key]:
            self._end(number)

    def _end(self, number: int) -> None:
        self._open.pop(number)[1].let_go()
