"""A network that misbehaves, by seed: what `memory.py` does to frames when a hub is given `Faults`.

TCP and TLS keep most of this from a node; a hostile peer, a relay or a bug does not. Whatever happens here, calls have
to end in time and run at most once: `tests/smartnodes_core/rpc/test_faults.py` tries seeded schedules.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Faults:
    """How likely each fault is, for each frame; `half_open` for each direction of each connection."""

    seed: int
    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    reorder: float = 0.0
    truncate: float = 0.0
    half_open: float = 0.0
    max_delay_s: float = 0.02
    _lines: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    def line(self) -> FaultyLine:
        """One direction of one connection."""
        return FaultyLine(self, random.Random(f"{self.seed}/{next(self._lines)}"))


class Cut(Exception):
    """The connection breaks within this frame: so many of its bytes still arrive."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"cut after {num_bytes} bytes")
        self.num_bytes = num_bytes


class FaultyLine:
    """Decides what becomes of each frame. Called on one thread."""

    def __init__(self, faults: Faults, chance: random.Random) -> None:
        self._faults, self._chance = faults, chance
        self._dead_after = chance.randrange(20) if chance.random() < faults.half_open else None
        self._num_frames = 0

    def copies(self, num_bytes: int, ended: threading.Event) -> int:
        """How often the next frame, of `num_bytes`, is delivered, after a delay where it has one. Raises Cut."""
        faults, chance = self._faults, self._chance
        self._num_frames += 1
        if self._dead_after is not None and self._num_frames > self._dead_after:
            return 0
        if chance.random() < faults.truncate:
            raise Cut(chance.randrange(num_bytes))
        if chance.random() < faults.delay:
            ended.wait(chance.uniform(0, faults.max_delay_s))
        if chance.random() < faults.drop:
            return 0
        return 2 if chance.random() < faults.duplicate else 1

    def overtaken(self) -> bool:
        """Whether the frame just taken lets the one behind it pass."""
        return self._chance.random() < self._faults.reorder
