"""Tensors that arrived, held against the cut: what a peer sends is checked before anything computes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tensorlink.errors import TensorError
from tensorlink.pipeline.backward import Value
from tensorlink.pipeline.inbox import Delivery
from tensorlink.program.values import DTYPE_NAMES
from tensorlink.records import Slot

MAX_SIZE = 1 << 48


def values(expected: Sequence[Slot], arrived: Mapping[int, Tensor]) -> list[Value]:
    """What arrived as a graph takes it, in the order of the slots. Raises TensorError for a size out of range."""
    return [_size(arrived[i]) if slot.type == "symint" else arrived[i] for i, slot in enumerate(expected)]


def _size(tensor: Tensor) -> int:
    size = int(tensor)
    if not 0 <= size < MAX_SIZE:
        raise TensorError(f"a size of {size}: sizes are 0 to {MAX_SIZE}")
    return size


def check_fits(slot: Slot, delivery: Delivery, tensor: Tensor) -> None:
    """Raises TensorError unless dtype and shape are what the slot says."""
    shape, dtype = list(tensor.shape), DTYPE_NAMES[tensor.dtype]
    wanted_dtype, wanted = ("int64", []) if slot.type == "symint" else (slot.dtype, list(slot.shape))
    fits = len(shape) == len(wanted) and all(want in (-1, size) for want, size in zip(wanted, shape, strict=True))
    if dtype != wanted_dtype or not fits:
        raise TensorError(
            f"{delivery.type} of micro-batch {delivery.micro_batch}, slot {slot.name!r}: found {dtype} {shape}, needed "
            f"{wanted_dtype} {wanted} (-1 is the batch)"
        )
