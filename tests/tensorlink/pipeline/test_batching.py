"""How batches become micro-batches, and what each counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smartnodes_core.errors import JobError
from tensorlink.errors import InputError, NonFiniteError
from tensorlink.pipeline.batching import (
    bind_batch,
    boundaries,
    check_finite,
    flat_inputs,
    loss_weights,
    micro_batches,
    split_targets,
    target_tensors,
)
from tensorlink.program.trace import trace


@pytest.fixture(scope="module")
def traced():
    return trace(nn.Linear(3, 2), (torch.randn(4, 3),))


@pytest.mark.parametrize(("rows", "sizes"), [(17, [3, 2, 2, 2, 2, 2, 2, 2]), (8, [1] * 8), (3, [1] * 3), (1, [1])])
def test_batches_are_cut_like_tensor_split(traced, rows, sizes):
    batch = torch.randn(rows, 3)
    pieces, samples = micro_batches(traced, [batch], 8)
    assert samples == sizes
    assert torch.equal(torch.cat([piece[0] for piece in pieces]), batch)
    assert [len(piece) for piece in torch.tensor_split(batch, boundaries(samples))] == sizes


def test_targets_are_cut_with_the_batch_however_nested():
    y, mask, scale = torch.arange(5), torch.randn(5, 2), torch.ones(3)
    pieces = split_targets({"y": y, "more": (mask, scale), "name": "n"}, [3, 2])
    assert torch.equal(pieces[1]["y"], y[3:])
    assert torch.equal(pieces[0]["more"][0], mask[:3])
    assert all(piece["more"][1] is scale and piece["name"] == "n" for piece in pieces)
    assert len(target_tensors(pieces[0])) == 3


@pytest.mark.parametrize("target", [torch.arange(4), {"y": torch.tensor(1.0)}, [], None])
def test_a_target_without_the_batch_is_refused(target):
    with pytest.raises(InputError, match="5 samples"):
        split_targets(target, [3, 2])


def test_losses_weigh_by_samples_alike_or_by_what_a_function_counts():
    targets = [torch.tensor([1, 0, 2]), torch.tensor([0])]
    assert loss_weights("mean", [3, 1], targets) == [0.75, 0.25]
    assert loss_weights("sum", [3, 1], targets) == [1.0, 1.0]
    assert loss_weights(lambda y: (y > 0).sum(), [3, 1], targets) == [1.0, 0.0]
    with pytest.raises(JobError, match="no valid targets"):
        loss_weights(lambda y: 0, [3, 1], targets)
    with pytest.raises(JobError, match="loss_reduction='none'"):
        loss_weights("none", [3, 1], targets)


def test_a_batch_is_inputs_and_then_the_target():
    assert bind_batch((1, 2, 3), by_keyword=False) == ((1, 2), {}, 3)
    assert bind_batch(({"x": 1}, 3), by_keyword=True) == ((), {"x": 1}, 3)
    assert bind_batch(({"x": 1}, 3), by_keyword=False) == (({"x": 1},), {}, 3)
    with pytest.raises(InputError, match="then the target, found 1"):
        bind_batch((1,), by_keyword=False)


def test_inputs_that_do_not_fit_are_the_callers_matter(traced):
    with pytest.raises(InputError, match="float64, traced was float32"):
        flat_inputs(traced, (torch.randn(4, 3).double(),), {})
    with pytest.raises(InputError, match=r"'input' requires a gradient.*example_inputs that do"):
        flat_inputs(traced, (torch.randn(4, 3).requires_grad_(),), {})
    with torch.no_grad():
        assert len(flat_inputs(traced, (torch.randn(4, 3).requires_grad_(),), {})) == 1


def test_what_is_not_finite_is_named_with_its_sample():
    bad = torch.zeros(4, 2)
    bad[1, 1], bad[3, 0] = float("inf"), float("nan")
    check_finite([torch.zeros(2), torch.ones(3).long()], ["a", "b"])
    with pytest.raises(NonFiniteError, match=r"b holds NaN or infinity in sample 1 and 1 more: clean"):
        check_finite([torch.zeros(2), bad], ["a", "b"])
    with pytest.raises(NonFiniteError, match="a holds"):
        check_finite([torch.tensor(float("nan"))], ["a"])
