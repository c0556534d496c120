"""Programs run by two ranks give what one interpreter gives: outputs, gradients, masks, in both modes."""

from __future__ import annotations

import pytest
import torch

from tensorlink.pipeline.backward import GradientSum, backward, forward
from tensorlink.program.interpreter import Interpreter
from tensorlink.tensor_parallel.plan import plan
from tensorlink.tensor_parallel.shard_interpreter import ShardInterpreter
from tensorlink.tensor_parallel.weights import ShardedWeights, joined

NAMES = ["gpt", "tied gpt", "gpt with an odd vocabulary", "dropping gpt", "llama", "mlp", "branching", "convolved"]
TOLERANCE = 1e-6


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def run(interpreter, program, parameters, x, defer):
    inputs = [x if slot.type == "tensor" else len(x) for slot in program.inputs.slots]
    passed = forward(interpreter, program.inputs, inputs, lambda key: 40 + key, True, defer=defer)
    wanted = {
        slot: torch.cos(torch.arange(out.numel()).float()).view_as(out) for slot, out in enumerate(passed.outputs)
    }
    outputs = [out.detach().clone() for out in passed.outputs]
    total = GradientSum()
    backward(passed, wanted, parameters, False, total)
    if passed.deferred:
        passed.deferred.compute(total.add)
    return outputs, total.take()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("defer", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_compute_what_one_does(ranks, traced, name, defer, training):
    program, state, x = traced(name)
    whole = {key: state[key].requires_grad_(spec.requires_grad) for key, spec in program.parameters.items()}
    buffers = {key: state[key] for key in program.buffers}
    alone = dict(buffers)
    outputs, gradients = run(Interpreter(program.graph(training), whole, alone), program, whole, x, defer)
    shardings = plan(program, 2, 4)
    weights = ShardedWeights(whole, shardings, ranks)
    left = [dict(buffers) for _ in ranks.groups]

    def on_rank(group):
        parts = weights.parts[group.rank]
        interpreter = ShardInterpreter(shardings.of(training), parts, left[group.rank], group)
        return run(interpreter, program, parts, x, defer)

    both = ranks.each(on_rank)
    for found, _ in both:
        assert all(distance(a, b) < TOLERANCE for a, b in zip(found, outputs, strict=True))
    assert both[0][1].keys() == both[1][1].keys() == gradients.keys()
    together = {key: joined([g[key] for _, g in both], shardings.weights.get(key)) for key in gradients}
    apart = sum(float((together[key] - gradients[key]).norm() ** 2) for key in gradients) ** 0.5
    assert apart < TOLERANCE * sum(float(g.norm() ** 2) for g in gradients.values()) ** 0.5
    for mine in left:
        assert all(torch.equal(mine[key], alone[key]) for key in alone)
