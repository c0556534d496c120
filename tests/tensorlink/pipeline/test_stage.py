"""Stages in one process against the plain loop over the same micro-batches, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tensorlink.pipeline.inbox import Delivery
from tensorlink.program.loss import trace_loss
from tensorlink.stage_optimizer import encode_options

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def begin(step=0, call=0, n=4, type="train_step", training=True, grad=True, weights=None, schedule="1f1b"):
    weights = [w.hex() for w in weights or [1 / n] * n]
    return {
        "step": step, "call": call, "num_micro_batches": n, "samples": [], "training": training, "grad": grad,
        "type": type, "weights": weights if type == "train_step" else [], "schedule": schedule,
    }  # fmt: skip


def groups(stage):
    return [{"parameters": list(stage.program.parameters), **encode_options(OPTIONS)}]


def prepare(rig, name, **options):
    modules = rig.MODELS[name]()
    x, y = rig.batch(name)
    programs, states = rig.stage_programs(modules, x[:2])
    pipe = rig.Pipe(programs, states, **options)
    with torch.no_grad():
        example = nn.Sequential(*modules).eval()(x[:2])
    nn.Sequential(*modules).train()
    pipe.stages[-1].set_loss(trace_loss(rig.loss_fn, example, y[:2]))
    for stage in pipe.stages:
        stage.set_optimizer("AdamW", groups(stage))
    return modules, pipe


def train_step(pipe, x, y, step, n=4):
    pipe.tell("begin", begin(step, n=n))
    for m, (xm, ym) in enumerate(zip(torch.tensor_split(x, n), torch.tensor_split(y, n), strict=True)):
        delivery = Delivery(step, 0, m, "activation", 0)
        pipe.stages[0].receive(delivery, 0, xm.clone())
        pipe.stages[-1].receive(delivery._replace(type="target"), 0, ym.clone())
    pipe.run()
    for stage in pipe.stages:
        assert stage.num_units == n
        stage.commit(step, 1.0, groups(stage), b"o" * 32)
    return [pipe.losses[(step, 0, m)] for m in range(n)]


def plain_step(rig, module, optimizer, x, y, n=4):
    optimizer.zero_grad()
    losses = []
    for xm, ym in zip(torch.tensor_split(x, n), torch.tensor_split(y, n), strict=True):
        loss = rig.loss_fn(module(xm), ym)
        (loss * (1 / n)).backward()
        losses.append(float(loss))
    optimizer.step()
    return losses


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_a_pipeline_trains_bitwise_like_the_plain_loop(rig, name):
    modules, pipe = prepare(rig, name)
    module = nn.Sequential(*modules)
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False, **OPTIONS)
    for step in range(4):
        x, y = rig.batch(name, seed=step)
        assert train_step(pipe, x, y, step) == plain_step(rig, module, optimizer, x, y)
        record = [stage.log.committed(step) for stage in pipe.stages]
        for part, stage, one in zip(modules, pipe.stages, record, strict=True):
            for key, parameter in part.named_parameters():
                assert torch.equal(one.gradient[key], parameter.grad), key
                assert torch.equal(stage.parameters[key], parameter), key
            for key, buffer in part.named_buffers():
                assert torch.equal(stage.buffers[key], buffer), key
