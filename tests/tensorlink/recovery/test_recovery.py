"""Rigs are killed at every point of a step, and the run goes on: the same losses and weights, bit for bit.

The oracle is the same training in one plain process.
"""

from __future__ import annotations

import copy
import os
import signal
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tensorlink
from smartnodes_core.errors import NoWorkersError
from tensorlink.network import LocalNetwork
from tensorlink.recovery import heartbeat, keeper
from tensorlink.recovery.keeper import SnapshotKeeper

pytestmark = pytest.mark.starts_network

NUM_STEPS = 6
BATCHES = [(torch.randn(16, 12), torch.randint(0, 4, (16,))) for _ in range(NUM_STEPS)]


@pytest.fixture(scope="module")
def network():
    with LocalNetwork(workers=3, validators=1, slots_per_worker=8, round_interval_s=5, audit_rates=(0, 0)) as network:
        yield network


@pytest.fixture(autouse=True)
def everybody_is_there(network):
    yield
    for name in ("worker-0", "worker-1", "worker-2"):
        if network.local.node_named(name).poll() is not None:
            network.local.start_node(name)


class Run:
    """A model of three stages in training on the network, and the same in one plain process."""

    def __init__(self, network, **options):
        torch.manual_seed(0)
        layers = [nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 16), nn.Tanh()]
        module = nn.Sequential(*layers, nn.Linear(16, 4))
        self.plain_module = copy.deepcopy(module)
        self.network = network
        settings = {"micro_batches": 4, "example_inputs": (BATCHES[0][0],), **options}
        self.model = tensorlink.DistributedModel(
            module, network=network, stages=2, progress=False, schedule="1f1b", **settings
        )
        self.optimizer = tensorlink.DistributedOptimizer(self.model, torch.optim.AdamW, lr=1e-2)
        self.plain = tensorlink.reference(
            self.plain_module,
            micro_batches=4,
            example_inputs=(BATCHES[0][0],),
            stages=None if "private" in options else self.model.programs,
        )
        self.plain_optimizer = torch.optim.AdamW(self.plain_module.parameters(), lr=1e-2)
        self.driver = self.model._placement.driver

    def name_of(self, stage):
        endpoint = self.model.report()["stages"][stage]["endpoint"]
        return self.network.local.name_at(endpoint)

    def kill(self, stage):
        self.network.local.kill(self.name_of(stage))

    def kill_when(self, monkeypatch, owner, name, stage, at_call=1):
        """Kill the rig of a stage just before a method of the user's side runs for the `at_call`th time."""
        method, calls = getattr(owner, name), []

        def killing(*args, **kwargs):
            calls.append(name)
            if len(calls) == at_call:
                self.kill(stage)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, killing)

    def train_step(self, step):
        x, y = BATCHES[step]
        loss = self.model.train_step(x, y, loss_fn=F.cross_entropy, optimizer=self.optimizer)
        assert torch.equal(loss, self.plain.train_step(x, y, loss_fn=F.cross_entropy, optimizer=self.plain_optimizer))

    def loop_step(self, step):
        x, y = BATCHES[step]
        losses = []
        for model, optimizer in ((self.model, self.optimizer), (self.plain, self.plain_optimizer)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if model is self.model:
                self.model.clip_grad_norm_(1.0)
            else:
                torch.nn.utils.clip_grad_norm_(self.plain_module.parameters(), 1.0)
            optimizer.step()
            losses.append(loss)
        self.plain.end_step()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)  # the clip norm is summed in double here

    def end(self, num_recoveries=1, exact=True):
        assert len(self.model.recoveries()) == num_recoveries, self.model.recoveries()
        state = self.model.state_dict()
        self.model.close()
        for name, tensor in self.plain_module.state_dict().items():
            if exact:
                assert torch.equal(state[name], tensor), name
            else:
                torch.testing.assert_close(state[name], tensor)


@pytest.fixture
def run(network):
    made = Run(network)
    made.train_step(0)
    made.train_step(1)
    yield made
    made.model.close()


def rest(run, step=2):
    for at in range(step, NUM_STEPS):
        run.train_step(at)


def test_a_rig_is_killed_between_two_steps(run):
    run.kill(1)
    rest(run)
    run.end()


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        pytest.param("send", 0, id="when the first micro-batch is sent"),
        pytest.param("wait_for", 1, id="while micro-batches are under way"),
        pytest.param("call_all", 0, id="when the step is decided"),
    ],
)
def test_a_rig_is_killed_in_a_step(run, monkeypatch, name, stage):
    run.kill_when(monkeypatch, run.driver, name, stage)
    rest(run)
    run.end()


def test_a_rig_is_killed_after_some_stages_have_committed_and_others_not(run, monkeypatch):
    begin_call, killed = run.driver._begin_call, []

    def one_only(stage, method, *args):
        if method == "decide" and stage == 1 and not killed:
            killed.append(stage)
            run.kill(1)
        return begin_call(stage, method, *args)

    monkeypatch.setattr(run.driver, "_begin_call", one_only)
    rest(run)
    run.end()


def test_a_rig_is_killed_while_its_snapshot_is_fetched(network, monkeypatch):
    run, fetch, killed = Run(network), keeper.fetch, threading.Event()

    def killing(driver, program, step, path):
        if program.stage_index == 1 and not killed.is_set():
            run.kill(1)
            killed.set()
        return fetch(driver, program, step, path)

    monkeypatch.setattr(keeper, "fetch", killing)
    run.train_step(0)
    assert killed.wait(10)
    rest(run, 1)
    run.end()


def test_a_second_rig_is_killed_while_the_first_is_taken_over(run, monkeypatch):
    run.kill_when(monkeypatch, run.model._recovery, "_load", 0)
    run.kill(1)
    rest(run)
    run.end()


def test_both_rigs_are_killed_at_once_and_one_takes_both_stages(run):
    run.kill(0)
    run.kill(1)
    rest(run)
    assert run.name_of(0) == run.name_of(1)
    run.end()


def test_a_rig_that_takes_no_stage_is_passed_over(run, network, monkeypatch):
    spare = ({"worker-0", "worker-1", "worker-2"} - {run.name_of(0), run.name_of(1)}).pop()
    replan, plans = network.user.replan, []

    def refused_once(job, plan):
        plans.append(plan)
        if len(plans) == 1:
            raise NoWorkersError("worker x does not take its stage: 0 of 8 slots are free")
        return replan(job, plan)

    monkeypatch.setattr(network.user, "replan", refused_once)
    other = run.name_of(0)
    run.kill(1)
    rest(run)
    assert [plan.version for plan in plans] == [1, 2]
    assert run.name_of(1) == other != spare
    run.end()


def test_without_a_spare_the_run_waits_until_a_rig_joins(run, network, monkeypatch, caplog):
    taken = [run.name_of(0), run.name_of(1)]
    spare = ({"worker-0", "worker-1", "worker-2"} - set(taken)).pop()
    for name in (spare, *taken):
        network.local.kill(name)
    timer = threading.Timer(2.0, network.local.start_node, (spare,))
    timer.start()
    rest(run)
    timer.join()
    assert "the run waits until one joins" in caplog.text
    run.end()


def test_the_computing_process_dies_and_its_stage_goes_to_another_rig(run, processes):
    before = run.name_of(1)
    os.kill(processes.descendants(run.network.local.node_named(before).pid)[0], signal.SIGKILL)
    rest(run)
    assert run.name_of(1) != before
    run.end()
    node = run.network.local.node_named(before)
    assert processes.wait_until(lambda: processes.descendants(node.pid), 15.0) is not None  # for the tests after this


def test_a_rig_that_is_told_to_end_leaves_and_its_stage_goes_to_another(run):
    before = run.network.local.node_named(run.name_of(1))
    before.terminate()
    rest(run)
    assert before.wait(10) == 0
    run.end()


def test_a_rig_that_hangs_is_given_up(network, processes, monkeypatch):
    monkeypatch.setattr(heartbeat, "LEAST_S", 1.0)
    monkeypatch.setattr(type(network), "heartbeat_s", 0.2)
    run = Run(network)
    run.train_step(0)
    before = run.name_of(1)
    hung = processes.descendants(network.local.node_named(before).pid)[0]
    os.kill(hung, signal.SIGSTOP)
    try:
        rest(run, 1)
        assert run.name_of(1) != before
        run.end()
    finally:
        os.kill(hung, signal.SIGCONT)


@pytest.mark.parametrize("name", ["tell_all", "call_all"])
def test_a_rig_is_killed_in_the_loop_of_a_pytorch_user(network, monkeypatch, name):
    run = Run(network)
    run.loop_step(0)
    run.kill_when(monkeypatch, run.driver, name, 1)
    for step in range(1, 4):
        run.loop_step(step)
    run.end(exact=False)


def test_a_backward_through_a_graph_of_before_the_loss_of_a_rig_goes_on(network):
    run = Run(network)
    run.loop_step(0)
    x, y = BATCHES[1]
    run.plain_optimizer.zero_grad()
    loss, plain_loss = F.cross_entropy(run.model(x), y), F.cross_entropy(run.plain(x), y)
    run.kill(1)
    loss.backward()
    plain_loss.backward()
    run.optimizer.step()
    run.plain_optimizer.step()
    run.plain.end_step()
    run.end(exact=False)


def test_private_layers_go_back_with_the_stages(network):
    run = Run(network, private=["0"])
    for step in range(3):
        run.train_step(step)
    run.kill(0)
    for step in range(3, NUM_STEPS):
        run.train_step(step)
    run.end()


def test_what_is_done_again_is_little_because_snapshots_are_taken(network, monkeypatch):
    monkeypatch.setattr(SnapshotKeeper, "interval_steps", 1)
    taken = threading.Event()
    keep = SnapshotKeeper.keep

    def kept(self, snapshot):
        keep(self, snapshot)
        if snapshot.step == 4:
            taken.set()

    monkeypatch.setattr(SnapshotKeeper, "keep", kept)
    run = Run(network)
    for step in range(5):
        run.train_step(step)
    assert taken.wait(10)
    run.kill(1)
    run.train_step(5)
    assert run.model.recoveries()[0].first_step == 4
    run.end()


def test_a_damaged_snapshot_is_not_used_but_the_one_before(network, monkeypatch, caplog):
    monkeypatch.setattr(SnapshotKeeper, "interval_steps", 1)
    run = Run(network)
    for step in range(5):
        run.train_step(step)
    store = run.model._recovery._keeper
    with store._lock:
        assert store._lock.wait_for(lambda: False, 0.5) is False  # the last fetch may be under way
    newest = store._kept[-1]
    path = newest.folder / "stage-0"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run.kill(1)
    run.train_step(5)
    assert "is damaged: an older one is taken" in caplog.text
    assert run.model.recoveries()[0].first_step < newest.step
    run.end()
