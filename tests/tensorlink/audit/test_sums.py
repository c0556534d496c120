"""Audits of stages that share a parameter: honest holders pass, one that lies about its sum is found out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from smartnodes_core.audit import sharing_disagreements
from smartnodes_core.records import Challenge, Commitment, Opening, OpeningItem, Unit
from tensorlink.audit import commitments
from tensorlink.audit.examine import Examiner
from tensorlink.audit.opening import opening
from tensorlink.pipeline.inbox import Delivery
from tensorlink.pipeline.stage import Stage
from tensorlink.program.trace import trace
from tensorlink.records import StepOrder
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile
from tensorlink.stage_optimizer import encode_options
from tensorlink.steplog.digests import root

N = 2
WIDTH = 6


class Tied(nn.Module):
    """The first layer's weight is used again in the middle and at the end."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        first, *others = self.layers
        x = torch.tanh(first(x))
        for index, layer in enumerate(others):
            x = torch.tanh(layer(x))
            x = x @ first.weight if index else x
        return x


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    x = torch.randn(4, WIDTH)
    traced = trace(Tied(), (x,))
    programs = partition(traced, profile(traced, (x,), measured=False), 3)
    assert {program.parameters["layers.0.weight"].holders for program in programs} >= {(0, 1, 2)}
    return programs, [{n: t.clone() for n, t in traced.state(program).items()} for program in programs], x


class Lying(Stage):
    """Adds a little to its sum of the tied parameter, and goes on with that as if it were right."""

    def share(self, step):
        if not self.tied._sent:
            self.gradients.add({"layers.0.weight": torch.full((WIDTH, WIDTH), 0.01)})
        return super().share(step)


class TwoFaced(Stage):
    """Sends the first stage another sum than the others, and commits to the right one."""

    def _send_sum(self, to, id, slot, tensor):
        super()._send_sum(to, id, slot, tensor * 2 if to == 0 else tensor)


class WrongTotal(Stage):
    """Updates with its own sum alone."""

    def commit(self, step, clip_coefficient, options, order):
        settled = self._settled(step)
        self.tied._settled = dataclasses.replace(settled, totals=dict(self.gradients.sums()))
        return super().commit(step, clip_coefficient, options, order)


class Shared:
    """Three stages that train a tied model for one step, `cheat` at stage `at`, and can be audited."""

    def __init__(self, rig, model, cheat=Stage, at=1):
        self.rig = rig
        programs, states, x = model
        classes = [cheat if at == index else Stage for index in range(3)]
        self.pipe = rig.Pipe(programs, states, stage_class=classes)
        self.stages = self.pipe.stages
        self.pipe.tell("begin", {
            "step": 0, "call": 0, "num_micro_batches": N, "samples": [], "training": True, "grad": True,
            "type": "forward", "weights": [], "schedule": "gpipe",
        })  # fmt: skip
        self.pipe.tell("begin_backward", {"step": 0, "call": 0, "backward_pass": 0})
        for m, piece in enumerate(x.tensor_split(N)):
            self.stages[0].receive(Delivery(0, 0, m, "activation", 0), 0, piece.clone())
            self.stages[2].receive(Delivery(0, 0, m, "activation_gradient", 0), 0, torch.ones_like(piece))
        self.pipe.run()
        for stage in self.stages:
            stage.set_optimizer("AdamW", self.options(stage))
            stage.share(0)
        self.pipe.run()
        self.committed = [self.commit(stage) for stage in self.stages]

    def options(self, stage):
        return [{"parameters": list(stage.program.parameters), **encode_options({"lr": 1e-2})}]

    def order(self, stage):
        return StepOrder(
            job=self.rig.JOB, plan_version=0, step=0, input_root=bytes(32), target_root=bytes(32), loss=bytes(32),
            loss_weights=[], loss_scale="", clip_norm="", optimizer="AdamW", options=self.options(stage),
            replaced=["weights"],
        )  # fmt: skip

    def commit(self, stage):
        assert stage.share(0) == []
        order = self.order(stage)
        record = stage.commit(0, 1.0, order.options, order.digest())
        return self.commitment(stage, record)

    def commitment(self, stage, record, **changes):
        content = commitments.build(
            record, root(record.gradient), commitments.Roots(), stage.parameters, stage.optimizer.state_tensors(), 1
        )
        units = [Unit(**unit) for unit in content.pop("units")]
        return Commitment(
            job=self.rig.JOB, plan_version=0, replica=0, stage=stage.place.stage, worker=bytes(32),
            numeric_class="test", previous=self.rig.JOB, units=units, **{**content, **changes},
        )  # fmt: skip

    def examine(self, index):
        stage, commitment = self.stages[index], self.committed[index]
        record = stage.log.committed(0)
        opened = opening([record], 2, -1, *stage.state_after(record))
        body = bytearray(opened.num_bytes)
        opened.write(memoryview(body))
        challenge = Challenge(
            job=self.rig.JOB, commitment=commitment.digest(), tier=2, unit=-1, seed=bytes(32), reveals=[],
            auditor=bytes(32),
        )  # fmt: skip
        items = [OpeningItem(**item) for item in opened.items]
        params = {
            "program": stage.program.to_json(), "loss_program": b"", "seed": 7, "commitment": commitment.encode(),
            "challenge": challenge.encode(), "order": self.order(stage).encode(),
            "opening": Opening(challenge=challenge.digest(), commitment=commitment.digest(), items=items).encode(),
            "earlier": [], "earlier_orders": [], "initial_root": bytes(32), "state_interval_steps": 1,
        }  # fmt: skip
        return Examiner().examine(params, memoryview(body))

    def disagreements(self):
        pairs = [(0, 1), (0, 2), (1, 2)]
        return {pair for pair in pairs if sharing_disagreements(*(self.committed[index] for index in pair))}

    def redo(self, index, roots=None):
        """The commitment of a stage again, from what its log holds now."""
        stage = self.stages[index]
        record = stage.log.committed(0)
        if roots is None:
            roots = {f"to/{to}": root(sums) for to, sums in record.sent_sums.items()}
            roots |= {f"from/{of}": root(sums) for of, sums in record.received_sums.items()}
        self.committed[index] = self.commitment(stage, record, shared_roots=roots)


def test_honest_holders_pass_and_say_the_same_of_what_they_sent_each_other(rig, model):
    shared = Shared(rig, model)
    assert [shared.examine(index)["finding"] for index in range(3)] == ["honest"] * 3
    assert shared.disagreements() == set()
    assert sorted(shared.committed[1].shared_roots) == ["from/0", "from/2", "to/0", "to/2"]
    weights = [stage.parameters["layers.0.weight"] for stage in shared.stages]
    assert all(torch.equal(weights[0], other) for other in weights)


def test_a_holder_that_lies_about_its_sum_is_found_by_the_audit_of_its_own_step(rig, model):
    shared = Shared(rig, model, Lying)
    assert shared.disagreements() == set()
    found = shared.examine(1)
    assert found["finding"] == "fraudulent"
    assert "gradient layers.0.weight" in found["reason"]
    assert [shared.examine(index)["finding"] for index in (0, 2)] == ["honest", "honest"]


def test_a_holder_that_sends_other_sums_than_it_commits_to_is_contradicted_by_who_received_them(rig, model):
    shared = Shared(rig, model, TwoFaced)
    assert shared.disagreements() == {(0, 1)}


def test_a_gradient_that_is_not_all_holders_sums_is_fraudulent(rig, model):
    shared = Shared(rig, model, WrongTotal)
    found = shared.examine(1)
    assert found["finding"] == "fraudulent"
    assert "in their order" in found["reason"]


def test_adding_in_another_order_than_that_of_the_stages_is_found_to_the_last_bit(rig, model):
    shared = Shared(rig, model)
    record = shared.stages[2].log.committed(0)
    received, name = record.received_sums, "layers.0.weight"
    other = received[1][name] + (record.sent_sums[0][name] + received[0][name])
    assert not torch.equal(other, record.gradient[name])
    record.gradient[name] = other
    shared.redo(2)
    assert "in their order" in shared.examine(2)["reason"]


def _other_received(record):
    record.received_sums[0]["layers.0.weight"] = record.received_sums[0]["layers.0.weight"] + 1


def _of_no_parameter(record):
    record.received_sums[0]["layers.1.weight"] = torch.ones(WIDTH, WIDTH)


def _of_another_shape(record):
    record.received_sums[0]["layers.0.weight"] = torch.ones(WIDTH)


def _two_versions(record):
    record.sent_sums[2] = {name: tensor * 2 for name, tensor in record.sent_sums[2].items()}


def _withheld(record):
    record.sent_sums[0].clear()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_other_received, "in their order"),
        (_of_no_parameter, "fits no parameter tied with stage 0"),
        (_of_another_shape, "fits no parameter tied with stage 0"),
        (_two_versions, "sent to one holder than to another"),
        (_withheld, "sent to one holder than to another"),
    ],
)
def test_sums_that_cannot_be_are_fraudulent_even_if_committed_to(rig, model, change, says):
    shared = Shared(rig, model)
    change(shared.stages[1].log.committed(0))
    shared.redo(1)
    found = shared.examine(1)
    assert found["finding"] == "fraudulent"
    assert says in found["reason"]
    assert shared.disagreements()


def test_opening_other_sums_than_were_committed_to_is_fraudulent(rig, model):
    shared = Shared(rig, model)
    _other_received(shared.stages[1].log.committed(0))
    assert "opened other data: received/0" in shared.examine(1)["reason"]


@pytest.mark.parametrize("roots", [{}, {"from/0": bytes(32)}])
def test_a_commitment_names_every_holder(rig, model, roots):
    shared = Shared(rig, model)
    shared.redo(1, roots)
    assert "tied with stages [0, 2]" in shared.examine(1)["reason"]
    assert shared.disagreements() == {(0, 1), (1, 2)}
