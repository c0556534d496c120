"""Tensors as the bodies of frames: no copy on the way out, straight into a tensor on the way in.

What a header may say is in `headers.py`, which both processes of a rig read.
"""

from __future__ import annotations

from typing import Any

import torch

from smartnodes_core.errors import ProtocolError
from tensorlink.pipeline.headers import ITEM_BYTES, MAX_TENSOR_BYTES, num_tensor_bytes
from tensorlink.records import Slot

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which a dtype travels. Raises ProtocolError for one that does not."""
    if dtype not in _NAMES:
        raise ProtocolError(f"tensors of {dtype} do not travel; of these they do: {', '.join(DTYPES)}")
    return _NAMES[dtype]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; the caller keeps the tensor alive."""
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array).cast("B")


class FrameTensor:
    """Receiving: `allocate` checks a header against the slot it is for, `wrap` makes the tensor of what came."""

    @staticmethod
    def allocate(slot: Slot, header: dict[str, Any], num_bytes: int) -> memoryview:
        """A buffer for the body. Raises ProtocolError unless dtype, shape and byte count are what the slot says."""
        expected = num_tensor_bytes(header)
        dtype, shape = header["dtype"], header["shape"]
        fits = len(shape) == len(slot.shape) and all(
            want in (-1, size) for want, size in zip(slot.shape, shape, strict=True)
        )
        if slot.dtype != dtype or not fits:
            raise ProtocolError(f"{slot.name}: found {dtype}{shape}, needed {slot.dtype}{list(slot.shape)}")
        if num_bytes != expected:
            raise ProtocolError(f"{slot.name}: {num_bytes} bytes are not {dtype}{shape}")
        if num_bytes > MAX_TENSOR_BYTES:
            raise ProtocolError(f"{slot.name}: {num_bytes} bytes in one tensor, at most {MAX_TENSOR_BYTES} are taken")
        if not num_bytes:
            return memoryview(bytearray())
        array: Any = torch.empty(num_bytes, dtype=torch.uint8).numpy()
        return memoryview(array).cast("B")

    @staticmethod
    def wrap(header: dict[str, Any], body: memoryview) -> torch.Tensor:
        """The tensor over a received body, sharing its memory."""
        dtype = DTYPES[header["dtype"]]
        if not len(body):
            return torch.empty(header["shape"], dtype=dtype)
        return torch.frombuffer(body, dtype=torch.uint8).view(dtype).reshape(header["shape"])
