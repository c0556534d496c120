"""Memory of its own for what stays."""

from __future__ import annotations

import torch

from tensorlink.lasting import ALIGNMENT_BYTES, lasting


def test_tensors_are_like_those_asked_for_aligned_and_apart():
    like = {"a": torch.empty(3, 5), "b": torch.empty(7, dtype=torch.bfloat16), "none": torch.empty(0, 4)}
    like["meta"] = torch.empty(2, 2, dtype=torch.int64, device="meta")
    found = lasting(like)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in like.items()}
    assert all(t.device.type == "cpu" and t.is_contiguous() for t in found.values())
    assert all(t.data_ptr() % ALIGNMENT_BYTES == 0 for t in found.values() if t.numel())
    for number, tensor in enumerate(found.values()):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(found.values()))


def test_a_tensor_outlives_the_others_and_writing_to_one_is_no_change_of_another():
    found = lasting({"a": torch.empty(100), "b": torch.empty(100)})
    kept = found.pop("a").fill_(2.0)
    weight = kept.clone().requires_grad_()
    product = (weight * kept).sum()
    found.pop("b").zero_()
    product.backward()
    assert torch.equal(weight.grad, kept)


def test_nothing_takes_no_memory():
    assert lasting({}) == {}
    assert lasting({"a": torch.empty(0)})["a"].shape == (0,)
