"""A stage in the computing process, with what waits around it. Neighbours: `compute_stages.py`, `compute_state.py`."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from smartnodes_core.errors import SmartnodesError
from tensorlink.audit import commitments
from tensorlink.later import Later
from tensorlink.pipeline.stage import Stage


@dataclass(eq=False)
class Waiting:
    """A prepare that is not answered yet; `deadline_s` on the monotonic clock."""

    call_id: int
    step: int
    num_units: int
    deadline_s: float


@dataclass
class Hosted:
    """A loaded stage with what waits around it."""

    key: str
    stage: Stage
    roots: commitments.Roots
    work_units: int
    pool: Later
    hashing: Future[None] | None = None
    prepares: list[Waiting] = field(default_factory=list)
    failed: SmartnodesError | None = None
    committed: set[int] = field(default_factory=set)

    def wait_for_hashing(self) -> None:
        """Returns when nobody reads parameters and optimizer state any more."""
        if self.hashing is not None:
            self.hashing.result()
            self.hashing = None
