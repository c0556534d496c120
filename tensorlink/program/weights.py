"""A stage's tensors as safetensors, written deterministically and read with the header distrusted.

The format: u64 header length, JSON header of name → dtype, shape, data_offsets, then the bytes, little-endian and
without gaps (https://github.com/huggingface/safetensors). Nothing is allocated before the header has been checked
against what the program declares, and what is loaded starts at multiples of 64 bytes, which the library's own loader
does not see to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from smartnodes_core.nesting import bounded_json
from tensorlink.errors import TensorError
from tensorlink.program.values import DTYPE_NAMES, DTYPES

MAX_HEADER_BYTES = 16 << 20
#: A constant is named by a digest of its content, so that the program which names it binds it.
CONSTANT_PREFIX = "constant."

_FILE_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
_DTYPE_OF_FILE = {code: name for name, code in _FILE_NAMES.items()}

Expected = Mapping[str, tuple[str, tuple[int, ...]]]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The contiguous bytes of a CPU tensor, without a copy where it is contiguous already."""
    return writable_bytes(tensor.detach().cpu().contiguous())


def writable_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes; what is written there is written into the tensor."""
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def constant_digest(tensor: Tensor) -> str:
    """32 hexadecimal characters that bind a constant's dtype, shape and bytes."""
    head = f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} ".encode()
    return blake3(head + bytes(tensor_bytes(tensor))).hexdigest()[:32]


def dump(state: Mapping[str, Tensor]) -> bytes:
    """The tensors as one safetensors file, sorted by name: equal states give equal bytes."""
    header: dict[str, Any] = {}
    at = 0
    for name in sorted(state):
        tensor = state[name]
        dtype = _FILE_NAMES.get(DTYPE_NAMES.get(tensor.dtype, ""))
        if dtype is None:
            raise TensorError(
                f"{name!r} is {tensor.dtype}, which safetensors does not hold; known are {sorted(_FILE_NAMES)}"
            )
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return b"".join([len(text).to_bytes(8, "little"), text, *(tensor_bytes(state[name]) for name in sorted(state))])


def load(data: bytes | bytearray | memoryview, expected: Expected | None = None) -> dict[str, Tensor]:
    """The tensors in `data`, each newly allocated, contiguous and 64-byte aligned.

    `expected` maps names to (dtype, shape) as `StageProgram.expected_state()` gives them: exactly these must be
    there. Raises TensorError naming the tensor, before anything is allocated.
    """
    view = memoryview(data).cast("B")
    entries, start = read_header(lambda at, num_bytes: view[at : at + num_bytes], len(view))
    if expected is not None:
        _compare(entries, expected)
    loaded = {}
    for name, (dtype, shape, begin, end) in entries.items():
        tensor = torch.empty(shape, dtype=DTYPES[dtype])
        if end > begin:
            writable_bytes(tensor)[:] = view[start + begin : start + end]
        if (
            expected is not None
            and name.startswith(CONSTANT_PREFIX)
            and name != CONSTANT_PREFIX + constant_digest(tensor)
        ):
            raise TensorError(f"{name!r} does not hold the constant that its name binds")
        loaded[name] = tensor
    return loaded


Entry = tuple[str, tuple[int, ...], int, int]


def read_header(read: Callable[[int, int], bytes | memoryview], num_bytes: int) -> tuple[dict[str, Entry], int]:
    """What a file of `num_bytes` says of its tensors: dtype, shape, first and last byte; and where those count from.

    `read(at, num_bytes)` gives bytes of the file. Raises TensorError for a header over its cap or malformed, and for
    tensors that overlap, leave gaps, or are not all there.
    """
    if num_bytes < 8:
        raise TensorError(f"a safetensors file has at least 8 bytes, found {num_bytes}")
    length = int.from_bytes(read(0, 8), "little")
    if length > min(MAX_HEADER_BYTES, num_bytes - 8):
        raise TensorError(f"a safetensors header of {length} bytes in {num_bytes}: at most {MAX_HEADER_BYTES} are read")
    try:
        header = bounded_json(read(8, length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise TensorError(f"a safetensors header that is not JSON: {str(error)[:120]}") from None
    if not isinstance(header, dict):
        raise TensorError("a safetensors header is a JSON object")
    header.pop("__metadata__", None)
    available = num_bytes - 8 - length
    entries = {name: _entry(name, item) for name, item in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != at or end > available:
            raise TensorError(f"{name!r:.80}: bytes {begin} to {end} leave a gap, overlap or end after {available}")
        at = end
    if at != available:
        raise TensorError(f"{available - at} bytes belong to no tensor")
    return entries, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _entry(name: str, item: Any) -> Entry:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise TensorError(f"{name!r:.80}: dtype, shape and data_offsets are needed, found {item!r:.80}")
    code, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    dtype = _DTYPE_OF_FILE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise TensorError(f"{name!r:.80}: unknown dtype {code!r:.40}; known are {sorted(_DTYPE_OF_FILE)}")
    if not _sizes(shape) or len(shape) > 32 or not _sizes(offsets) or len(offsets) != 2:
        raise TensorError(f"{name!r:.80}: shape {shape!r:.60} or offsets {offsets!r:.60} are malformed")
    needed = prod(shape) * DTYPES[dtype].itemsize
    if prod(max(size, 1) for size in shape) >= 1 << 60:  # strides overflow even where nothing is in it
        raise TensorError(f"{name!r:.80}: a shape {shape!r:.80} that no tensor can have")
    if offsets[1] - offsets[0] != needed:
        raise TensorError(
            f"{name!r:.80}: {dtype} {shape} takes {needed} bytes, its offsets span {offsets[1] - offsets[0]}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _sizes(items: Any) -> bool:
    return isinstance(items, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in items)


def _compare(entries: Mapping[str, Entry], expected: Expected) -> None:
    missing, extra = sorted(expected.keys() - entries.keys()), sorted(entries.keys() - expected.keys())
    if missing or extra:
        raise TensorError(
            f"tensors missing: {missing[:5]}, unknown: {extra[:5]}; send exactly what the program declares"
        )
    for name, (dtype, shape) in expected.items():
        found = entries[name]
        if (found[0], found[1]) != (dtype, tuple(shape)):
            raise TensorError(
                f"{name!r:.80} is {found[0]} {list(found[1])}, the program declares {dtype} {list(shape)}"
            )
