"""Weight gradients left for later are, bit for bit, those that autograd computes at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tensorlink.pipeline.backward import GradientSum, backward, forward
from tensorlink.program.deferred import DEFERRABLE, deferrable_weights
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.trace import trace


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def forward(self, x):
        return self.layers(x).flatten(1)


class Products(nn.Module):
    """Every kind of product with a weight: batched linear, addmm, matmul, an embedding; one weight used twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.bias, self.weight = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 8))
        self.twice = nn.Linear(8, 8, bias=False)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, tokens):
        x = self.linear(self.embedding(tokens))
        x = torch.addmm(self.bias, x.reshape(-1, 8), self.weight).reshape(x.shape)
        x = self.twice(functional.gelu(self.twice(x)))
        return self.frozen(x) @ self.weight.detach().t()


class Conditional(nn.Module):
    """One weight is used in a branch and behind it, another in a branch alone."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        y = torch.cond(x.sum() > 0, self.left, self.right, (torch.tanh(self.first(x)),))
        return self.last(self.left(y))


class PartlyAutocast(nn.Module):
    """A layer outside a region of autocast, two inside."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        y = self.first(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.third(torch.relu(self.second(y)))


MODELS = {
    "convolutions": (Convolutions, lambda: torch.randn(4, 3, 8, 8)),
    "products": (Products, lambda: torch.randint(0, 11, (4, 5))),
    "rows": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)), lambda: torch.randn(4, 5)),
    "half": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 3)).bfloat16(),
             lambda: torch.randn(4, 6, 16).bfloat16()),
    "cond": (Conditional, lambda: torch.randn(4, 6)),
    "partly_autocast": (PartlyAutocast, lambda: torch.randn(4, 6)),
}  # fmt: skip


def prepared(name, autocast=None):
    torch.manual_seed(0)
    make, example = MODELS[name]
    module, x = make(), example()
    traced = trace(module, (x,), autocast=autocast)
    program = traced.whole()
    state = traced.state(program)
    parameters = {n: state[n].requires_grad_(spec.requires_grad) for n, spec in program.parameters.items()}
    interpreter = Interpreter(program.train, parameters, {n: state[n] for n in program.buffers})
    return program, interpreter, parameters, x


def gradients_of(run, gradient, parameters, retain=False):
    """Those of the inputs, and those of the parameters that were not left for later."""
    found = GradientSum()
    return backward(run, {0: gradient}, parameters, retain, found), found.take()


def late_gradients(deferred):
    found = GradientSum()
    deferred.compute(found.add)
    return found.take()


def passed(program, interpreter, x, defer):
    return forward(interpreter, program.inputs, [x], lambda node: node, True, defer=defer)


@pytest.mark.parametrize("name", MODELS)
def test_deferred_gradients_are_bitwise_those_computed_at_once(name):
    program, interpreter, parameters, x = prepared(name)
    whole = passed(program, interpreter, x, defer=False)
    gradient = torch.randn_like(whole.outputs[0])
    inputs, expected = gradients_of(whole, gradient, parameters)
    split = passed(program, interpreter, x, defer=True)
    early_inputs, early = gradients_of(split, gradient, parameters)
    assert len(split.deferred)
    late = late_gradients(split.deferred)
    assert not early.keys() & late.keys()
    assert (early | late).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in (early | late).items())
    assert all(torch.equal(tensor, inputs[slot]) for slot, tensor in early_inputs.items())


def test_a_weight_used_twice_and_a_frozen_one_are_not_deferred():
    program, _, _, _ = prepared("products")
    weights = {name for found in deferrable_weights(program.train).values() for name in found.values()}
    assert weights >= {"embedding.weight", "linear.weight", "linear.bias", "bias"}
    assert not weights & {"twice.weight", "weight"}


def test_a_weight_that_a_branch_uses_is_not_deferred():
    program, _, _, _ = prepared("cond")
    weights = {name for found in deferrable_weights(program.train).values() for name in found.values()}
    assert weights == {"first.weight", "first.bias", "last.weight", "last.bias"}


def test_only_weights_outside_regions_of_autocast_are_deferred():
    program, _, _, _ = prepared("partly_autocast")
    weights = {name for found in deferrable_weights(program.train).values() for name in found.values()}
    assert weights == {"first.weight", "first.bias"}


@pytest.mark.parametrize("name", ["convolutions", "products", "rows", "cond"])
def test_under_autocast_nothing_is_deferred_and_gradients_stay_the_same(name):
    program, interpreter, parameters, x = prepared(name, torch.bfloat16)
    found = []
    for defer in (False, True):
        whole = passed(program, interpreter, x, defer)
        _, gradients = gradients_of(whole, torch.ones_like(whole.outputs[0]), parameters)
        assert not whole.deferred
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_retained_graph_defers_again_at_each_backward():
    program, interpreter, parameters, x = prepared("convolutions")
    split = passed(program, interpreter, x, defer=True)
    gradient = torch.randn_like(split.outputs[0])
    _, first_early = gradients_of(split, gradient, parameters, True)
    first = late_gradients(split.deferred)
    _, second_early = gradients_of(split, gradient, parameters)
    second = late_gradients(split.deferred)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(first_early[key], second_early[key]) for key in first_early)


def test_every_deferrable_op_is_one_that_workers_run():
    from tensorlink.program.ops import ALLOWED

    assert DEFERRABLE.keys() <= ALLOWED.keys()
