"""Memory for what stays from step to step: weights, optimizer state, sums of gradients, copies of a state.

Activations come and go by the megabyte. What stays, allocated among them, would cut the free memory between into
pieces that the next micro-batch cannot use: glibc looks for 96 bytes more than an aligned tensor takes, so that a hole
between two tensors in use never takes another of its own size. It takes mappings of its own instead, in large pages
where the kernel has them, and gives them back when the last tensor in them is gone. Neighbour: `allocator.py`, on what
comes and goes.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

#: Kernels compute other bits for tensors that are aligned less.
ALIGNMENT_BYTES = 64


def lasting(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the dtypes and shapes of `like` (meta tensors will do), contiguous, with arbitrary content, in one
    mapping that lives as long as any of them."""
    offsets, at = {}, 0
    for name, tensor in like.items():
        offsets[name] = at
        at += -(-tensor.numel() * tensor.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    memory = _mapped(at) if at else None
    return {name: _tensor(memory, offsets[name], tensor) for name, tensor in like.items()}


def _tensor(memory: mmap.mmap | None, offset: int, like: Tensor) -> Tensor:
    """A storage of its own for each: nothing that is written to one seems to be a change of another."""
    if memory is None or not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=offset).reshape(like.shape).data


def _mapped(num_bytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel that has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
