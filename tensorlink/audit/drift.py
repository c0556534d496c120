"""Small, and the same way every time: what single audits let pass, added up over the audits of a worker.

Each accepted tensor leaves a residual, what was claimed less what was replayed, as a sketch (`residual.py`) in units of
what was allowed. Honest residuals point anywhere and are small; those of a drift point one way. The sum is that of
Crosier's multivariate CUSUM (Technometrics 30, 1988): add, shrink by `SLACK`, and beyond `LIMIT` nobody honest gets.
Pure, without torch: the validator's node keeps it, for as long as it runs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

#: Shares of the tolerance: what each audit may add for nothing, and where the sum accuses. Honest replays in float32
#: differ by at most 0.11 of it, each time another way.
SLACK, LIMIT = 0.05, 2.0
#: Of one stage that a worker runs, tensors; and such stages.
MAX_TENSORS, MAX_PLACES = 4096, 1024

Place = tuple[bytes, bytes, int]


class Drift:
    """The sum for one tensor."""

    def __init__(self) -> None:
        self._sum: list[float] = []

    @property
    def length(self) -> float:
        """How far it lies from nothing, in tolerances."""
        return math.hypot(*self._sum)

    def add(self, residual: Sequence[float]) -> float:
        """One audit more, an empty residual where every bit was equal. Returns the new length."""
        before = self._sum or [0.0] * len(residual)
        if residual and len(residual) != len(before):
            raise ValueError(f"a sketch of {len(residual)} numbers, those before had {len(before)}")
        moved = [old + new for old, new in zip(before, residual, strict=True)] if residual else before
        length = math.hypot(*moved)
        left = max(0.0, 1.0 - SLACK / length) if length else 0.0
        self._sum = [left * value for value in moved] if left else []
        return left * length


class Drifts:
    """The sums of all workers that a validator audits, the most recent ones. Not thread-safe."""

    def __init__(self) -> None:
        self._places: OrderedDict[Place, dict[str, Drift]] = OrderedDict()

    def add(self, place: Place, residuals: Mapping[str, Sequence[float]]) -> tuple[str, float]:
        """One audit of a worker's stage (`place`: worker, job, stage). Returns the tensor that lies farthest off now,
        and its length."""
        kept = self._places.setdefault(place, {})
        self._places.move_to_end(place)
        while len(self._places) > MAX_PLACES:
            self._places.popitem(last=False)
        farthest = "", 0.0
        for name, residual in residuals.items():
            if name in kept or (residual and len(kept) < MAX_TENSORS):
                length = kept.setdefault(name, Drift()).add(residual)
                if length > farthest[1]:
                    farthest = name, length
                elif length == 0.0:
                    del kept[name]
        return farthest
