"""What the header of a tensor's frame may say. No torch here: the node process of a rig checks headers too."""

from __future__ import annotations

import math
from typing import Any

from smartnodes_core.errors import ProtocolError

#: The dtypes that travel, with the bytes of one item.
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
#: What names a tensor of a call, by the fields of `inbox.Delivery` and the index in the cut.
CALL_FIELDS = ("step", "call", "micro_batch", "slot", "backward_pass")
#: The type of a tensor that holds a stage's sum of a tied parameter's gradients, and what names it (`tied.SumId`).
SHARED = "shared"
SHARED_FIELDS = ("step", "call", "num_units", "from_stage", "slot")
#: Sizes and counts in a header are below this: their products stay far from any overflow.
MAX_COUNT = 1 << 48
MAX_DIMS = 32
#: One tensor of one micro-batch. Whoever needs more cuts batches into more micro-batches.
MAX_TENSOR_BYTES = 4 << 30


def field_of(header: dict[str, Any], name: str) -> int:
    """A number counted from 0 in a peer's header. Raises ProtocolError where it is missing or something else."""
    value = header.get(name)
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise ProtocolError(f"{name} is {value!r:.40} in a tensor's header: a number counted from 0 is needed")
    return value


def counts_of(header: dict[str, Any]) -> tuple[str, ...]:
    """The names of the numbers that a header of this type has."""
    return SHARED_FIELDS if header.get("type") == SHARED else CALL_FIELDS


def num_tensor_bytes(header: dict[str, Any]) -> int:
    """The bytes of the tensor that a peer's header describes. Raises ProtocolError for a malformed dtype or shape."""
    dtype, shape = header.get("dtype"), header.get("shape")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ProtocolError(f"tensors of {dtype!r:.40} do not travel; of these they do: {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise ProtocolError(f"a shape is a list of at most {MAX_DIMS} sizes, found {shape!r:.80}")
    if any(type(size) is not int or not 0 <= size < MAX_COUNT for size in shape):
        raise ProtocolError(f"a shape with sizes out of range: {shape!r:.80}")
    return math.prod(shape) * ITEM_BYTES[dtype]
