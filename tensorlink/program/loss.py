"""A loss function as data, so that the last stage can compute it without the user's code.

Traced like a module, with the model's outputs and the targets as inputs and one scalar as output. What it holds
besides (class weights and other constants) is small and travels inside the program, whose digest thus binds all of
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorlink.errors import TensorError, TraceError
from tensorlink.program.capture import capture
from tensorlink.program.graph import Constant, LossProgram
from tensorlink.program.lowering import lower
from tensorlink.program.state import ModuleState
from tensorlink.program.validate import MAX_CONSTANT_BYTES
from tensorlink.program.values import DTYPE_NAMES, DTYPES
from tensorlink.program.weights import tensor_bytes, writable_bytes
from tensorlink.records import Cut, Slot


class _Loss(nn.Module):
    """The loss function as a module; a loss that is a module keeps its own buffers and mode."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, outputs: Any, target: Any) -> Any:
        return self.function(outputs, target)


def trace_loss(
    loss_fn: Callable[[Any, Any], Tensor],
    output_example: Any,
    target_example: Any,
    *,
    num_samples: int | None = None,
    autocast: torch.dtype | None = None,
) -> LossProgram:
    """Traces `loss_fn(outputs, target)`, where both are tensors or structures of them as the model and the user give
    them.

    `num_samples` is the batch size, by default that of the first tensor. A tensor's dimension 0 is the batch if it has
    that size; an output's may be a multiple of it, as in logits of shape (B * T, C). `autocast` is that of `trace`.
    Raises TraceError unless the result is one scalar that the outputs have a gradient of, and the function has no
    trainable parameters.
    """
    module = _Loss(loss_fn)
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise TraceError("the loss has trainable parameters; put them into the model and return the loss from it")
    leaves, tree = pytree.tree_flatten((output_example, target_example))
    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
    num_outputs = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(output_example))
    batch = num_samples or next((len(tensor) for tensor in tensors if tensor.dim()), 0)
    if batch == 0 or num_outputs == 0:
        raise TraceError("a loss needs at least one output tensor with a batch of at least one sample")
    rows = tuple(
        len(t) // batch if t.dim() and (len(t) == batch or (at < num_outputs and len(t) % batch == 0)) else 0
        for at, t in enumerate(tensors)
    )
    if batch == 1:
        tensors = [torch.cat([t, t]) if times else t for t, times in zip(tensors, rows, strict=True)]
    tensors = [t.clone().requires_grad_(at < num_outputs and t.is_floating_point()) for at, t in enumerate(tensors)]

    def rebuild(flat: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        remaining = iter(flat)
        return tuple(pytree.tree_unflatten([next(remaining) if isinstance(x, Tensor) else x for x in leaves], tree)), {}

    state = ModuleState.of(module)
    captured = capture(module, tensors, rows, rebuild, training=True, autocast=autocast)
    lowered = lower(captured, state)
    if captured.leaves != [0] or lowered.info[lowered.graph.outputs[0]].shape != ():
        found = [list(lowered.info[value].shape) for value in lowered.graph.outputs]
        raise TraceError(f"a loss is one scalar, found outputs of shapes {found}; reduce it with mean() or sum()")
    if lowered.graph.mutations:
        raise TraceError(f"the loss changes {[name for name, _ in lowered.graph.mutations]}; a loss keeps no state")
    slots = []
    for at, (value, tensor) in enumerate(zip(lowered.graph.inputs, tensors, strict=True)):
        info = lowered.info[value]
        name = f"output.{at}" if at < num_outputs else f"target.{at - num_outputs}"
        slots.append(_slot(name, info.dtype, info.shape, tensor.requires_grad))
    output = lowered.info[lowered.graph.outputs[0]]
    held = {**state.parameters, **state.buffers, **state.constants}
    return LossProgram(
        graph=lowered.graph,
        inputs=Cut(slots=slots),
        outputs=Cut(slots=[_slot("loss", output.dtype, (), True)]),
        constants=_constants({name: held[name] for name in lowered.graph.buffer_names()}),
        num_outputs=num_outputs,
        rows=rows,
    )


def _constants(tensors: dict[str, Tensor]) -> dict[str, Constant]:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > MAX_CONSTANT_BYTES:
        raise TraceError(
            f"the loss holds {size} bytes of tensors, at most {MAX_CONSTANT_BYTES}; pass them as targets instead"
        )
    return {
        name: Constant(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), bytes(tensor_bytes(tensor)))
        for name, tensor in tensors.items()
    }


def constants_of(program: LossProgram, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The constants of a loss program as tensors: the `buffers` of its interpreter."""
    tensors = {}
    for name, constant in program.constants.items():
        flat = torch.empty(constant.shape, dtype=DTYPES[constant.dtype])
        if len(constant.data) != flat.numel() * flat.element_size():
            raise TensorError(f"constant {name!r:.60} has {len(constant.data)} bytes, {flat.nbytes} are needed")
        if constant.data:
            writable_bytes(flat)[:] = constant.data
        tensors[name] = flat.to(device)
    return tensors


def _slot(name: str, dtype: str, shape: tuple[int, ...], requires_grad: bool) -> Slot:
    return Slot(name=name, type="tensor", dtype=dtype, shape=list(shape), requires_grad=requires_grad)
