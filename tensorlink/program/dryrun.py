"""Runs a graph on tensors without data: shapes, dtypes and who needs a gradient, at the cost of the calls alone.

Torch's meta device computes everything but the numbers, in a time that does not grow with the sizes.
Neighbours: `limits.py` (bounds), `gradients.py`, `sharding/profile.py` (bytes of each value).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensorlink.errors import ProgramError
from tensorlink.program.graph import BufferSpec, Constant, Graph, ParameterSpec
from tensorlink.program.interpreter import Interpreter, Observer
from tensorlink.program.values import DTYPES
from tensorlink.records import Cut, Slot

META = torch.device("meta")


def dry_run(
    graph: Graph,
    parameters: Mapping[str, ParameterSpec],
    buffers: Mapping[str, BufferSpec | Constant],
    inputs: Cut,
    batch: int,
    observer: Observer | None = None,
    grad: bool = True,
) -> list[Any]:
    """Runs `graph` for a batch of `batch` samples on the meta device and returns its outputs there.

    `observer` sees every node's result. Raises ProgramError naming the node where shapes or dtypes do not fit.
    """
    try:
        weights = {name: _meta(spec.dtype, spec.shape, spec.requires_grad) for name, spec in parameters.items()}
        state = {name: _meta(spec.dtype, spec.shape, False) for name, spec in buffers.items()}
        entering = [_entering(slot, batch) for slot in inputs.slots]
    except (RuntimeError, ValueError) as error:
        raise ProgramError(f"a declared shape cannot be: {str(error)[:200]}") from error
    interpreter = Interpreter(graph, weights, state, cut=inputs, device=META)
    with torch.set_grad_enabled(grad):
        return interpreter.run(entering, seed_for=lambda key: 0, observer=observer)


def _entering(slot: Slot, batch: int) -> Tensor | int:
    if slot.type == "symint":
        return batch
    return _meta(slot.dtype, tuple(batch if size == -1 else size for size in slot.shape), slot.requires_grad)


def _meta(dtype: str, shape: tuple[int, ...], requires_grad: bool) -> Tensor:
    tensor = torch.empty(shape, dtype=DTYPES[dtype], device=META)
    return tensor.requires_grad_(requires_grad and (tensor.is_floating_point() or tensor.is_complex()))
