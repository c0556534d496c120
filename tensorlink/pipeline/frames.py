"""Tensors as the bodies of frames: no copy on the way out, straight into a tensor on the way in."""

from __future__ import annotations

import math
from typing import Any

import torch

from smartnodes_core.errors import ProtocolError
from tensorlink.records import Slot

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which a dtype travels. Raises ProtocolError for one that does not."""
    if dtype not in _NAMES:
        raise ProtocolError(f"tensors of {dtype} do not travel; of these they do: {', '.join(DTYPES)}")
    return _NAMES[dtype]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; the caller keeps the tensor alive."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()).cast("B")


class FrameTensor:
    """Receiving: `allocate` checks a header against the slot it is for, `wrap` makes the tensor of the filled buffer."""

    @staticmethod
    def allocate(slot: Slot, header: dict[str, Any], num_bytes: int) -> memoryview:
        """A buffer for the body. Raises ProtocolError unless dtype, shape and byte count are what the slot says."""
        shape = [int(size) for size in header["shape"]]
        fits = len(shape) == len(slot.shape) and all(
            want in (-1, size) for want, size in zip(slot.shape, shape, strict=True)
        )
        dtype = DTYPES.get(header["dtype"])
        if not fits or dtype is None or slot.dtype != header["dtype"]:
            raise ProtocolError(f"{slot.name}: found {header['dtype']}{shape}, needed {slot.dtype}{list(slot.shape)}")
        if num_bytes != math.prod(shape) * dtype.itemsize:
            raise ProtocolError(f"{slot.name}: {num_bytes} bytes are not {header['dtype']}{shape}")
        return memoryview(torch.empty(num_bytes, dtype=torch.uint8).numpy()).cast("B")

    @staticmethod
    def wrap(header: dict[str, Any], body: memoryview) -> torch.Tensor:
        """The tensor over a received body, sharing its memory."""
        dtype = DTYPES[header["dtype"]]
        if not len(body):
            return torch.empty(header["shape"], dtype=dtype)
        return torch.frombuffer(body, dtype=torch.uint8).view(dtype).reshape(header["shape"])
