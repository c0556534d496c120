"""Honest units pass, cheats are found, and what was opened must be what was committed to."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from smartnodes_core.records import Challenge, Commitment, Opening, OpeningItem, Unit
from tensorlink.audit import commitments
from tensorlink.audit.examine import Examiner
from tensorlink.audit.opening import opening
from tensorlink.ordered_data import Place, step_root
from tensorlink.pipeline.inbox import Delivery
from tensorlink.pipeline.stage import Stage
from tensorlink.program.loss import trace_loss
from tensorlink.records import StepOrder
from tensorlink.stage_optimizer import encode_options
from tensorlink.steplog.digests import root

_spec = importlib.util.spec_from_file_location("cheating_compute", Path(__file__).with_name("cheating_compute.py"))
cheating = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cheating)

N = 3
SEED = 7


class Training:
    """A pipeline that trains with `train_step` and can be audited."""

    def __init__(self, rig, name, stage_class=Stage, at=None, loop="train_step", interval=1, window=2):
        modules = rig.MODELS[name]()
        x, y = rig.batch(name)
        self.rig, self.name, self.loop = rig, name, loop
        programs, states = rig.stage_programs(modules, x[:2])
        classes = [stage_class if at in (None, i) else Stage for i in range(len(modules))]
        self.interval = interval
        self.initial_roots = [commitments.initial_root(*one) for one in zip(programs, states, strict=True)]
        self.pipe = rig.Pipe(
            programs, states, stage_class=classes, seed=SEED, state_interval_steps=interval, window_steps=window
        )
        example = nn.Sequential(*modules).eval()(x[:2]).detach()
        self.loss = trace_loss(rig.loss_fn, example, y[:2])
        self.pipe.stages[-1].set_loss(self.loss)
        self.roots = [commitments.Roots() for _ in modules]
        for stage in self.pipe.stages:
            stage.set_optimizer("AdamW", self.options(stage))
        self.committed = {}
        self.replaced = {0: ["optimizer"]}
        self.data_roots = {"input_root": bytes(32), "target_root": bytes(32)}

    def options(self, stage):
        return [{"parameters": list(stage.program.parameters), **encode_options({"lr": 1e-2})}]

    def step(self, step):
        x, y = self.rig.batch(self.name, seed=step)
        train = self.loop == "train_step"
        self.pipe.tell(
            "begin",
            {
                "step": step,
                "call": 0,
                "num_micro_batches": N,
                "samples": [],
                "training": True,
                "grad": True,
                "type": "train_step" if train else "forward",
                "weights": [(1 / N).hex()] * N if train else [],
                "schedule": "1f1b" if train else "gpipe",
            },
        )
        for m, (xm, ym) in enumerate(zip(torch.tensor_split(x, N), torch.tensor_split(y, N), strict=True)):
            self.pipe.stages[0].receive(Delivery(step, 0, m, "activation", 0), 0, xm.clone())
            if train:
                self.pipe.stages[-1].receive(Delivery(step, 0, m, "target", 0), 0, ym.clone())
        self.pipe.run()
        if not train:
            self.pipe.tell("begin_backward", {"step": step, "call": 0, "backward_pass": 0, "num_micro_batches": N})
            for m, ym in enumerate(torch.tensor_split(y, N)):
                out = self.pipe.outputs[(Delivery(step, 0, m, "output", 0), 0)].requires_grad_()
                (gradient,) = torch.autograd.grad(self.rig.loss_fn(out, ym) / N, out)
                self.pipe.stages[-1].receive(Delivery(step, 0, m, "activation_gradient", 0), 0, gradient)
            self.pipe.run()
        for index, stage in enumerate(self.pipe.stages):
            order = self.order(stage, step)
            record = stage.commit(step, 1.0, order.options, order.digest())
            content = commitments.build(
                record, root(record.gradient), self.roots[index], stage.parameters, stage.optimizer.state_tensors(), 1
            )
            units = [Unit(**unit) for unit in content.pop("units")]
            before = self.earlier(index, step)
            self.committed[(index, step)] = Commitment(
                job=self.rig.JOB, plan_version=0, replica=0, stage=index, worker=bytes(32), numeric_class="test",
                previous=before[-1].digest() if before else self.rig.JOB, units=units, **content,
            )  # fmt: skip

    def earlier(self, index, step):
        return [self.committed[(index, before)] for before in range(step)]

    def order(self, stage, step):
        train = self.loop == "train_step"
        return StepOrder(
            job=self.rig.JOB, plan_version=0, step=step, **self.data_roots,
            loss=self.loss.digest if train else bytes(32), loss_weights=[(1 / N).hex()] * N if train else [],
            loss_scale="", clip_norm="", optimizer="AdamW", options=self.options(stage),
            replaced=self.replaced.get(step, []),
        )  # fmt: skip

    def case(self, index, step, tier, unit):
        """The parameters of `examine` and the body."""
        stage, commitment = self.pipe.stages[index], self.committed[(index, step)]
        interval = stage.log.interval(step)
        opened = opening(interval, tier, unit, *stage.state_after(interval[-1]))
        body = bytearray(opened.num_bytes)
        opened.write(memoryview(body))
        challenge = Challenge(
            job=self.rig.JOB, commitment=commitment.digest(), tier=tier, unit=unit, seed=bytes(32), reveals=[],
            auditor=bytes(32),
        )  # fmt: skip
        items = [OpeningItem(**item) for item in opened.items]
        return {
            "program": stage.program.to_json(),
            "loss_program": self.loss.to_json() if self.loop == "train_step" else b"",
            "seed": SEED,
            "commitment": commitment.encode(),
            "challenge": challenge.encode(),
            "order": self.order(stage, step).encode(),
            "opening": Opening(challenge=challenge.digest(), commitment=commitment.digest(), items=items).encode(),
            "numeric_class": "test",
            "earlier": [one.encode() for one in self.earlier(index, step)[-len(interval) :]],
            "earlier_orders": [self.order(stage, record.step).encode() for record in interval[:-1]],
            "initial_root": self.initial_roots[index],
            "state_interval_steps": self.interval,
        }, body

    def examine(self, index, step, tier, unit=-1):
        params, body = self.case(index, step, tier, unit)
        return Examiner().examine(params, memoryview(body))


@pytest.mark.parametrize("loop", ["train_step", "drop-in"])
@pytest.mark.parametrize("name", ["mlp", "gpt", "dropout"])
def test_every_honest_unit_and_step_is_honest(rig, name, loop):
    training = Training(rig, name, loop=loop)
    for step in range(2):
        training.step(step)
    for index in range(len(training.pipe.stages)):
        for step in range(2):
            for unit in range(N):
                assert training.examine(index, step, 1, unit)["finding"] == "honest"
            found = training.examine(index, step, 2)
            assert found["finding"] == "honest", found


@pytest.mark.parametrize("name", ["mlp", "gpt", "dropout"])
def test_honest_work_with_another_number_of_threads_and_other_kernels_is_honest(rig, name):
    training = Training(rig, name)
    torch.set_num_threads(2)
    with torch.backends.mkldnn.flags(enabled=False):
        for step in range(2):
            training.step(step)
    torch.set_num_threads(1)
    for index in range(len(training.pipe.stages)):
        for step in range(2):
            found = training.examine(index, step, 2)
            assert found["finding"] == "honest", found


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@pytest.mark.parametrize("cheat", sorted(cheating.CHEATS))
def test_a_cheat_is_found_by_one_tier_or_the_other(rig, cheat, name):
    training = Training(rig, name, cheating.CHEATS[cheat], at=1)
    for step in range(2):
        training.step(step)
    found = training.examine(1, 1, 2)
    assert found["finding"] == "fraudulent", found
    seen_by_tier_1 = training.examine(1, 1, 1, 1)["finding"] == "fraudulent"
    assert seen_by_tier_1 == (cheat in ("scaled-gx", "low-precision"))
    for honest in (0, 2):
        assert training.examine(honest, 1, 2)["finding"] == "honest"


def test_opening_other_data_is_fraudulent(rig):
    training = Training(rig, "gpt")
    training.step(0)
    params, body = training.case(1, 0, 1, 0)
    for at in range(0, len(body), len(body) // 7):
        changed = bytearray(body)
        changed[at] ^= 1
        found = Examiner().examine(params, memoryview(changed))
        assert found["finding"] == "fraudulent"
        assert "other data" in found["reason"]


def test_opening_less_than_was_asked_for_is_fraudulent(rig):
    training = Training(rig, "gpt")
    training.step(0)
    params, body = training.case(1, 0, 1, 0)
    params["challenge"] = training.case(1, 0, 2, -1)[0]["challenge"]
    assert Examiner().examine(params, memoryview(body))["finding"] == "fraudulent"


def ordered_roots(rig, name, step):
    """What an author binds that sends a step's batch."""
    return {
        field: step_root({Place(0, m): commitments.input_root({0: piece}) for m, piece in enumerate(pieces)})
        for field, whole in zip(("input_root", "target_root"), rig.batch(name, seed=step), strict=True)
        for pieces in [torch.tensor_split(whole, N)]
    }


@pytest.mark.parametrize(("stage", "field"), [(0, "input_root"), (1, "target_root")])
def test_other_data_than_the_author_ordered_is_fraudulent_and_its_own_is_not(rig, stage, field):
    for ordered, finding in ((0, "honest"), (1, "fraudulent")):
        training = Training(rig, "gpt")
        stage_index = stage * (len(training.pipe.stages) - 1)
        training.data_roots[field] = ordered_roots(rig, "gpt", ordered)[field]
        training.step(0)
        for tier, unit in ((1, 0), (2, -1)):
            found = training.examine(stage_index, 0, tier, unit)
            assert found["finding"] == finding, found["reason"]
            assert ("not those that the author's order names" in found["reason"]) == (finding == "fraudulent")


def test_dropped_micro_batches_are_fraudulent(rig):
    training = Training(rig, "gpt")
    training.step(0)
    stage = training.pipe.stages[1]
    record = stage.log.committed(0)
    record.units.pop()
    del record.forwards[(0, N - 1)]
    content = commitments.build(
        record, root(record.gradient), commitments.Roots(), stage.parameters, stage.optimizer.state_tensors(), 1
    )
    units = [Unit(**unit) for unit in content.pop("units")]
    known = training.committed[(1, 0)]
    training.committed[(1, 0)] = Commitment(
        **{name: getattr(known, name) for name in known.__struct_fields__ if name not in {*content, "units"}},
        units=units, **content,
    )  # fmt: skip
    assert "micro-batches" in training.examine(1, 0, 2)["reason"]
