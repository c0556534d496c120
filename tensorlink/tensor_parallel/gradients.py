"""The gradients of a step, added on each rank over its parts, and whole where they are hashed, clipped or sent."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tensorlink.pipeline.backward import GradientSum, squared_norm
from tensorlink.tensor_parallel.weights import ShardedWeights, joined


class ShardedGradientSum(GradientSum):
    """As `GradientSum`, with a sum for each rank. The whole sums are made once between two additions."""

    def __init__(self, weights: ShardedWeights) -> None:
        super().__init__()
        self._weights = weights
        self._ranks = [GradientSum() for _ in weights.parts]
        self._whole: dict[str, Tensor] | None = None

    def on(self, rank: int) -> GradientSum:
        """A rank's sum, to be added to by that rank's thread."""
        self._whole = self._norm = None
        return self._ranks[rank]

    def lend(self, memory: Mapping[str, Tensor]) -> None:
        """Whole tensors are of no use to sums of parts."""

    def take(self) -> dict[str, Tensor]:
        found = {name: tensor.contiguous() for name, tensor in sorted(self.sums().items())}
        self.drop()
        return found

    def drop(self) -> None:
        for total in self._ranks:
            total.drop()
        self._whole = self._norm = None

    def squared_norm(self) -> tuple[float, str]:
        if self._norm is None:
            self._norm = squared_norm(self.sums())
        return self._norm

    def sums(self) -> Mapping[str, Tensor]:
        if self._whole is None:
            sums = [total.sums() for total in self._ranks]
            splits = self._weights.splits
            self._whole = {name: joined([one[name] for one in sums], splits.get(name)) for name in sums[0]}
        return self._whole

    def __len__(self) -> int:
        return len(self._ranks[0])
