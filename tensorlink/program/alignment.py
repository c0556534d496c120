"""Tensors as kernels are to see them: contiguous, and starting at a multiple of 64 bytes.

Alignment alone changes the last bits of attention and of small linear layers (`facts.md`), so whatever comes from a
socket, a file or a user is brought to one form before it enters a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

ALIGNMENT_BYTES = 64


def has_data(tensor: Tensor) -> bool:
    """Whether the tensor has memory, and not a shape and dtype alone."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def is_aligned(tensor: Tensor) -> bool:
    """Whether the tensor is contiguous and starts at a multiple of 64 bytes."""
    return tensor.is_contiguous() and (not has_data(tensor) or tensor.data_ptr() % ALIGNMENT_BYTES == 0)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself if it is aligned, else a copy that is; gradients flow through the copy."""
    return tensor if is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)
