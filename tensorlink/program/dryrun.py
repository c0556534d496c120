"""Runs a graph on tensors without data: shapes, dtypes and who needs a gradient, at the cost of the calls alone.

Torch's meta device computes everything but the numbers, in a time that does not grow with the sizes.
Neighbours: `limits.py` (bounds), `gradients.py`, `sharding/profile.py` (bytes of each value).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorlink.errors import ProgramError
from tensorlink.program.graph import BufferSpec, Constant, Graph, ParameterSpec
from tensorlink.program.interpreter import Interpreter, Observer
from tensorlink.program.values import DTYPES
from tensorlink.records import Cut, Slot

META = torch.device("meta")


@dataclass
class Placeholders:
    """Everything that enters a graph, without data: parameters, buffers, and inputs for one batch size."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    inputs: list[Tensor | int]

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, ParameterSpec],
        buffers: Mapping[str, BufferSpec | Constant],
        inputs: Cut,
        batch: int,
    ) -> Placeholders:
        """As the program declares them; raises ProgramError for a shape that cannot be."""
        try:
            return cls(
                parameters={name: _parameter(spec) for name, spec in parameters.items()},
                buffers={name: _meta(spec.dtype, spec.shape) for name, spec in buffers.items()},
                inputs=[_entering(slot, batch) for slot in inputs.slots],
            )
        except (RuntimeError, ValueError) as error:
            raise ProgramError(f"a declared shape cannot be: {str(error)[:200]}") from error


def dry_run(
    graph: Graph, placeholders: Placeholders, inputs: Cut, observer: Observer | None = None, grad: bool = True
) -> list[Any]:
    """Runs `graph` on the meta device and returns its outputs there.

    `observer` sees every node's result. Raises ProgramError naming the node where shapes or dtypes do not fit.
    """
    buffers = dict(placeholders.buffers)
    interpreter = Interpreter(graph, placeholders.parameters, buffers, cut=inputs, device=META)
    with torch.set_grad_enabled(grad):
        return interpreter.run(placeholders.inputs, seed_for=lambda key: 0, observer=observer)


def _entering(slot: Slot, batch: int) -> Tensor | int:
    if slot.type == "symint":
        return batch
    tensor = _meta(slot.dtype, tuple(batch if size == -1 else size for size in slot.shape))
    return tensor.requires_grad_(slot.requires_grad and _differentiable(tensor))


def _parameter(spec: ParameterSpec) -> Tensor:
    tensor = _meta(spec.dtype, spec.shape)
    return torch.nn.Parameter(tensor, requires_grad=spec.requires_grad and _differentiable(tensor))


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _meta(dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device=META)
