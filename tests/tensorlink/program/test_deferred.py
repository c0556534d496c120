"""Weight gradients left for later are, bit for bit, those that autograd computes at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tensorlink.pipeline.backward import backward, forward
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


MODELS = {
    "convolutions": (Convolutions, lambda: torch.randn(4, 3, 8, 8)),
    "products": (Products, lambda: torch.randint(0, 11, (4, 5))),
    "rows": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)), lambda: torch.randn(4, 5)),
    "half": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 3)).bfloat16(),
             lambda: torch.randn(4, 6, 16).bfloat16()),
}  # fmt: skip


def prepared(name):
    torch.manual_seed(0)
    make, example = MODELS[name]
    module, x = make(), example()
    traced = trace(module, (x,))
    program = traced.whole()
    state = traced.state(program)
    parameters = {n: state[n].requires_grad_(spec.requires_grad) for n, spec in program.parameters.items()}
    interpreter = Interpreter(program.train, parameters, {n: state[n] for n in program.buffers})
    return program, interpreter, parameters, x


def passed(program, interpreter, x, defer):
    return forward(interpreter, program.inputs, [x], lambda node: node, True, defer=defer)


@pytest.mark.parametrize("name", MODELS)
def test_deferred_gradients_are_bitwise_those_computed_at_once(name):
    program, interpreter, parameters, x = prepared(name)
    whole = passed(program, interpreter, x, defer=False)
    gradient = torch.randn_like(whole.outputs[0])
    inputs, expected = backward(whole, {0: gradient}, parameters, False)
    split = passed(program, interpreter, x, defer=True)
    early_inputs, early = backward(split, {0: gradient}, parameters, False)
    assert len(split.deferred)
    late = split.deferred.compute()
    assert not early.keys() & late.keys()
    assert (early | late).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in (early | late).items())
    assert all(torch.equal(tensor, inputs[slot]) for slot, tensor in early_inputs.items())


def test_a_weight_used_twice_and_a_frozen_one_are_not_deferred():
    program, _, _, _ = prepared("products")
    weights = {name for found in deferrable_weights(program.train).values() for name in found.values()}
    assert weights >= {"embedding.weight", "linear.weight", "linear.bias", "bias"}
    assert not weights & {"twice.weight", "weight"}


def test_a_retained_graph_defers_again_at_each_backward():
    program, interpreter, parameters, x = prepared("convolutions")
    split = passed(program, interpreter, x, defer=True)
    gradient = torch.randn_like(split.outputs[0])
    _, first_early = backward(split, {0: gradient}, parameters, True)
    first = split.deferred.compute()
    _, second_early = backward(split, {0: gradient}, parameters, False)
    second = split.deferred.compute()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(first_early[key], second_early[key]) for key in first_early)


def test_every_deferrable_op_is_one_that_workers_run():
    from tensorlink.program.ops import ALLOWED

    assert DEFERRABLE.keys() <= ALLOWED.keys()
