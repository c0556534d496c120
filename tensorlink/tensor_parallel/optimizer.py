"""The optimizer of a split stage: each rank updates its parts, from its parts of the gradient that is committed to.

An optimizer that looks at each element alone gives the same on parts as on the whole. Those that look at a matrix as
one (`WHOLE_MATRIX`) are run on whole copies, in the memory of the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tensorlink.stage_optimizer import StageOptimizer
from tensorlink.tensor_parallel.group import Group
from tensorlink.tensor_parallel.ranks import Ranks
from tensorlink.tensor_parallel.weights import ShardedWeights, Whole, joined

#: Their update of one element depends on others: norms of rows and columns, an orthogonalised matrix.
WHOLE_MATRIX = ("Adafactor", "Muon")


def make_optimizer(
    name: str, groups: Sequence[Mapping[str, Any]], weights: ShardedWeights, ranks: Ranks
) -> StageOptimizer:
    """The optimizer `name` for these weights. Raises OptimizerError as `StageOptimizer` does."""
    kind = GatheredOptimizer if name in WHOLE_MATRIX else ShardedOptimizer
    return kind(name, groups, weights, ranks)


class ShardedOptimizer(StageOptimizer):
    """One optimizer for each rank. This one has parameters without data: it knows names, shapes and options."""

    def __init__(self, name: str, groups: Sequence[Mapping[str, Any]], weights: ShardedWeights, ranks: Ranks) -> None:
        shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in weights.items()}
        super().__init__(
            name,
            groups,
            {key: shape.requires_grad_(weights.parts[0][key].requires_grad) for key, shape in shapes.items()},
        )
        self._weights, self._ranks = weights, ranks
        self.each = ranks.each(lambda group: StageOptimizer(name, groups, weights.parts[group.rank]))

    def step(self, gradients: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]] | None = None) -> None:
        def update(group: Group) -> None:
            self.each[group.rank].step(self._weights.of_rank(gradients, group), groups)

        self._ranks.each(update)

    def state_tensors(self) -> Mapping[str, Tensor]:
        """Whole tensors, each made when it is asked for."""
        states = [one.state_tensors() for one in self.each]
        return Whole(list(states[0]), lambda name: joined([state[name] for state in states], self._split(name, states)))

    def _split(self, name: str, states: Sequence[Mapping[str, Tensor]]) -> Any:
        """State that is as large as its parameter is split as that; a count of steps is the same on all ranks."""
        parameter = name.rpartition("/")[0]
        like = self._weights.parts[0][parameter]
        return self._weights.splits.get(parameter) if states[0][name].shape == like.shape else None

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.check_state_tensors(tensors)

        def load(group: Group) -> None:
            found = {}
            for name, tensor in tensors.items():
                parameter = name.rpartition("/")[0]
                is_like = tensor.shape == self.parameters[parameter].shape
                found[name] = self._weights.of_rank({parameter: tensor}, group)[parameter] if is_like else tensor
            self.each[group.rank].load_state_tensors(found)

        self._ranks.each(load)


class GatheredOptimizer(StageOptimizer):
    """One optimizer over whole copies, which are filled before and given back after each step."""

    def __init__(self, name: str, groups: Sequence[Mapping[str, Any]], weights: ShardedWeights, ranks: Ranks) -> None:
        copies = {key: tensor.clone() for key, tensor in weights.items()}
        super().__init__(
            name,
            groups,
            {key: copy.requires_grad_(weights.parts[0][key].requires_grad) for key, copy in copies.items()},
        )
        self._weights = weights

    def step(self, gradients: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]] | None = None) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._weights[name])
        super().step(gradients, groups)
        self._weights.replace(self.parameters)
