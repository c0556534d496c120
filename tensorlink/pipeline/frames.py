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
#: Sizes and counts in a header are below this: their products stay far from any overflow.
MAX_COUNT = 1 << 48
MAX_DIMS = 32
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which a dtype travels. Raises ProtocolError for one that does not."""
    if dtype not in _NAMES:
        raise ProtocolError(f"tensors of {dtype} do not travel; of these they do: {', '.join(DTYPES)}")
    return _NAMES[dtype]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; the caller keeps the tensor alive."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()).cast("B")


def field_of(header: dict[str, Any], name: str) -> int:
    """A number counted from 0 in a peer's header. Raises ProtocolError where it is missing or something else."""
    value = header.get(name)
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise ProtocolError(f"{name} is {value!r:.40} in a tensor's header: a number counted from 0 is needed")
    return value


def num_tensor_bytes(header: dict[str, Any]) -> int:
    """The bytes of the tensor that a peer's header describes. Raises ProtocolError for a malformed dtype or shape."""
    dtype, shape = header.get("dtype"), header.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ProtocolError(f"tensors of {dtype!r:.40} do not travel; of these they do: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise ProtocolError(f"a shape is a list of at most {MAX_DIMS} sizes, found {shape!r:.80}")
    if any(type(size) is not int or not 0 <= size < MAX_COUNT for size in shape):
        raise ProtocolError(f"a shape with sizes out of range: {shape!r:.80}")
    return math.prod(shape) * DTYPES[dtype].itemsize


class FrameTensor:
    """Receiving: `allocate` checks a header against the slot it is for, `wrap` makes the tensor of the filled buffer."""

    @staticmethod
    def allocate(slot: Slot, header: dict[str, Any], num_bytes: int, max_batch: int) -> memoryview:
        """A buffer for the body. Raises ProtocolError unless dtype, shape and byte count are what the slot says; where
        the slot leaves the size to the batch, it is at most `max_batch` times as many.
        """
        expected = num_tensor_bytes(header)
        dtype, shape = header["dtype"], header["shape"]
        fits = len(shape) == len(slot.shape) and all(
            want in (-1, size) for want, size in zip(slot.shape, shape, strict=True)
        )
        if slot.dtype != dtype or not fits:
            raise ProtocolError(f"{slot.name}: found {dtype}{shape}, needed {slot.dtype}{list(slot.shape)}")
        if num_bytes != expected:
            raise ProtocolError(f"{slot.name}: {num_bytes} bytes are not {dtype}{shape}")
        if slot.shape and slot.shape[0] == -1 and shape[0] > max_batch:
            raise ProtocolError(f"{slot.name}: {shape[0]} samples, the largest micro-batch has {max_batch}")
        return memoryview(torch.empty(num_bytes, dtype=torch.uint8).numpy()).cast("B")

    @staticmethod
    def wrap(header: dict[str, Any], body: memoryview) -> torch.Tensor:
        """The tensor over a received body, sharing its memory."""
        dtype = DTYPES[header["dtype"]]
        if not len(body):
            return torch.empty(header["shape"], dtype=dtype)
        return torch.frombuffer(body, dtype=torch.uint8).view(dtype).reshape(header["shape"])
