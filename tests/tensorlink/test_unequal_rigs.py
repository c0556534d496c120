"""A network whose rigs differ: who has little memory gets little of the model, and the training is the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tensorlink
from tensorlink.errors import PartitionError
from tensorlink.network import LocalNetwork

pytestmark = pytest.mark.starts_network

SMALL_BYTES = 500 << 20
WIDTH, LAYERS, ROWS = 2560, 6, 8
X, Y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)


@pytest.fixture(scope="module")
def unequal():
    """Two rigs, the first of which offers less than half of what the model needs."""
    small = {"worker-0": {"max-memory-bytes": SMALL_BYTES}}
    with LocalNetwork(workers=2, audit_rates=(0.0, 0.0), flags=small) as network:
        yield network


def model_of(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers)))


def losses_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(model.train_step(X, Y, loss_fn=F.mse_loss, optimizer=optimizer)) for _ in range(3)]


@pytest.fixture(scope="module")
def expected():
    """The losses of one plain process."""
    plain = tensorlink.reference(model_of(LAYERS), micro_batches=4, example_inputs=(X,))
    return losses_of(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3))


def test_the_rig_with_little_memory_gets_what_it_can_hold_and_losses_are_the_same(unequal, expected):
    with tensorlink.DistributedModel(
        model_of(LAYERS), network=unequal, stages=2, micro_batches=4, example_inputs=(X,), progress=False
    ) as model:
        assert losses_of(model, tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-3)) == expected
        report = model.report()
        offers = {worker.endpoints[0]: worker.offers["memory_bytes"] for worker in unequal.station.find("worker")}
    layers, needed = Counter(), Counter()
    for stage in report["stages"]:
        layers[stage["endpoint"]] += len(stage["parameters"]) // 2
        needed[stage["endpoint"]] += stage["memory_bytes"]
    small = min(offers, key=offers.__getitem__)
    assert offers[small] == SMALL_BYTES
    assert 1 <= layers[small] <= 2
    assert layers.total() == LAYERS
    assert all(num_bytes <= offers[endpoint] for endpoint, num_bytes in needed.items())
    assert report["schedule"] in report["plan"]
    assert report["step_s"] > 0


def test_a_schedule_that_is_asked_for_is_planned_and_run(unequal, expected):
    with tensorlink.DistributedModel(
        model_of(LAYERS),
        network=unequal,
        stages=2,
        micro_batches=4,
        example_inputs=(X,),
        progress=False,
        schedule="gpipe",
    ) as model:
        assert losses_of(model, tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-3)) == expected
        assert model.report()["schedule"] == "gpipe"
    with pytest.raises(PartitionError, match="found schedule='zigzag', needed 'auto' or one of gpipe, 1f1b, int"):
        tensorlink.DistributedModel(model_of(2), network=unequal, example_inputs=(X,), schedule="zigzag")
