"""A stage's parameters as its ranks hold them, and as everybody else sees them: whole tensors under their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tensorlink.tensor_parallel.group import Group
from tensorlink.tensor_parallel.plan import ShardingPlan
from tensorlink.tensor_parallel.ranks import Ranks
from tensorlink.tensor_parallel.split import Split


class Whole(Mapping[str, Tensor]):
    """Named tensors that are made when they are asked for, and not kept."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def joined(parts: Sequence[Tensor], split: Split | None) -> Tensor:
    """The whole tensor, on the CPU; the first rank's where all have the same."""
    if split is None:
        return parts[0].detach().cpu()
    return split.whole([part.detach().cpu() for part in parts])


def parted(tensor: Tensor, split: Split | None, group: Group) -> Tensor:
    """What a rank holds of a whole tensor, on its device, in memory of its own."""
    part = tensor if split is None else group.part(tensor, split)
    return part.to(group.device, copy=split is None)


class ShardedWeights(Whole):
    """`parts[rank]` are a rank's parameters: leaves of its autograd graphs, which its optimizer writes into."""

    def __init__(self, whole: Mapping[str, Tensor], plan: ShardingPlan, ranks: Ranks) -> None:
        super().__init__(list(whole), lambda name: joined([part[name] for part in self.parts], self.splits.get(name)))
        self.splits = plan.weights
        self._ranks = ranks
        self.parts: list[dict[str, Tensor]] = ranks.each(
            lambda group: {
                name: parted(tensor.detach(), self.splits.get(name), group).requires_grad_(tensor.requires_grad)
                for name, tensor in whole.items()
            }
        )

    def of_rank(self, tensors: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """A rank's parts of whole tensors with the names and shapes of parameters."""
        return {name: parted(tensor, self.splits.get(name), group) for name, tensor in tensors.items()}

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """New values for these parameters."""

        def copy(group: Group) -> None:
            with torch.no_grad():
                for name, tensor in self.of_rank(tensors, group).items():
                    self.parts[group.rank][name].copy_(tensor)

        self._ranks.each(copy)
