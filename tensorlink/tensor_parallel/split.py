"""How one tensor lies over the ranks of a rig: plain data, and the two ways between its parts and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Split:
    """Split along `dim`, counted from 0, into equal parts.

    With `blocks` over 1 the dimension is that many equal blocks one after the other, each of them split: a rank's part
    is its part of each block, in order. So lie the query, key and value that one matrix makes together.
    """

    dim: int
    blocks: int = 1

    def __str__(self) -> str:
        return f"dim {self.dim}" + (f" in {self.blocks} blocks" if self.blocks > 1 else "")

    def at(self, dim: int) -> Split:
        """The same where the dimension has another number."""
        return replace(self, dim=dim)

    def fits(self, shape: Sequence[int], num_parts: int) -> bool:
        """Whether a tensor of this shape can be split so."""
        return 0 <= self.dim < len(shape) and shape[self.dim] % (self.blocks * num_parts) == 0 and shape[self.dim] > 0

    def part(self, tensor: Tensor, index: int, num_parts: int) -> Tensor:
        """Part `index` of a whole tensor: contiguous, with memory of its own."""
        size = tensor.size(self.dim) // (self.blocks * num_parts)
        blocks = tensor.unflatten(self.dim, (self.blocks, num_parts, size)).select(self.dim + 1, index)
        return blocks.flatten(self.dim, self.dim + 1).clone(memory_format=torch.contiguous_format)

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor whose parts these are, in their order."""
        if self.blocks == 1:
            return torch.cat(list(parts), self.dim)
        stacked = torch.stack([part.unflatten(self.dim, (self.blocks, -1)) for part in parts], self.dim + 1)
        return stacked.flatten(self.dim, self.dim + 2)
