"""Profiles: measured where asked, derived and repeatable otherwise, and harmless to the module."""

from __future__ import annotations

import torch
from torch import nn

from tensorlink.program.trace import trace
from tensorlink.sharding.profile import profile

MODULE = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 4))


def test_every_node_has_seconds_and_bytes() -> None:
    x = torch.randn(8, 64)
    traced = trace(MODULE, (x,))
    found = profile(traced, (x,))
    ids = {node.id for node in traced.train.graph.nodes}
    assert found.measured
    assert found.forward_s.keys() == found.backward_s.keys() == ids
    assert min(found.forward_s.values()) > 0
    assert sum(found.backward_s.values()) > 0
    assert found.value_bytes[0] == 8 * 64 * 4
    assert "measured, batch 8" in repr(found)


def test_the_derived_profile_is_the_same_each_time_and_follows_the_work() -> None:
    x = torch.randn(8, 64)
    traced = trace(MODULE, (x,))
    one, other = profile(traced, (x,), measured=False), profile(traced, {"input": x}, measured=False)
    assert one == other
    linear = [node.id for node in traced.train.graph.nodes if node.op == "aten.linear.default"]
    assert one.cost_s(linear[0]) > one.cost_s(linear[1])


def test_profiling_changes_nothing_of_the_module() -> None:
    x = torch.randn(8, 64)
    before = {name: tensor.clone() for name, tensor in MODULE.state_dict().items()}
    profile(trace(MODULE, (x,)), (x,))
    assert all(torch.equal(before[name], tensor) for name, tensor in MODULE.state_dict().items())
    assert all(parameter.grad is None for parameter in MODULE.parameters())


def test_a_backward_is_timed_where_it_is_done() -> None:
    module = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 8))
    x = torch.randn(128, 8)
    traced = trace(module, (x,))
    found = profile(traced, (x,))
    first, middle, last = (node.id for node in traced.train.graph.nodes if node.op == "aten.linear.default")
    assert found.backward_s[middle] > 5 * max(found.backward_s[first], found.backward_s[last])


def test_a_profile_of_fewer_samples_has_their_bytes() -> None:
    x = torch.randn(8, 64)
    traced = trace(MODULE, (x,))
    assert profile(traced, (x,), samples=4).value_bytes[0] == 4 * 64 * 4
    assert profile(traced, (x,), samples=1).batch == 2  # BatchNorm needs two
    assert profile(traced, (x,), samples=20).batch == 8
