"""Weights as safetensors: exact, aligned, and refused before allocation where the header lies."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tensorlink.errors import TensorError
from tensorlink.program.alignment import is_aligned
from tensorlink.program.trace import trace
from tensorlink.program.weights import dump, load

STATE = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "matrix": torch.arange(6.0).view(2, 3).t(),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 4),
    "flag": torch.tensor([True, False]),
}
EXPECTED: dict[str, Any] = {
    "odd": ("uint8", (3,)),
    "matrix": ("float32", (3, 2)),
    "half": ("bfloat16", (5,)),
    "scalar": ("int64", ()),
    "empty": ("float32", (0, 4)),
    "flag": ("bool", (2,)),
}


def _file(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_what_is_dumped_loads_again_exactly_and_aligned() -> None:
    loaded = load(dump(STATE), EXPECTED)
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in STATE.items()
    )
    assert all(is_aligned(tensor) for tensor in loaded.values())


def test_equal_states_give_equal_bytes_whatever_their_order() -> None:
    assert dump(STATE) == dump(dict(reversed(STATE.items())))


def test_the_safetensors_library_reads_what_is_dumped_and_is_read() -> None:
    theirs = safetensors.torch.load(dump(STATE))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in STATE.items())
    ours = load(safetensors.torch.save({name: tensor.contiguous() for name, tensor in STATE.items()}), EXPECTED)
    assert all(torch.equal(ours[name], tensor) for name, tensor in STATE.items())


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "header_longer_than_the_file": (1 << 40).to_bytes(8, "little"),
    "not_json": _file(b"{"),
    "a_list": _file([]),
    "a_bomb": _file({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
    "shape_beyond_offsets": _file({"w": {**ENTRY, "shape": [1 << 30]}}, bytes(8)),
    "negative_size": _file({"w": {**ENTRY, "shape": [-2]}}, bytes(8)),
    "boolean_size": _file({"w": {**ENTRY, "shape": [True, 2]}}, bytes(8)),
    "unknown_dtype": _file({"w": {**ENTRY, "dtype": "F8_E4M3"}}, bytes(8)),
    "unknown_key": _file({"w": {**ENTRY, "code": ""}}, bytes(8)),
    "overlap": _file({"w": ENTRY, "v": ENTRY}, bytes(8)),
    "gap": _file({"w": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
    "trailing_bytes": _file({"w": ENTRY}, bytes(9)),
    "name_twice": _file(b'{"w":' + json.dumps(ENTRY).encode() + b',"w":' + json.dumps(ENTRY).encode() + b"}", bytes(8)),
    "missing": _file({}),
    "another_name": _file({"v": ENTRY}, bytes(8)),
    "another_dtype": _file({"w": {**ENTRY, "dtype": "I32"}}, bytes(8)),
    "another_shape": _file({"w": {**ENTRY, "shape": [1, 2]}}, bytes(8)),
    "nested_beyond_reason": _file(b"[" * 100_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies_is_refused(name: str) -> None:
    with pytest.raises(TensorError):
        load(HOSTILE[name], {"w": ("float32", (2,))})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_mutated_files_never_raise_anything_but_a_tensor_error(data: st.DataObject) -> None:
    mutated = bytearray(dump(STATE))
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(TensorError):
        load(bytes(mutated), EXPECTED)


class Shifted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([1.0, 2.0])


def test_a_constant_that_is_not_the_one_the_program_names_is_refused() -> None:
    traced = trace(Shifted(), (torch.randn(3, 2),))
    program = traced.whole()
    state = traced.state(program)
    assert load(dump(state), program.expected_state()).keys() == state.keys()
    [name] = state
    with pytest.raises(TensorError, match="binds"):
        load(dump({name: torch.tensor([1.0, 3.0])}), program.expected_state())
