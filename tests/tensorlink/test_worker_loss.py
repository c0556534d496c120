"""Workers that die or fall silent while nobody takes their stages over: the user hears of it within seconds, and
everything still closes. How they are taken over is in `recovery/`.

Tests here use up the workers of one network, in order.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tensorlink
from smartnodes_core.errors import DeadlineError, NoWorkersError, SmartnodesError, WorkerLostError
from tensorlink import placement
from tensorlink.network import LocalNetwork
from tensorlink.recovery import recovery

pytestmark = pytest.mark.starts_network

WITHIN_S = 5.0
X, Y = torch.randn(8, 6), torch.randint(0, 4, (8,))


@pytest.fixture(scope="module")
def fragile(processes):
    before = set(processes.descendants(os.getpid()))
    with LocalNetwork(workers=4, validators=1, slots_per_worker=8, round_interval_s=5, audit_rates=(0, 0)) as network:
        everything = set(processes.descendants(os.getpid())) - before
        yield network
        began = time.monotonic()
    assert time.monotonic() - began < processes.patience_s(WITHIN_S)
    assert processes.wait_until(lambda: not processes.alive(everything), 1.0) is not None
    assert not network.log_dir.exists()


class Rig:
    """A job of two stages on the network, and the processes of its workers."""

    def __init__(self, network, processes, **options):
        self.patience_s = processes.patience_s
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.model = tensorlink.DistributedModel(
            module, network=network, stages=2, micro_batches=4, example_inputs=(X,), progress=False, **options
        )
        self.optimizer = tensorlink.DistributedOptimizer(self.model, torch.optim.SGD, lr=0.1)
        endpoints = [stage["endpoint"] for stage in self.model.report()["stages"]]
        self.nodes = [network.local.node_named(network.local.name_at(endpoint)) for endpoint in endpoints]
        self.compute = [processes.descendants(node.pid)[0] for node in self.nodes]

    def step(self):
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(X), Y)
        loss.backward()
        self.optimizer.step()


@pytest.fixture(autouse=True)
def nobody_takes_over(monkeypatch):
    monkeypatch.setattr(recovery, "replacements", lambda *args: None)
    monkeypatch.setattr(recovery, "WAIT_FOR_RIG_S", 0.0)


@pytest.fixture
def rig(fragile, processes):
    made = Rig(fragile, processes)
    made.step()
    yield made
    made.model.close()


def kill_soon(node):
    """Let the caller begin to wait, then pull the plug."""
    timer = threading.Timer(0.5, node.kill)
    timer.start()


def raises_lost(rig, stage, act):
    began = time.monotonic()
    with pytest.raises(WorkerLostError, match=f"stage {stage}"):
        act()
    assert time.monotonic() - began < rig.patience_s(WITHIN_S)


def test_a_worker_that_falls_silent_is_given_up_after_the_timeout(fragile, processes):
    rig = Rig(fragile, processes)
    rig.step()
    rig.model._placement.driver._progress.timeout_s = 2.0  # least: a machine that is slow has more patience
    os.kill(rig.compute[1], signal.SIGSTOP)
    try:
        with pytest.raises(DeadlineError, match=r"waited for the outputs of a forward pass.*raise timeout_s"):
            rig.model(X)
    finally:
        os.kill(rig.compute[1], signal.SIGCONT)
        rig.model.close()


def test_the_computing_process_dies_and_the_node_lives(rig, fragile, processes):
    os.kill(rig.compute[1], signal.SIGKILL)
    raises_lost(rig, 1, rig.step)
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        rig.step()
    assert rig.nodes[1].poll() is None
    rig.model.close()
    assert processes.wait_until(lambda: processes.alive(processes.descendants(rig.nodes[1].pid)), 15.0) is not None
    assert processes.wait_until(lambda: _trains(fragile, processes), 15.0) is not None


def _trains(network, processes):
    try:
        rig = Rig(network, processes)
    except SmartnodesError:
        return False
    rig.step()
    rig.model.close()
    return True


def test_a_worker_is_killed_during_a_forward(rig):
    os.kill(rig.compute[1], signal.SIGSTOP)
    kill_soon(rig.nodes[1])
    raises_lost(rig, 1, lambda: rig.model(X))
    raises_lost(rig, 1, lambda: rig.model.state_dict())


def test_a_worker_is_killed_during_a_backward(rig):
    loss = rig.model(X).sum()
    os.kill(rig.compute[0], signal.SIGSTOP)
    kill_soon(rig.nodes[0])
    raises_lost(rig, 0, loss.backward)


def test_a_worker_is_killed_between_steps_and_too_few_are_left(rig, fragile, monkeypatch):
    rig.nodes[0].kill()
    rig.nodes[0].wait()
    raises_lost(rig, 0, rig.step)
    monkeypatch.setattr(placement, "WAIT_FOR_WORKERS_S", 0.5)
    with pytest.raises(NoWorkersError, match=r"found \d free workers .*needed 3"):
        tensorlink.DistributedModel(
            nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)),
            network=fragile,
            stages=3,
            example_inputs=(X,),
            progress=False,
        )
