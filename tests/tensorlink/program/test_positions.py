"""What a trace knows of values: those that follow from sizes alone, whatever the inputs hold."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tensorlink.program import positions
from tensorlink.program.trace import trace


class Asks(nn.Module):
    """Keeps what is known of `ask(x)` while it is traced."""

    def __init__(self, ask):
        super().__init__()
        self.ask, self.found = [ask], []
        self.weight = nn.Parameter(torch.arange(4.0))
        self.register_buffer("offsets", torch.arange(4))

    def forward(self, x):
        value = positions.value_without_inputs(self.ask[0](self, x))
        self.found.append(value)
        return x * self.weight


def known(ask):
    module = Asks(ask)
    trace(module, (torch.randn(3, 4),))
    return module.found


@pytest.mark.parametrize(
    ("ask", "value"),
    [
        (lambda module, x: torch.arange(x.shape[1]) + 2, torch.arange(4) + 2),
        (lambda module, x: torch.arange(x.shape[1]).unsqueeze(0).expand(x.shape[0], -1), torch.arange(4).expand(3, 4)),
    ],
    ids=["of a fixed size", "of the size of the batch"],
)
def test_what_follows_from_sizes_is_known(ask, value):
    found = known(ask)
    assert len(found) == 2
    assert all(torch.equal(each, value) for each in found)


@pytest.mark.parametrize(
    "ask",
    [
        lambda module, x: x.long().cumsum(-1),
        lambda module, x: torch.arange(4) + x.long(),
        lambda module, x: module.offsets + 1,
        lambda module, x: module.weight * 1,
        lambda module, x: torch.rand(4) + 1,
    ],
    ids=["input", "input and sizes", "buffer", "parameter", "random"],
)
def test_what_depends_on_an_input_or_on_state_or_chance_is_not(ask):
    assert known(ask) == [None, None]


def test_outside_of_a_trace_nothing_is_known():
    assert positions.value_without_inputs(torch.arange(3)) is None


def test_transformers_gets_its_function_back_and_need_not_be_there(monkeypatch):
    masks = SimpleNamespace(find_packed_sequence_indices=lambda position_ids: position_ids)
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", masks)
    find = masks.find_packed_sequence_indices
    with positions.known_positions():
        assert masks.find_packed_sequence_indices is not find
    assert masks.find_packed_sequence_indices is find
    monkeypatch.delitem(sys.modules, "transformers.masking_utils")
    with positions.known_positions():
        pass
