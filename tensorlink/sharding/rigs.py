"""What a rig says of itself, read with care: announcements are written by strangers."""

from __future__ import annotations

from dataclasses import dataclass

from smartnodes_core.records import Announcement

#: Nobody's rig is faster, has more memory, or a faster line; a larger claim counts as this.
MOST_FLOPS_PER_S = 10**17
MOST_BYTES = 1 << 50
MOST_MBIT = 10**7
#: What a line is taken to carry where its owner did not say.
UNKNOWN_MBIT = 100


def offer(worker: Announcement, name: str, default: int, most: int) -> int:
    """A figure out of an announcement: `default` where it is missing or no number, at most `most`."""
    value = worker.offers.get(name)
    return min(value, most) if isinstance(value, int) and value >= 0 else default


def free_slots(worker: Announcement) -> int:
    """How many more jobs a rig takes."""
    return offer(worker, "free_slots", 0, 1 << 20)


@dataclass(frozen=True)
class Rig:
    """A worker with what it announced. `flops_per_s` was measured there; `up_mbit` and `down_mbit` are its owner's
    word, and that of an ordinary line where the owner said nothing.
    """

    worker: Announcement
    memory_bytes: int
    flops_per_s: int
    up_mbit: int
    down_mbit: int

    @classmethod
    def of(cls, worker: Announcement, unknown_flops_per_s: int) -> Rig:
        """`unknown_flops_per_s` stands for the speed of a rig that did not say."""
        return cls(
            worker,
            offer(worker, "memory_bytes", 0, MOST_BYTES),
            max(1, offer(worker, "flops_per_s", unknown_flops_per_s, MOST_FLOPS_PER_S)),
            offer(worker, "up_mbit", 0, MOST_MBIT) or UNKNOWN_MBIT,
            offer(worker, "down_mbit", 0, MOST_MBIT) or UNKNOWN_MBIT,
        )

    @property
    def figures(self) -> tuple[int, ...]:
        """All that a plan depends on."""
        return self.memory_bytes, self.flops_per_s, self.up_mbit, self.down_mbit

    @property
    def name(self) -> str:
        return self.worker.node_key.hex()[:8]

    def seconds_to(self, other: Rig, num_bytes: int) -> float:
        """How long `num_bytes` are on the way between two rigs, in the slower direction."""
        slowest = min(self.up_mbit, other.down_mbit, other.up_mbit, self.down_mbit)
        return num_bytes * 8 / (slowest * 1e6) if self != other else 0.0
