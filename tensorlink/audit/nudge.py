"""Units from inputs and weights that are a little different, which tells zeros that must be from zeros by chance.

Where no gradient flows (a row of an embedding that no token names), there is none from other numbers either. Where
honest terms cancel (a bias before BatchNorm), they leave now nothing and now a rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tensorlink.steplog.replay import NATIVE, Replayer, UnitInputs, Variant

#: Replays until a zero counts as one that must be, in turn in float64 and in the unit's own precision.
VARIANTS = (Variant("nudged, float64", exact=True), NATIVE) * 4
#: Above a rounding of bfloat16.
_SIZE = 2.0**-6


def nudged(replayer: Replayer, units: Sequence[UnitInputs], draw: int) -> tuple[Replayer, list[UnitInputs]]:
    """The same program over other weights, and units with other inputs and gradients; zeros stay zeros."""
    generator = torch.Generator().manual_seed(draw)

    def other(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _nudged(tensor, generator) for name, tensor in tensors.items()}

    moved = Replayer(replayer.program, replayer.loss, other(replayer.weights), replayer.bounds)
    return moved, [replace(unit, x=other(unit.x), gy=other(unit.gy)) for unit in units]


def _nudged(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    factor = 1 + _SIZE * (2 * torch.rand(tensor.shape, generator=generator) - 1)
    return (tensor.detach() * factor.to(tensor.dtype)).to(tensor.dtype)
