"""The state of a stage before a step, kept so that the step can be executed again: by an auditor, or by a
replacement.

Parameters and optimizer state are copied, for the optimizer writes into them. Buffers are values
(`program/interpreter.py` replaces them), so holding on to the old ones is a snapshot. A snapshot that leaves the
window lends its memory to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorlink.lasting import lasting


@dataclass
class Snapshot:
    """`optimizer` holds state tensors under `parameter/state name`, as `stage_optimizer.state_tensors` gives them.
    While it has `readers`, its memory is lent to nobody."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    readers: int = 0

    @property
    def num_bytes(self) -> int:
        """Memory held, buffers not counted: they are shared with the stage until they change."""
        return sum(t.numel() * t.element_size() for part in (self.weights, self.optimizer) for t in part.values())

    def mapped(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Snapshot:
        """The same with both maps of copies changed."""
        return Snapshot(change(self.weights), self.buffers, change(self.optimizer))

    def is_all(self, kind: type) -> bool:
        """Whether both maps hold nothing but objects of this class."""
        return all(isinstance(kept, kind) for part in (self.weights, self.optimizer) for kept in part.values())


def take(
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    spare: Snapshot | None = None,
) -> Snapshot:
    """A copy of the state; `spare`, a snapshot that nobody reads any more, gives its memory where shapes agree."""
    return Snapshot(
        _copy(weights, spare.weights if spare else {}),
        dict(buffers),
        _copy(optimizer, spare.optimizer if spare else {}),
    )


def _copy(tensors: Mapping[str, Tensor], spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
    fits = {
        name: old
        for name, tensor in tensors.items()
        if (old := spare.get(name)) is not None and (old.shape, old.dtype) == (tensor.shape, tensor.dtype)
    }
    copies = fits | lasting({name: tensor for name, tensor in tensors.items() if name not in fits})
    with torch.no_grad():
        return {name: copies[name].copy_(tensor) for name, tensor in tensors.items()}
