"""A worker that cheats is found by audits, marked down on chain after a round, and has no place in the network."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tensorlink
from smartnodes_core.errors import NoWorkersError, SmartnodesError
from tensorlink import placement
from tensorlink.network import LocalNetwork

pytestmark = pytest.mark.starts_network


CHEATS = {"worker-0": "scaled-gx", "worker-1": "skipped-weight-gradient"}
FOUND_WITHIN_S = 40.0


@pytest.fixture(scope="module")
def crooked():
    commands = {
        name: (sys.executable, "-m", "tensorlink.demo.cheating_worker", cheat) for name, cheat in CHEATS.items()
    }
    with LocalNetwork(
        workers=4, validators=2, round_interval_s=3, claim_delay_s=3, audit_rates=(0.3, 0.5), commands=commands
    ) as network:
        yield network


def test_cheats_are_found_and_shut_out_and_the_honest_are_not(crooked, processes, monkeypatch):
    network = crooked
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )
    x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    with tensorlink.DistributedModel(
        module, network=network, stages=4, micro_batches=4, example_inputs=(x,), progress=False
    ) as model:
        report = model.report()
        names = {network.local.name_at(stage["endpoint"]): bytes.fromhex(stage["worker"]) for stage in report["stages"]}
        first = bytes.fromhex(report["stages"][0]["worker"])  # has no input gradient to scale
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)
        crooks = {names[name] for name, cheat in CHEATS.items() if not (cheat == "scaled-gx" and names[name] == first)}

        def found():
            try:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            except SmartnodesError:  # the network has shut a crook out: the job cannot go on
                return True
            return all(network.reputation_of(key) in (0, None) for key in crooks)

        assert processes.wait_until(found, FOUND_WITHIN_S) is not None
        guilty = {verdict.worker for verdict in model.verdicts() if verdict.finding == "fraudulent"}
        assert guilty
        assert guilty <= crooks
    assert processes.wait_until(lambda: not any(network.reputation_of(key) for key in guilty), 15.0) is not None
    honest = {key for name, key in names.items() if name not in CHEATS}
    assert all(network.reputation_of(key) for key in honest)
    assert not guilty & {announcement.node_key for announcement in network.station.find("worker")}
    monkeypatch.setattr(placement, "WAIT_FOR_WORKERS_S", 1.0)
    with pytest.raises((NoWorkersError, SmartnodesError)):
        tensorlink.DistributedModel(module, network=network, stages=4, example_inputs=(x,), progress=False)
