"""A connection's queue of frames to send, bounded in bytes: where back-pressure comes from. Both transports use it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from smartnodes_core.errors import BusyError, ConnectionLostError
from smartnodes_core.transport.base import MAX_QUEUED_BYTES

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OutFrame:
    """A frame on its way: prefix and header in one piece, then the body's parts, uncopied."""

    head: bytes
    body: list[memoryview]
    on_sent: Callable[[], None] | None
    num_bytes: int

    def sent(self) -> None:
        """Tells the owner of the body's memory, once, that it is no longer read."""
        callback, self.on_sent = self.on_sent, None
        if callback is None:
            return
        try:
            callback()
        except Exception:
            logger.exception("an on_sent callback failed")


class Outbox:
    """Frames in the order in which they were put, at most MAX_QUEUED_BYTES (one larger frame passes alone)."""

    def __init__(self, max_bytes: int = MAX_QUEUED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._frames: deque[OutFrame] = deque()
        self._num_taken = 0
        self._num_bytes = 0
        self._closed_because: str | None = None
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._frames) + self._num_taken

    def put(self, frame: OutFrame, timeout_s: float, peer_name: str) -> None:
        """Queues `frame`, waiting for room. Raises BusyError after `timeout_s`, ConnectionLostError once closed."""
        deadline_s: float | None = None
        with self._changed:
            while (
                self._closed_because is None and self._num_bytes and self._num_bytes + frame.num_bytes > self._max_bytes
            ):
                now_s = time.monotonic()
                deadline_s = now_s + timeout_s if deadline_s is None else deadline_s
                if now_s >= deadline_s:
                    raise BusyError(
                        f"{self._num_bytes} bytes wait to be sent to {peer_name} and none went out in {timeout_s:g} s: "
                        "send less at a time, or to another peer"
                    )
                self._changed.wait(deadline_s - now_s)
            if self._closed_because is not None:
                raise ConnectionLostError(f"the connection to {peer_name} is closed: {self._closed_because}")
            self._frames.append(frame)
            self._num_bytes += frame.num_bytes
            self._changed.notify_all()

    def take(self, *, wait: bool = False) -> OutFrame | None:
        """The oldest frame, to be given back to `finish`; it counts as queued until then. None when there is none:
        with `wait` that means closed and empty."""
        with self._changed:
            while wait and not self._frames and self._closed_because is None:
                self._changed.wait()
            if not self._frames:
                return None
            self._num_taken += 1
            return self._frames.popleft()

    def take_together(self, max_bytes: int) -> list[OutFrame]:
        """The oldest frame, and those behind it while all of them have at most `max_bytes`; each as in `take`."""
        with self._changed:
            taken: list[OutFrame] = []
            num_bytes = 0
            while self._frames and (not taken or num_bytes + self._frames[0].num_bytes <= max_bytes):
                taken.append(self._frames.popleft())
                num_bytes += taken[-1].num_bytes
            self._num_taken += len(taken)
            return taken

    def finish(self, frame: OutFrame) -> None:
        """Makes the room of a taken frame free and tells its owner."""
        with self._changed:
            self._num_taken -= 1
            self._num_bytes -= frame.num_bytes
            self._changed.notify_all()
        frame.sent()

    def wait_empty(self, timeout_s: float) -> bool:
        """Waits until nothing is queued or taken; False when something still is after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not len(self), timeout_s)

    def close(self, reason: str) -> None:
        """Takes no more frames; those queued stay until `clear`."""
        with self._changed:
            if self._closed_because is None:
                self._closed_because = reason
            self._changed.notify_all()

    def clear(self) -> None:
        """Drops what is queued and not taken, telling the owners of the memory."""
        with self._changed:
            frames, self._frames = list(self._frames), deque()
            self._num_bytes -= sum(frame.num_bytes for frame in frames)
            self._changed.notify_all()
        for frame in frames:
            frame.sent()
