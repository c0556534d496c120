"""Runs a graph on tensors without data: shapes, dtypes and who needs a gradient, at the cost of the calls alone.

Torch's meta device computes everything but the numbers, in a time that does not grow with the sizes. It knows nothing
of autocast, whose rules are those of a device with data: a graph with autocast runs on torch's fake tensors instead,
which have no data either and say that they are on the CPU.
Neighbours: `limits.py` (bounds), `gradients.py`, `sharding/profile.py` (bytes of each value).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tensorlink.errors import ProgramError
from tensorlink.program.graph import BufferSpec, Constant, Graph, ParameterSpec
from tensorlink.program.interpreter import Interpreter, Observer
from tensorlink.program.values import DTYPES
from tensorlink.records import Cut, Slot

META = torch.device("meta")


@dataclass
class Placeholders:
    """Everything that enters a graph, without data: parameters, buffers, and inputs for one batch size.

    `device` is where they seem to be, `mode` what new tensors are to be made under.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    inputs: list[Tensor | int]
    device: torch.device
    mode: AbstractContextManager[Any]

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, ParameterSpec],
        buffers: Mapping[str, BufferSpec | Constant],
        inputs: Cut,
        batch: int,
        graph: Graph,
    ) -> Placeholders:
        """As the program declares them, for this graph; raises ProgramError for a shape that cannot be."""
        casts = any(node.autocast for node in graph.all_nodes())
        device = torch.device("cpu") if casts else META
        mode = FakeTensorMode() if casts else nullcontext()
        try:
            with mode, device:
                return cls(
                    parameters={name: _parameter(spec) for name, spec in parameters.items()},
                    buffers={name: _empty(spec.dtype, spec.shape) for name, spec in buffers.items()},
                    inputs=[_entering(slot, batch) for slot in inputs.slots],
                    device=device,
                    mode=mode,
                )
        except (RuntimeError, ValueError) as error:
            raise ProgramError(f"a declared shape cannot be: {str(error)[:200]}") from error

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor as this one, without data."""
        with self.mode, self.device:
            return torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)


def dry_run(
    graph: Graph, placeholders: Placeholders, inputs: Cut, observer: Observer | None = None, grad: bool = True
) -> list[Any]:
    """Runs `graph` without data and returns its outputs, which have none.

    `observer` sees every node's result. Raises ProgramError naming the node where shapes or dtypes do not fit.
    """
    buffers = dict(placeholders.buffers)
    interpreter = Interpreter(graph, placeholders.parameters, buffers, cut=inputs, device=placeholders.device)
    try:
        with placeholders.mode, torch.set_grad_enabled(grad):
            return interpreter.run(placeholders.inputs, seed_for=lambda key: 0, observer=observer)
    except MemoryError as error:  # not even without data
        raise ProgramError(f"there is no memory for what a node makes: {str(error)[:200]}") from error


def _entering(slot: Slot, batch: int) -> Tensor | int:
    if slot.type == "symint":
        return batch
    tensor = _empty(slot.dtype, tuple(batch if size == -1 else size for size in slot.shape))
    return tensor.requires_grad_(slot.requires_grad and _differentiable(tensor))


def _parameter(spec: ParameterSpec) -> Tensor:
    tensor = _empty(spec.dtype, spec.shape)
    return torch.nn.Parameter(tensor, requires_grad=spec.requires_grad and _differentiable(tensor))


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _empty(dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype])
