"""A peer's header is believed in nothing."""

from __future__ import annotations

import pytest
import torch

from smartnodes_core.errors import ProtocolError
from tensorlink.pipeline.frames import DTYPES
from tensorlink.pipeline.headers import ITEM_BYTES, MAX_COUNT, field_of, num_tensor_bytes


@pytest.mark.parametrize("value", [-1, MAX_COUNT, 1.0, "1", None, True, [1]])
def test_counts_are_whole_numbers_from_zero(value):
    with pytest.raises(ProtocolError, match="slot is"):
        field_of({"slot": value}, "slot")
    with pytest.raises(ProtocolError, match="slot is None"):
        field_of({}, "slot")
    assert field_of({"slot": 3}, "slot") == 3


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"dtype": "float32"},
        {"dtype": "object", "shape": [1]},
        {"dtype": ["float32"], "shape": [1]},
        {"dtype": "float32", "shape": [-1]},
        {"dtype": "float32", "shape": [1.0]},
        {"dtype": "float32", "shape": [True]},
        {"dtype": "float32", "shape": "11"},
        {"dtype": "float32", "shape": [1] * 33},
        {"dtype": "float32", "shape": [MAX_COUNT]},
    ],
)
def test_malformed_tensors_are_the_senders_fault(header):
    with pytest.raises(ProtocolError):
        num_tensor_bytes(header)


def test_bytes_are_those_of_torch():
    assert num_tensor_bytes({"dtype": "bfloat16", "shape": [3, 5]}) == 30
    assert num_tensor_bytes({"dtype": "float64", "shape": []}) == 8
    assert num_tensor_bytes({"dtype": "float64", "shape": [0, 7]}) == 0
    assert {name: torch.empty((), dtype=DTYPES[name]).element_size() for name in ITEM_BYTES} == ITEM_BYTES
