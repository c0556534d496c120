"""A stage over two ranks beside the same stage on one: losses, gradients, state, what each rank holds."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tensorlink.pipeline.inbox import Delivery
from tensorlink.program.loss import trace_loss
from tensorlink.stage_optimizer import ALLOWED, StageOptimizer, encode_options
from tensorlink.tensor_parallel.optimizer import WHOLE_MATRIX, make_optimizer
from tensorlink.tensor_parallel.plan import plan
from tensorlink.tensor_parallel.stage import TensorParallelStage
from tensorlink.tensor_parallel.weights import ShardedWeights

TOLERANCE = 1e-6


def distance(found, wanted):
    """Relative, over all tensors together."""
    apart = sum(float((found[name].detach() - wanted[name].detach()).norm() ** 2) for name in wanted)
    return (apart / sum(float(tensor.detach().norm() ** 2) for tensor in wanted.values())) ** 0.5


def options(program, **options):
    return [{"parameters": list(program.parameters), **encode_options(options or {"lr": 0.05, "momentum": 0.9})}]


@pytest.fixture
def pair(rig, ranks):
    """The same model twice, each in pipelines of three stages: on two ranks and on one."""

    def make(name, optimizer="SGD"):
        pipes = []
        for options_of in ({"stage_class": partial(TensorParallelStage, ranks, 4)}, {}):
            modules, (x, y) = rig.MODELS[name](), rig.batch(name)
            pipe = rig.Pipe(*rig.stage_programs(modules, x[:2]), **options_of)
            example = nn.Sequential(*modules).eval()(x[:2]).detach()
            pipe.stages[-1].set_loss(trace_loss(rig.loss_fn, example, y[:2]))
            for stage in pipe.stages:
                stage.set_optimizer(optimizer, options(stage.program, **({} if optimizer == "SGD" else {"lr": 1e-3})))
            pipes.append(pipe)
        return pipes

    return make


def train(rig, pipe, name, step, n=4, **more):
    x, y = rig.batch(name, seed=step)
    begin = {
        "step": step, "call": 0, "num_micro_batches": n, "samples": [], "training": True, "grad": True,
        "type": "train_step", "weights": [(1 / n).hex()] * n, "schedule": "zb",
    }  # fmt: skip
    pipe.tell("begin", begin)
    for m, (xm, ym) in enumerate(zip(torch.tensor_split(x, n), torch.tensor_split(y, n), strict=True)):
        delivery = Delivery(step, 0, m, "activation", 0)
        pipe.stages[0].receive(delivery, 0, xm.clone())
        pipe.stages[-1].receive(delivery._replace(type="target"), 0, ym.clone())
    pipe.run()
    for stage in pipe.stages:
        stage.commit(step, 1.0, options(stage.program, **more), b"o" * 32)
    return [pipe.losses[(step, 0, m)] for m in range(n)]


@pytest.mark.parametrize("name", ["gpt", "dropout"])
def test_it_trains_as_one_device_does(rig, pair, name):
    split, plain = pair(name)
    for step in range(4):
        losses, wanted = train(rig, split, name, step), train(rig, plain, name, step)
        assert losses == pytest.approx(wanted, rel=TOLERANCE)
        for mine, its in zip(split.stages, plain.stages, strict=True):
            found, expected = mine.log.committed(step), its.log.committed(step)
            assert found.gradient.keys() == expected.gradient.keys()
            assert distance(found.gradient, expected.gradient) < TOLERANCE
            assert found.squared_norm == pytest.approx(expected.squared_norm, rel=4 * TOLERANCE)
            assert distance(found.before.optimizer, expected.before.optimizer) < 4 * TOLERANCE if step else True
            assert distance(mine.parameters, dict(its.parameters)) < TOLERANCE


def test_buffers_that_a_forward_replaces_are_the_same_on_all_ranks_and_outside(rig, pair):
    """One step: batch statistics of three samples make more of a rounding error than a tolerance allows for long."""
    split, plain = pair("mlp")
    train(rig, split, "mlp", 0)
    train(rig, plain, "mlp", 0)
    for mine, its in zip(split.stages, plain.stages, strict=True):
        for key, buffer in its.buffers.items():
            torch.testing.assert_close(mine.buffers[key], buffer, rtol=1e-5, atol=1e-6)
            assert all(torch.equal(on_rank[key], mine.buffers[key]) for on_rank in mine._rank_buffers)


def test_what_is_committed_is_what_the_state_was_updated_with(rig, pair):
    """An auditor redoes the update from the gradient that was committed, and comes to the very bits."""
    split, _ = pair("gpt", "AdamW")
    for step in range(3):
        train(rig, split, "gpt", step, lr=1e-3)
    for stage in split.stages:
        before, gradient = stage.log.committed(2).before, stage.log.committed(2).gradient
        weights = {name: tensor.clone().requires_grad_() for name, tensor in before.weights.items()}
        optimizer = StageOptimizer("AdamW", options(stage.program, lr=1e-3), weights)
        optimizer.load_state_tensors(before.optimizer)
        optimizer.step(gradient, options(stage.program, lr=1e-3))
        assert all(torch.equal(stage.parameters[name], tensor) for name, tensor in weights.items())
        after = stage.optimizer.state_tensors()
        assert all(torch.equal(after[name], tensor) for name, tensor in optimizer.state_tensors().items())


def test_each_rank_holds_about_half(rig, pair):
    split, _ = pair("gpt", "AdamW")
    train(rig, split, "gpt", 0, lr=1e-3)
    stage = split.stages[1]  # two blocks, no embedding
    state = stage.optimizer.state_tensors()
    whole = sum(t.numel() * t.element_size() for t in (*stage.parameters.values(), *state.values()))
    first, second = stage.shard_bytes()
    assert first == second
    assert first < 0.55 * whole
    assert sum(stage.parameters[name].numel() for name in stage.plan.weights) == 2 * sum(
        stage.weights.parts[0][name].numel() for name in stage.plan.weights
    )


def test_state_is_replaced_by_whole_tensors(rig, pair):
    split, plain = pair("gpt", "AdamW")
    for step in range(2):
        train(rig, plain, "gpt", step, lr=1e-3)
    for mine, its in zip(split.stages, plain.stages, strict=True):
        mine.set_state({name: tensor.detach().clone() for name, tensor in its.parameters.items()}, dict(its.buffers))
        mine.set_optimizer_state({name: tensor.clone() for name, tensor in its.optimizer.state_tensors().items()})
        assert all(torch.equal(mine.parameters[name], tensor) for name, tensor in its.parameters.items())
        state = mine.optimizer.state_tensors()
        assert all(torch.equal(state[name], tensor) for name, tensor in its.optimizer.state_tensors().items())


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_every_optimizer_gives_on_parts_what_it_gives_on_the_whole(ranks, traced, name):
    program, state, _ = traced("gpt")
    whole = {key: state[key].requires_grad_() for key in program.parameters if name != "Muon" or state[key].dim() == 2}
    weights = ShardedWeights(whole, plan(program, 2, 4), ranks)
    groups = [{"parameters": list(whole), **encode_options({"lr": 1e-2})}]
    one, split = StageOptimizer(name, groups, whole), make_optimizer(name, groups, weights, ranks)
    for _ in range(3):
        gradients = {key: torch.randn_like(tensor) for key, tensor in whole.items()}
        one.step(gradients, groups)
        split.step(gradients, groups)
    assert all(torch.equal(weights[key], tensor) for key, tensor in whole.items())
    expected, found = one.state_tensors(), split.state_tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    names = list(expected)
    assert split.expected_state(names) == one.expected_state(names)
    again = make_optimizer(name, groups, weights, ranks)
    again.load_state_tensors(found)
    assert all(torch.equal(again.state_tensors()[key], tensor) for key, tensor in expected.items())
    assert (name in WHOLE_MATRIX) is not hasattr(split, "each")
