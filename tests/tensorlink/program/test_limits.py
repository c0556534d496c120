"""The cost of a program: as torch counts it, from shapes alone, the same every time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tensorlink.program.limits import Estimate, check, check_loss
from tensorlink.program.trace import trace, trace_loss

BIG = 1 << 40


def _estimate(module: nn.Module, x: torch.Tensor, batch: int) -> Estimate:
    return check(trace(module, (x,)).whole(), batch=batch, max_bytes=BIG, max_flops=BIG)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(8, 64)),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=4)), torch.randn(2, 4, 12, 12)),
        (nn.ConvTranspose2d(4, 8, 3, stride=2), torch.randn(2, 4, 6, 6)),
        (nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), torch.randn(3, 10, 32)),
    ],
)
def test_operations_agree_with_the_count_of_torch(module: nn.Module, x: torch.Tensor) -> None:
    with FlopCounterMode(display=False) as counter:
        module(x)
    found = _estimate(module, x, len(x)).flops_forward
    assert counter.get_total_flops() <= found <= 1.2 * counter.get_total_flops()


def test_the_backward_of_products_costs_twice_the_forward_where_all_operands_need_it() -> None:
    first = nn.Linear(64, 64, bias=False)
    node = _estimate(first, torch.randn(2, 64), 2)
    assert (node.flops_forward, node.flops_backward) == (2 * 2 * 64 * 64, 2 * 2 * 64 * 64)
    both = _estimate(nn.Sequential(first, nn.Linear(64, 64, bias=False)), torch.randn(2, 64), 2)
    assert both.flops_backward == 3 * 2 * 2 * 64 * 64
    assert both.work_units == both.flops_forward + both.flops_backward


def test_frozen_layers_cost_no_backward() -> None:
    assert _estimate(nn.Linear(8, 8).requires_grad_(False), torch.randn(2, 8), 2).flops_backward == 0


def test_work_grows_with_the_batch_and_is_the_same_each_time() -> None:
    module, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(2, 8)
    assert _estimate(module, x, 8).work_units == 4 * _estimate(module, x, 2).work_units
    assert _estimate(module, x, 8) == _estimate(module, x, 8)


def test_memory_counts_what_the_backward_keeps() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    found = _estimate(module, torch.randn(4, 16), 4)
    rows = 4 * 16 * 4
    assert found.parameter_bytes == 2 * (16 * 16 + 16) * 4
    assert found.saved_bytes == 3 * rows  # the input and both results of tanh
    assert 3 * rows <= found.peak_activation_bytes <= 5 * rows
    assert found.output_bytes == rows


def test_a_loss_has_a_cost_too() -> None:
    loss = trace_loss(nn.MSELoss(), torch.randn(3, 2), torch.randn(3, 2))
    assert check_loss(loss, batch=5, max_bytes=BIG, max_flops=BIG).flops_forward > 0
