"""Rigs of two devices in a real network: trained on, audited, killed; and what their computing process is confined to.

Each test's network has every unit audited.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tensorlink
from smartnodes_core.sandbox import Limits
from tensorlink.network import LocalNetwork

pytestmark = pytest.mark.starts_network

_spec = importlib.util.spec_from_file_location("compute_tests", Path(__file__).parents[1] / "test_compute.py")
compute_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compute_tests)

TOLERANCE = 1e-6
WORKERS = 2


@pytest.fixture(scope="module")
def network():
    """Every rig has two devices, of one thread each."""
    flags = {f"worker-{index}": {"devices": 2} for index in range(WORKERS)}
    with LocalNetwork(
        workers=WORKERS, slots_per_worker=8, round_interval_s=5, audit_rates=(1.0, 1.0), flags=flags
    ) as running:
        yield running


def gpt(models):
    torch.manual_seed(0)
    return models.Gpt(dropout=0.1), torch.randint(0, 32, (8, 6)), torch.randint(0, 32, (8, 6))


def mlp(models):
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.2))]
    return nn.Sequential(*layers, nn.Linear(16, 4)), torch.randn(8, 16), torch.randint(0, 4, (8,))


def loss_fn(output, target):
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def distance(found, wanted):
    apart = sum(float((found[name] - wanted[name]).norm() ** 2) for name in wanted)
    return (apart / sum(float(tensor.norm() ** 2) for tensor in wanted.values())) ** 0.5


@pytest.fixture
def models():
    spec = importlib.util.spec_from_file_location("models", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("make", "stages"), [(gpt, 1), (mlp, 2)], ids=["gpt", "mlp"])
def test_training_is_that_of_one_process_and_every_audit_passes(network, models, processes, make, stages):
    module, x, y = make(models)
    plain = tensorlink.reference(make(models)[0], micro_batches=4, example_inputs=(x,))
    plain_optimizer = torch.optim.SGD(plain.module.parameters(), lr=0.05, momentum=0.9, foreach=False)
    with tensorlink.DistributedModel(
        module, network=network, stages=stages, micro_batches=4, example_inputs=(x,), progress=False
    ) as model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.05, momentum=0.9)
        for _ in range(4):
            loss = model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer)
            expected = plain.train_step(x, y, loss_fn=loss_fn, optimizer=plain_optimizer)
            assert float(loss) == pytest.approx(float(expected), rel=TOLERANCE)
            wanted = {name: tensor.detach() for name, tensor in plain.module.state_dict().items()}
            assert distance(model.state_dict(), wanted) < TOLERANCE
        # each step of each stage (on a V every worker has two), re-executed as a whole by a rig of one device
        every = 4 * len(model.report()["stages"])
        assert processes.wait_until(lambda: sum(model.audits().values()) == every, 60.0) is not None, model.audits()
        assert [verdict.reason for verdict in model.verdicts() if verdict.finding != "honest"] == []


def test_when_its_computing_process_is_killed_the_next_one_takes_the_stage_up_again(network, models, processes):
    module, x, y = mlp(models)
    with tensorlink.DistributedModel(
        module, network=network, stages=1, micro_batches=4, example_inputs=(x,), progress=False
    ) as model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.05)
        model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer)
        node = network.local.node_named(network.local.name_at(model.report()["stages"][0]["endpoint"]))
        compute = processes.descendants(node.pid)[0]
        os.kill(compute, signal.SIGKILL)  # a rank is a thread of it: what ends one ends all
        model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer)
        assert ["SIGKILL" in recovered.reason for recovered in model.recoveries()] == [True]
        assert node.poll() is None


@pytest.fixture
def rig_of_two(rig):
    node = compute_tests.Node(limits=Limits(num_devices=2))
    yield node
    node.sandbox.stop()


def test_each_device_holds_about_half_and_the_rig_says_how_a_stage_lies_on_them(rig, rig_of_two):
    modules, (x, _) = rig.MODELS["gpt"](), rig.batch("gpt")
    programs, states = rig.stage_programs(modules, x[:2])
    program = compute_tests.only(programs[1])
    rig_of_two.load(program, states[1], rig.JOB)
    found = rig_of_two.call("shards")
    whole = sum(tensor.numel() * tensor.element_size() for tensor in states[1].values())
    assert found["num_bytes"][0] == found["num_bytes"][1] < 0.55 * whole
    assert "0.qkv.weight: dim 0 in 3 blocks" in found["plan"]
    back = rig_of_two.state()
    assert all(torch.equal(back[name], tensor) for name, tensor in states[1].items())


def test_two_devices_measure_themselves_and_say_that_they_are_two(rig_of_two):
    measured = rig_of_two.call("measure")
    assert measured["numeric_class"].endswith("threads 1 on Ranks(cpu, cpu)")
    assert measured["flops_per_s"] > 0
    assert any("ranks connected" in line for line in measured["confinement"]) or measured["unconfined"]


def test_the_process_of_two_devices_has_sockets_to_itself_alone(rig_of_two):
    rig_of_two.call("measure")
    pid = rig_of_two.sandbox.pid
    if os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        pytest.skip("no namespaces here")
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    addresses = {end.split(":")[0] for line in lines for end in line.split()[1:3]}
    assert addresses <= {"0100007F", "00000000"}  # 127.0.0.1, and the other end of what listens
    assert [line.split(":")[0].strip() for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]] == ["lo"]
