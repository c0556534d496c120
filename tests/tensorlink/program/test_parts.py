"""Weights in parts: each byte in one part, and memory for what was declared, no more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorlink.errors import TensorError
from tensorlink.program import parts
from tensorlink.program.alignment import is_aligned
from tensorlink.program.parts import Assembly, Parts
from tensorlink.program.weights import tensor_bytes

EXPECTED = {
    "odd": ("uint8", (3,)),
    "matrix": ("float32", (3, 2)),
    "half": ("bfloat16", (5,)),
    "scalar": ("int64", ()),
    "empty": ("float32", (0, 4)),
}
STATE = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "matrix": torch.arange(6.0).view(3, 2),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def short(monkeypatch):
    """Parts of 7 bytes: most tensors span several, some parts hold several tensors."""
    monkeypatch.setattr(parts, "PART_BYTES", 7)


def data_of(part):
    pieces = Parts(EXPECTED).pieces(part)
    return memoryview(b"".join(bytes(tensor_bytes(STATE[name])[begin:end]) for name, begin, end in pieces))


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 40)), st.integers(1, 50))
def test_every_byte_is_in_one_part_and_parts_are_full(sizes, part_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", part_bytes)
        made = Parts({name: ("uint8", (size,)) for name, size in sizes.items()})
        found = [[piece for piece in made.pieces(part)] for part in range(len(made))]
    bytes_of = [(name, at) for part in found for name, begin, end in part for at in range(begin, end)]
    assert bytes_of == [(name, at) for name in sorted(sizes) for at in range(sizes[name])]
    lengths = [sum(end - begin for _, begin, end in part) for part in found]
    assert all(length == part_bytes for length in lengths[:-1])
    assert all(length <= part_bytes for length in lengths)


@pytest.mark.parametrize("order", [list(range(7)), [6, 0, 5, 1, 4, 2, 3]])
def test_a_state_is_put_together_from_parts_in_any_order(short, order):
    assert len(Parts(EXPECTED)) == 7
    assembly = Assembly(EXPECTED)
    completed = dict(assembly.empty())
    for part in order:
        new = assembly.put(part, data_of(part))
        assert not completed.keys() & new.keys()
        assert all(torch.equal(tensor, STATE[name]) for name, tensor in new.items())
        completed |= new
    found = assembly.finish()
    assert completed.keys() == found.keys() == STATE.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in STATE.items())
    assert all(is_aligned(tensor) for tensor in found.values())


@pytest.mark.parametrize("part", [-1, 7, 1 << 60])
def test_a_part_that_there_is_not_is_refused(short, part):
    with pytest.raises(TensorError, match=r"a state of 7 parts"):
        Assembly(EXPECTED).put(part, memoryview(bytes(7)))


@pytest.mark.parametrize(("part", "num_bytes"), [(0, 6), (0, 8), (0, 0), (6, 7), (1, 1 << 20)])
def test_a_part_of_another_length_is_refused_with_its_tensors_name(short, part, num_bytes):
    with pytest.raises(TensorError, match=rf"'\w+'.* has {num_bytes} bytes, needed"):
        Assembly(EXPECTED).put(part, memoryview(bytes(num_bytes)))


def test_a_part_that_comes_twice_changes_nothing_and_with_other_content_is_refused(short):
    assembly = Assembly(EXPECTED)
    for part in range(7):
        assembly.put(part, data_of(part))
    assert assembly.put(1, data_of(1)) == {}
    with pytest.raises(TensorError, match=r"part 1 \('half' to 'matrix'\) came twice with different content"):
        assembly.put(1, memoryview(bytes(7)))
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in assembly.finish().items())


def test_a_state_with_a_part_missing_is_not_finished_and_the_tensors_are_named(short):
    assembly = Assembly(EXPECTED)
    for part in (0, 1, 2, 3, 5, 6):
        assembly.put(part, data_of(part))
    with pytest.raises(TensorError, match=r"1 tensors .* 6 bytes of 'matrix'|'matrix'"):
        assembly.finish()
    assembly.put(4, data_of(4))
    assert assembly.finish().keys() == STATE.keys()


def test_a_state_of_nothing_has_no_parts():
    assert len(Parts({})) == len(Parts({"empty": ("float32", (0,))})) == 0
    assert Assembly({}).finish() == {}
    with pytest.raises(TensorError, match="0 parts"):
        Assembly({}).put(0, memoryview(b""))
