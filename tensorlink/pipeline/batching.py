"""How a batch becomes micro-batches, and how much each of them counts; the same for the network and the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from smartnodes_core.errors import JobError
from tensorlink.program.inputs import split
from tensorlink.program.trace import TracedModel

LossReduction = str | Callable[[Any], float]


def micro_batches(traced: TracedModel, inputs: Sequence[Tensor], count: int) -> tuple[list[list[Tensor]], list[int]]:
    """The inputs of each micro-batch, and how many samples each has."""
    pieces = split(traced, inputs, count)
    slot = traced.binding.dynamic.index(True)
    return pieces, [len(piece[slot]) for piece in pieces]


def boundaries(samples: Sequence[int]) -> list[int]:
    """Where `torch.tensor_split` cuts a batch into micro-batches of these sizes."""
    found, at = [], 0
    for size in samples[:-1]:
        at += size
        found.append(at)
    return found


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
