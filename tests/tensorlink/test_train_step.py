"""A step under each schedule: the plain loop's numbers, and a timetable of what ran when."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import tensorlink
from tensorlink.pipeline.schedule import GENERATORS

_spec = importlib.util.spec_from_file_location("inprocess", Path(__file__).with_name("inprocess.py"))
inprocess = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(inprocess)


def layers():
    torch.manual_seed(0)
    parts = [layer for _ in range(6) for layer in (nn.Linear(12, 12), nn.Tanh())]
    return nn.Sequential(*parts, nn.BatchNorm1d(12))


@pytest.mark.parametrize("schedule", GENERATORS)
def test_a_step_under_each_schedule_is_bitwise_that_of_one_process_and_leaves_a_timetable(schedule):
    network = inprocess.InProcess(workers=2)
    x, y = torch.randn(16, 12), torch.randn(16, 12)
    plain = tensorlink.reference(layers(), micro_batches=4, example_inputs=(x,))
    plain_optimizer = torch.optim.AdamW(plain.module.parameters(), lr=1e-2, foreach=False)
    with tensorlink.DistributedModel(
        layers(), network=network, stages=2, micro_batches=4, example_inputs=(x,), schedule=schedule, progress=False
    ) as model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
        for _ in range(3):
            loss = model.train_step(x, y, loss_fn=nn.functional.mse_loss, optimizer=optimizer)
            expected = plain.train_step(x, y, loss_fn=nn.functional.mse_loss, optimizer=plain_optimizer)
            assert torch.equal(loss, expected)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, plain.module.state_dict()[name]), name
        timetable = model.timetable()
        assert model.report()["schedule"] == schedule
    num_stages = len(timetable.placement)
    kinds = [run.action.kind for run in timetable.runs]
    assert kinds.count("F") == 4 * num_stages
    assert kinds.count("B") + kinds.count("I") == 4 * num_stages
    assert kinds.count("W") == kinds.count("I")
    assert timetable.num_workers == 2
    assert all(0 <= run.start <= run.end <= timetable.makespan for run in timetable.runs)


@pytest.mark.parametrize("private", [(), "both"])
def test_a_step_asks_no_stage_for_what_it_told_with_its_end(private):
    network = inprocess.InProcess(workers=2)
    x, y = torch.randn(16, 12), torch.randn(16, 12)
    with tensorlink.DistributedModel(
        layers(), network=network, stages=2, micro_batches=4, example_inputs=(x,), private=private, progress=False
    ) as model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=1e-2)
        sent, stages = network.user.sent, list(range(len(model.programs)))
        for clip_norm in (None, 1e-3):
            sent.clear()
            model.train_step(x, y, loss_fn=nn.functional.mse_loss, optimizer=optimizer, clip_norm=clip_norm)
            assert [m.stage for m in sent if m.kind == "call" and m.name == "decide"] == stages
            assert not [m for m in sent if m.name == "prepare"]
        sent.clear()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        assert [m.stage for m in sent if m.name == "prepare"] == stages
