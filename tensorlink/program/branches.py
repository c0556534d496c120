"""`torch.cond` in a program: of two graphs over the same operands, the predicate's value says which is computed.

As in eager torch, every operand that needs a gradient gets one, zeros from the branch that was not taken: to an
optimizer, zeros are not the same as no gradient. Without data both branches are computed, for either may come.
Neighbours: `interpreter.py` (compiles the branches), `validate.py` (what a branch may be), `limits.py` (what it
costs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tensorlink.program.alignment import has_data
from tensorlink.program.dropout import Seed

Branch = Callable[[Sequence[Any], Seed], list[Any]]


def conditional(
    if_true: Branch, if_false: Branch, seed_for: Seed, predicate: Tensor | bool, operands: list[Any]
) -> list[Tensor]:
    """What the branch that `predicate` (one boolean) names makes of the operands.

    Raises ValueError where the branches return anything but tensors, or tensors that differ in dtype or shape.
    """
    if isinstance(predicate, Tensor) and not has_data(predicate):
        outputs, others = if_true(operands, seed_for), if_false(operands, seed_for)
        if [_described(output) for output in outputs] != [_described(other) for other in others]:
            raise ValueError(f"the branches return {outputs!s:.100} and {others!s:.100}; return the same in both")
    else:
        outputs = (if_true if predicate else if_false)(operands, seed_for)
    if not all(isinstance(output, Tensor) for output in outputs):
        raise ValueError("a branch returns tensors")
    wanting = [operand for operand in operands if isinstance(operand, Tensor) and operand.requires_grad]
    return list(_Reached.apply(len(outputs), *outputs, *wanting)) if wanting else outputs


def _described(output: Any) -> Any:
    return (output.dtype, output.shape) if isinstance(output, Tensor) else type(output)


class _Reached(torch.autograd.Function):
    """The outputs, as something that all operands have a part in: those that had none get zeros for a gradient."""

    @staticmethod
    def forward(ctx: Any, num_outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shapes = [(operand.shape, operand.dtype, operand.device) for operand in tensors[num_outputs:]]
        return tuple(output.view_as(output) for output in tensors[:num_outputs])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes]
        return (None, *gradients, *zeros)
