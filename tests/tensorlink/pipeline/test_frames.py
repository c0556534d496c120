"""Tensors go out without a copy and come in only as the slot says."""

from __future__ import annotations

import pytest
import torch

from smartnodes_core.errors import ProtocolError
from tensorlink.pipeline.frames import DTYPES, FrameTensor, dtype_name, tensor_bytes
from tensorlink.pipeline.headers import MAX_TENSOR_BYTES
from tensorlink.records import Slot

SLOT = Slot(name="h", type="tensor", dtype="float32", shape=[-1, 3], requires_grad=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 3), (0, 3), ()])
def test_a_tensor_survives_the_way(dtype, shape):
    tensor = (torch.rand(shape) * 100).to(DTYPES[dtype])
    slot = Slot(name="h", type="tensor", dtype=dtype, shape=[-1, *shape[1:]] if shape else [], requires_grad=False)
    data = tensor_bytes(tensor)
    header = {"dtype": dtype_name(tensor.dtype), "shape": list(shape)}
    body = FrameTensor.allocate(slot, header, len(data))
    body[:] = data
    assert torch.equal(FrameTensor.wrap(header, body), tensor)


def test_what_goes_out_is_not_copied():
    tensor = torch.zeros(4)
    data = tensor_bytes(tensor)
    tensor[0] = 1.0
    assert bytes(data[:4]) == b"\x00\x00\x80\x3f"


def test_complex_tensors_do_not_travel():
    with pytest.raises(ProtocolError, match="complex64 do not travel"):
        dtype_name(torch.complex64)


@pytest.mark.parametrize(
    ("dtype", "shape", "num_bytes", "says"),
    [
        ("float64", [2, 3], 48, "needed float32"),
        ("float32", [2, 4], 32, r"needed float32\[-1, 3\]"),
        ("float32", [2], 8, "found float32"),
        ("float32", [2, 3], 23, "23 bytes are not"),
        ("float32", [2, 3], 1 << 40, "bytes are not"),
        ("float32", [MAX_TENSOR_BYTES // 12 + 1, 3], (MAX_TENSOR_BYTES // 12 + 1) * 12, "at most"),
        ("float32", [-2, 3], 0, "out of range"),
    ],
)
def test_what_does_not_fit_is_refused_before_memory_is_taken(dtype, shape, num_bytes, says):
    with pytest.raises(ProtocolError, match=says):
        FrameTensor.allocate(SLOT, {"dtype": dtype, "shape": shape}, num_bytes)
