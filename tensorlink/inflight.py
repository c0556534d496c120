"""Shared memory that arriving tensors hold on a rig: how much each stage has, and what comes back by itself.

A peer decides how much it sends; this decides how much of it is taken. Neighbour: `worker.py`, on whose connections'
threads `reserve` runs.
"""

from __future__ import annotations

import queue
import threading
import weakref
from typing import Any

from smartnodes_core.arena import Arena
from smartnodes_core.errors import BusyError

#: How long a connection's thread waits for the computing process to free memory: its peer sends no faster meanwhile.
ARENA_TIMEOUT_S = 30.0
#: A rig that offers less than this for stages still takes this much of arriving tensors.
LEAST_LIMIT_BYTES = 256 << 20


class Reserved:
    """A slice for a body that is on its way. It goes back when this is garbage, unless `keep` was called first."""

    def __init__(self, arena: Arena, offset: int, abandoned: queue.SimpleQueue[tuple[Arena, int]]):
        self.offset = offset
        # finalizers run anywhere: this one takes no lock, `Inflight.reserve` frees what it notes
        self._finalizer = weakref.finalize(self, abandoned.put, (arena, offset))
        self._finalizer.atexit = False

    def keep(self) -> int:
        """The body is in: from here on the computing process frees the slice at the returned offset."""
        self._finalizer.detach()
        return self.offset


class Inflight:
    """Bytes per stage of tensors that arrived, or are arriving, and are not yet released; at most `limit_bytes`."""

    def __init__(self, limit_bytes: int = LEAST_LIMIT_BYTES):
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Arena, str, int]] = {}
        self._per_stage: dict[str, int] = {}
        self._abandoned: queue.SimpleQueue[tuple[Arena, int]] = queue.SimpleQueue()

    def of(self, key: str) -> int:
        """Bytes that a stage's tensors hold."""
        with self._lock:
            return self._per_stage.get(key, 0)

    def reserve(self, arena: Arena, key: str, num_bytes: int) -> tuple[Reserved, memoryview]:
        """Memory for one body. Raises BusyError where the stage has too much waiting, or the arena is full."""
        self._free_abandoned()
        with self._lock:
            held = self._per_stage.get(key, 0)
            if held + num_bytes > self.limit_bytes:
                raise BusyError(
                    f"{held} bytes of tensors wait for this stage and {num_bytes} more were sent, at most "
                    f"{self.limit_bytes} are taken: use smaller micro-batches or fewer of them"
                )
            self._per_stage[key] = held + num_bytes
        try:
            piece = arena.allocate(max(1, num_bytes), ARENA_TIMEOUT_S)
        except BaseException:
            self._less(key, num_bytes)
            raise
        with self._lock:
            self._held[piece.offset] = (arena, key, num_bytes)
        return Reserved(arena, piece.offset, self._abandoned), piece.view[:num_bytes]

    def released(self, offset: int) -> None:
        """The computing process gave a slice back, of ours or of a call's body."""
        with self._lock:
            found = self._held.pop(offset, None)
        if found is not None:
            self._less(found[1], found[2])

    def clear(self) -> None:
        """The arena is gone with its computing process."""
        with self._lock:
            self._held.clear()
            self._per_stage.clear()

    def _less(self, key: str, num_bytes: int) -> None:
        with self._lock:
            left = self._per_stage.get(key, 0) - num_bytes
            if left > 0:
                self._per_stage[key] = left
            else:
                self._per_stage.pop(key, None)

    def _free_abandoned(self) -> None:
        while not self._abandoned.empty():
            arena, offset = self._abandoned.get()
            with self._lock:
                found = self._held.get(offset)
                known = found is not None and found[0] is arena
            if known:
                self.released(offset)
                arena.free(offset)

    def __repr__(self) -> str:
        with self._lock:
            waiting: dict[str, Any] = dict(self._per_stage)
        return f"<Inflight {waiting} of {self.limit_bytes} bytes a stage>"
