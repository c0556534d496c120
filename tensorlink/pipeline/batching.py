"""How a batch becomes micro-batches, and how much each of them counts; the same for the network and the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from smartnodes_core.errors import JobError
from tensorlink.errors import InputError, NonFiniteError, TensorError, TraceError
from tensorlink.program.inputs import flatten_inputs, split
from tensorlink.program.trace import TracedModel
from tensorlink.program.values import DTYPES
from tensorlink.records import Slot

LossReduction = str | Callable[[Any], float]


def flat_inputs(traced: TracedModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The program's inputs for a call with these arguments. Raises InputError where they do not fit the trace, or ask
    for a gradient that the trace did not foresee.
    """
    try:
        flat = flatten_inputs(traced, args, kwargs)
    except TensorError as error:
        raise InputError(str(error)) from None
    for slot, tensor in zip(traced.inputs.slots, flat, strict=True):
        if isinstance(tensor, Tensor) and tensor.requires_grad and not slot.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"input {slot.name!r} requires a gradient, the example input did not: pass example_inputs that do, or "
                "detach it"
            )
    return flat


def check_finite(values: Sequence[Any], names: Sequence[str]) -> None:
    """Raises NonFiniteError naming the input and the sample that holds NaN or infinity."""
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all()):
            continue
        rows = (~torch.isfinite(value.reshape(len(value) if value.dim() else 1, -1))).any(dim=1).nonzero().flatten()
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        raise NonFiniteError(
            f"{name} holds NaN or infinity in sample {int(rows[0])}{more}: clean the batch before training on it"
        )


def micro_batches(traced: TracedModel, inputs: Sequence[Tensor], count: int) -> tuple[list[list[Tensor]], list[int]]:
    """The inputs of each micro-batch, and how many samples each has."""
    pieces = split(traced, inputs, count)
    slot = traced.binding.dynamic.index(True)
    return pieces, [len(piece[slot]) for piece in pieces]


def check_outputs(traced: TracedModel, num_micro_batches: int) -> None:
    """Raises TraceError for an output that cannot be put together from those of micro-batches."""
    for slot in traced.outputs.slots:
        is_tensor, batch_dims = slot.type == "tensor", slot.shape.count(-1)
        scalar = not slot.shape and DTYPES[slot.dtype].is_floating_point
        if not is_tensor or (num_micro_batches > 1 and batch_dims != 1 and not scalar):
            raise TraceError(
                f"{slot.name} has shape {list(slot.shape)}, needed a tensor with one batch dimension or a scalar, to "
                f"put it together from {num_micro_batches} micro-batches: return what it is computed from and "
                "compute it outside, or use micro_batches=1"
            )


def joined(slot: Slot, pieces: Sequence[Tensor], samples: Sequence[int]) -> Tensor:
    """An output of the batch from those of its micro-batches: one after the other along the batch; a scalar (a loss,
    say) is averaged by samples."""
    if len(pieces) == 1:
        return pieces[0]
    if slot.shape:
        return torch.cat(list(pieces), dim=slot.shape.index(-1))
    parts = [piece * (size / sum(samples)) for piece, size in zip(pieces, samples, strict=True)]
    return sum(parts[1:], parts[0])


def divided(slot: Slot, gradient: Tensor, shapes: Sequence[torch.Size], samples: Sequence[int]) -> list[Tensor]:
    """The gradients for the micro-batches' outputs of these shapes from that of `joined`."""
    if len(shapes) == 1:
        return [gradient]
    if slot.shape:
        dim = slot.shape.index(-1)
        return list(torch.tensor_split(gradient, boundaries([shape[dim] for shape in shapes]), dim=dim))
    return [gradient * (size / sum(samples)) for size in samples]


def boundaries(samples: Sequence[int]) -> list[int]:
    """Where `torch.tensor_split` cuts a batch into micro-batches of these sizes."""
    found, at = [], 0
    for size in samples[:-1]:
        at += size
        found.append(at)
    return found


def split_targets(target: Any, samples: Sequence[int]) -> list[Any]:
    """The target of each micro-batch: tensors, however nested, are cut with the batch; what has no batch is passed
    whole. Raises InputError where no tensor has as many samples as the inputs.
    """
    leaves, tree = pytree.tree_flatten(target)
    total = sum(samples)
    cut = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == total for leaf in leaves]
    if not any(cut):
        found = [list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
        raise InputError(f"the target has {found}, needed a tensor with the inputs' {total} samples first")
    pieces = [
        torch.tensor_split(leaf, boundaries(samples)) if is_cut else (leaf,) * len(samples)
        for leaf, is_cut in zip(leaves, cut, strict=True)
    ]
    return [pytree.tree_unflatten(list(items), tree) for items in zip(*pieces, strict=True)]


def target_tensors(target: Any) -> list[Tensor]:
    """The tensors of a target, in the order of the loss program's slots."""
    return [leaf for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor)]


def bind_batch(batch: Sequence[Any], by_keyword: bool) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, keyword inputs and target of `train_step`'s arguments. A model traced with keywords takes
    them as one map.
    """
    if len(batch) < 2:
        raise InputError(f"train_step takes the model's inputs and then the target, found {len(batch)} arguments")
    *inputs, target = batch
    if by_keyword and len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return (), dict(inputs[0]), target
    return tuple(inputs), {}, target


def loss_weights(reduction: LossReduction, samples: Sequence[int], targets: Sequence[Any]) -> list[float]:
    """What each micro-batch's loss counts: by samples for "mean", one for "sum", else by `reduction(target)`.

    Raises JobError for another reduction, or when nothing counts.
    """
    if reduction == "sum":
        return [1.0] * len(samples)
    if callable(reduction):
        counts = [float(reduction(target)) for target in targets]
    elif reduction == "mean":
        counts = [float(size) for size in samples]
    else:
        raise JobError(f"found loss_reduction={reduction!r}, needed 'mean', 'sum' or a function of the target")
    total = sum(counts)
    if not total:
        raise JobError("the weights of all micro-batches are zero: the batch has no valid targets")
    return [count / total for count in counts]
