"""Digests of torch tensors: the bridge from tensors to `tensorlink.records.tensor_digest`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smartnodes_core.usage import USAGE
from tensorlink.program.values import DTYPE_NAMES
from tensorlink.records import set_root, tensor_digest


def tensor_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; the caller keeps the tensor alive."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def digest(name: str, tensor: Tensor) -> bytes:
    """32 bytes that bind name, dtype, shape and content. Zero-dimensional, strided and device tensors are welcome."""
    tensor = tensor.detach().cpu().contiguous()
    with USAGE.timed("hashing"):
        return tensor_digest(name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), tensor_view(tensor))


def digests(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The digest of each tensor under its name."""
    return {name: digest(name, tensor) for name, tensor in tensors.items()}


def root(tensors: Mapping[str, Tensor]) -> bytes:
    """The root over named tensors."""
    return set_root(digests(tensors))


def slots(values: Sequence[Tensor | int] | Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Values of a cut under the names by which both ends of a link commit to them: the slot's index. Sizes become
    int64."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    return {str(slot): as_tensor(value) for slot, value in items}


def as_tensor(value: Tensor | int) -> Tensor:
    """A size as it crosses a cut: an int64 tensor of shape []."""
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
