"""A network trains on while the chain does not answer, and settles later what was earned. Long, so behind an option."""

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
from tensorlink.network import LocalNetwork

X, Y = torch.randn(8, 6), torch.randint(0, 4, (8,))
PAUSE_S = 0.5


def until(condition, timeout_s=90.0):
    deadline_s, pause = time.monotonic() + timeout_s, threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        pause.wait(0.2)


@pytest.mark.timeout(1800)
def test_a_network_trains_on_while_the_chain_is_away_and_settles_it_later(pytestconfig):
    away_s = pytestconfig.getoption("--chain-away-s")
    if not away_s:
        pytest.skip("takes minutes: --chain-away-s=180")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    with LocalNetwork(workers=2, validators=4, round_interval_s=5) as network:
        chain = next(each["pid"] for each in network.processes() if each["name"] == "chain")
        model = tensorlink.DistributedModel(
            module, network=network, stages=2, micro_batches=4, example_inputs=(X,), progress=False
        )
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)

        def step():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), Y)
            loss.backward()
            optimizer.step()
            return loss.item()

        def round_number():
            return network.chain.round_state(network.network_id).number

        losses = [step()]
        until(lambda: round_number() >= 2)
        before = round_number()
        os.killpg(chain, signal.SIGSTOP)
        try:
            end_s = time.monotonic() + away_s
            while time.monotonic() < end_s:
                losses.append(step())
                threading.Event().wait(PAUSE_S)
        finally:
            os.killpg(chain, signal.SIGCONT)
        assert len(losses) > away_s / PAUSE_S / 4
        assert losses[-1] < losses[0]
        until(lambda: round_number() >= before + 3)

        def reputations():
            members = network.chain.members(network.network_id)
            return [member.reputation for member in members if member.role == "worker"]

        until(lambda: min(reputations()) > 1)
        losses.append(step())
        logs = "".join(path.read_text() for path in network.log_dir.rglob("log"))
        assert logs
        assert "signed twice" not in logs
        assert "Traceback" not in logs
