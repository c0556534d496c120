"""A worker that cheats is found by audits, marked down on chain after a round, has no place in the network any more,
and what it did is undone."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tensorlink
from tensorlink.errors import FraudError
from tensorlink.network import LocalNetwork

pytestmark = pytest.mark.starts_network

#: Every worker that begins cheats, after so many honest steps; those that are honest join later.
CHEATS = {"worker-0": ("x0.99-weight-gradient", 3), "worker-1": ("skipped-weight-gradient", 6)}
FOUND_WITHIN_S = 60.0
X, Y = torch.randn(8, 6), torch.randint(0, 4, (8,))


@pytest.fixture(scope="module")
def crooked():
    program = (sys.executable, "-m", "tensorlink.cli.cheating_worker")
    commands = {name: (*program, cheat, str(honest)) for name, (cheat, honest) in CHEATS.items()}
    with LocalNetwork(
        workers=4,
        validators=2,
        round_interval_s=3,
        claim_delay_s=3,
        audit_rates=(0.0, 0.1),
        audit_window_steps=512,  # steps here are much quicker than audits
        commands=commands,
        late=["worker-2", "worker-3"],
        slots_per_worker=4,
    ) as network:
        yield network


@pytest.fixture
def rig(crooked):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    plain_module = copy.deepcopy(module)
    with tensorlink.DistributedModel(
        module, network=crooked, stages=2, micro_batches=4, example_inputs=(X,), progress=False, schedule="1f1b"
    ) as model:
        plain = tensorlink.reference(plain_module, micro_batches=4, example_inputs=(X,), stages=model.programs)
        yield model, plain, plain_module


def test_cheats_are_found_shut_out_and_replaced_and_what_they_did_is_undone(crooked, rig, processes):
    model, plain, plain_module = rig
    for name in crooked.settings.late:
        crooked.local.start_node(name)
    began_with = {bytes.fromhex(stage["worker"]) for stage in model.report()["stages"]}
    optimizer = tensorlink.DistributedOptimizer(model, torch.optim.Adam, lr=0.01)
    num_steps = 0

    def all_replaced():
        nonlocal num_steps
        model.train_step(X, Y, loss_fn=F.cross_entropy, optimizer=optimizer)
        num_steps += 1
        return not began_with & {bytes.fromhex(stage["worker"]) for stage in model.report()["stages"]}

    assert processes.wait_until(all_replaced, FOUND_WITHIN_S) is not None
    guilty = {verdict.worker for verdict in model.verdicts() if verdict.finding == "fraudulent"}
    assert guilty == began_with
    plain_optimizer = torch.optim.Adam(plain_module.parameters(), lr=0.01)
    for _ in range(num_steps):
        plain.train_step(X, Y, loss_fn=F.cross_entropy, optimizer=plain_optimizer)
    found = model.state_dict()
    for name, tensor in plain_module.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert processes.wait_until(lambda: not any(crooked.reputation_of(key) for key in guilty), 20.0) is not None
    honest = {bytes.fromhex(stage["worker"]) for stage in model.report()["stages"]}
    assert all(crooked.reputation_of(key) for key in honest)
    assert not guilty & {announcement.node_key for announcement in crooked.announced_workers()}


def test_in_the_loop_of_a_pytorch_user_the_cheat_is_replaced_and_the_user_told_what_to_undo():
    program = (sys.executable, "-m", "tensorlink.cli.cheating_worker", "zero-weight-gradient", "2")
    with LocalNetwork(
        workers=2, round_interval_s=3, audit_rates=(0.0, 0.1), commands={"worker-0": program}, slots_per_worker=2
    ) as network:
        model = tensorlink.DistributedModel(
            nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)),
            network=network,
            stages=2,
            micro_batches=4,
            schedule="1f1b",
            example_inputs=(X,),
            progress=False,
        )
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)

        def train():
            for _ in range(1000):
                optimizer.zero_grad()
                F.cross_entropy(model(X), Y).backward()
                optimizer.step()

        with pytest.raises(FraudError, match=r"It was replaced.*load a checkpoint of step \d+ or before"):
            train()
        assert len({stage["worker"] for stage in model.report()["stages"]}) == 1
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        model.close()
