"""What the user passes and gets back, as the flat lists that programs take and give.

A call is bound to the forward's signature as it was at the trace: positional and keyword forms meet in the same
order. Tensors are the program's inputs; everything else was baked in by the trace and must be the same again.
Neighbours: `trace.py` (binds the example), the model wrapper (each call).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorlink.errors import TensorError, TraceError
from tensorlink.program import structure
from tensorlink.program.alignment import aligned
from tensorlink.program.values import DTYPE_NAMES, DTYPES

if TYPE_CHECKING:
    from tensorlink.program.trace import TracedModel


@dataclass(frozen=True)
class Binding:
    """How calls of the traced forward become flat inputs.

    `arguments` are the names bound at the trace and `tree` the structure around all leaves; `literals` maps the
    places of leaves that are no tensors to their values. `names`, `dynamic` (dimension 0 is the batch) speak of the
    tensors alone, in order.
    """

    signature: inspect.Signature
    arguments: tuple[str, ...]
    tree: pytree.TreeSpec
    literals: Mapping[int, Any]
    num_leaves: int
    names: tuple[str, ...]
    dynamic: tuple[bool, ...]
    batch: int

    def rebuild(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the forward around these tensors."""
        remaining = iter(tensors)
        leaves = [self.literals[at] if at in self.literals else next(remaining) for at in range(self.num_leaves)]
        values = pytree.tree_unflatten(leaves, self.tree)
        bound = inspect.BoundArguments(self.signature, dict(zip(self.arguments, values, strict=True)))
        return bound.args, bound.kwargs


def bind_example(
    module: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any], static_inputs: Collection[str]
) -> tuple[Binding, list[Tensor]]:
    """The binding that an example defines, and its tensors, a batch of one widened to two.

    Raises TraceError if the example does not fit the forward or has no batch.
    """
    signature = inspect.signature(module.forward)
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (tuple(example_inputs), {})
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(f"the example inputs do not fit {type(module).__name__}.forward{signature}: {error}") from None
    arguments = tuple(bound.arguments)
    paths, tree = pytree.tree_flatten_with_path([bound.arguments[name] for name in arguments])
    names, tensors, literals = [], [], {}
    for at, (path, leaf) in enumerate(paths):
        if isinstance(leaf, Tensor):
            names.append(_name(arguments, path))
            tensors.append(leaf.detach().requires_grad_(leaf.requires_grad))
        else:
            literals[at] = leaf
    unknown = sorted(set(static_inputs) - set(names))
    if unknown:
        raise TraceError(f"static_inputs names {unknown}, the tensor inputs are {names}")
    batch = next((len(t) for t, name in zip(tensors, names, strict=True) if t.dim() and name not in static_inputs), 0)
    if batch == 0:
        raise TraceError(f"no tensor with a batch dimension among the example inputs {names}; pass at least one sample")
    dynamic = tuple(
        t.dim() > 0 and len(t) == batch and name not in static_inputs for t, name in zip(tensors, names, strict=True)
    )
    if batch == 1:
        tensors = [_doubled(t) if is_dynamic else t for t, is_dynamic in zip(tensors, dynamic, strict=True)]
    binding = Binding(signature, arguments, tree, literals, len(paths), tuple(names), dynamic, max(batch, 2))
    return binding, [aligned(_on_cpu(tensor)) for tensor in tensors]


def _on_cpu(tensor: Tensor) -> Tensor:
    """The tensor, or for one on the meta device zeros like it: traces do not depend on values."""
    return torch.zeros_like(tensor, device="cpu").requires_grad_(tensor.requires_grad) if tensor.is_meta else tensor


def _doubled(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.detach(), tensor.detach()]).requires_grad_(tensor.requires_grad)


def _name(arguments: tuple[str, ...], path: Any) -> str:
    first, *rest = path
    inner = [str(key).strip("[].'\"") for key in rest]
    return ".".join([arguments[first.idx], *inner])


def flatten_inputs(traced: TracedModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The program's inputs for a call of the model with these arguments.

    Raises TensorError that says what was found, what is needed and what to do: another structure, dtype, rank or size
    than traced, or tensors whose batches differ.
    """
    binding = traced.binding
    try:
        bound = binding.signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TensorError(f"the call does not fit the traced forward{binding.signature}: {error}") from None
    given = dict(bound.arguments)
    for name in [name for name in given if name not in binding.arguments]:
        if given.pop(name) is not binding.signature.parameters[name].default:
            raise TensorError(
                f"argument {name!r} was not in the example inputs; trace again with an example that has it"
            )
    missing = [name for name in binding.arguments if name not in given]
    if missing:
        raise TensorError(
            f"arguments {missing} were in the example inputs and are missing; pass them, or trace without them"
        )
    leaves, tree = pytree.tree_flatten([given[name] for name in binding.arguments])
    if tree != binding.tree:
        raise TensorError(f"the inputs have the structure {tree}, traced was {binding.tree}; pass the same structure")
    tensors = []
    for at, leaf in enumerate(leaves):
        if at not in binding.literals:
            tensors.append(leaf)
        elif type(leaf) is not type(binding.literals[at]) or leaf != binding.literals[at]:
            raise TensorError(
                f"{leaf!r:.60} was passed where the example had {binding.literals[at]!r:.60}, which the trace fixed; "
                "trace again for it"
            )
    _check(traced, tensors)
    return tensors


def _check(traced: TracedModel, tensors: list[Any]) -> None:
    batches = {}
    for slot, is_dynamic, tensor in zip(traced.inputs.slots, traced.binding.dynamic, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TensorError(f"input {slot.name!r} is a {type(tensor).__name__}, a tensor is needed")
        shape = list(tensor.shape)
        if tensor.dtype != DTYPES[slot.dtype]:
            found = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
            raise TensorError(f"input {slot.name!r} is {found}, traced was {slot.dtype}; convert it, or trace again")
        if len(shape) != len(slot.shape) or any(a not in (-1, b) for a, b in zip(slot.shape, shape, strict=True)):
            raise TensorError(
                f"input {slot.name!r} has shape {shape}, traced was {slot.shape} (-1 is the batch); only the batch "
                "may vary"
            )
        if is_dynamic:
            batches[slot.name] = shape[0]
    if len(set(batches.values())) != 1 or 0 in batches.values():
        raise TensorError(f"the inputs have batches of {batches}; one size, at least 1, is needed")


def unflatten_outputs(traced: TracedModel, outputs: Sequence[Any]) -> Any:
    """What the module would have returned, around these outputs: the same classes, not only the same structure."""
    if len(outputs) != len(traced.outputs.slots):
        raise TensorError(f"{len(outputs)} outputs, the program gives {len(traced.outputs.slots)}")
    leaves = [outputs[leaf] if isinstance(leaf, int) else leaf.value for leaf in traced.output_leaves]
    return pytree.tree_unflatten(leaves, traced.output_tree)


def split(traced: TracedModel, inputs: Sequence[Tensor], num_micro_batches: int) -> list[list[Tensor]]:
    """The inputs of each micro-batch, by `tensor_split` along the batch; inputs without a batch are passed whole.

    Fewer samples than micro-batches make fewer micro-batches, of one sample each; none is empty.
    """
    dynamic = traced.binding.dynamic
    batch = next(len(tensor) for tensor, is_dynamic in zip(inputs, dynamic, strict=True) if is_dynamic)
    count = min(num_micro_batches, batch)
    pieces = [
        tensor.tensor_split(count) if is_dynamic else (tensor,) * count
        for tensor, is_dynamic in zip(inputs, dynamic, strict=True)
    ]
    return [list(items) for items in zip(*pieces, strict=True)]


def rebuild_outputs(spec: structure.Spec, outputs: Sequence[Any]) -> Any:
    """What the module returns in plain tuples, lists and dicts, for those who have the JSON description alone."""
    return structure.rebuild(spec, outputs)
