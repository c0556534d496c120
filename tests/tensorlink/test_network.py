"""Networks as a script sees them: one on this machine, or one that runs."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time

import pytest
import torch
from torch import nn

import tensorlink
from smartnodes_core.chain.account import save_account_key
from smartnodes_core.chain.base import RefusedError
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.errors import (
    AuthorityError,
    ChainUnreachableError,
    ConfigError,
    ConnectionLostError,
    LocalError,
    NoWorkersError,
    PeerUnreachableError,
)
from smartnodes_core.identity import Identity
from smartnodes_core.nodes import station
from smartnodes_core.nodes.paying import Offer, take_back
from smartnodes_core.payments import Price
from smartnodes_core.records import Announcement
from tensorlink.network import LocalNetwork

pytestmark = pytest.mark.starts_network

#: Accounts of the devnet that no node of the network has, and no other test's.
ACCOUNTS = itertools.count(56)


@pytest.fixture
def config(network, tmp_path):
    """A settings file of another user; `write(**changes)` changes settings."""
    Identity.create().save(tmp_path / "identity.json")
    save_account_key(tmp_path / "account.json", devnet_key(next(ACCOUNTS)))
    settings = {
        "identity": tmp_path / "identity.json",
        "account": tmp_path / "account.json",
        "addresses": network.log_dir / "addresses.json",
        "rpc_url": network.local.chain_url,
    }

    def write(bootstrap=(network.station.config.bootstrap[0],), **changes):
        lines = [f'{key} = "{value}"' for key, value in {**settings, **changes}.items()]
        path = tmp_path / "user.toml"
        path.write_text("\n".join([*lines, f"bootstrap = {list(bootstrap)}"]))
        return path

    return write


def test_a_network_tells_what_it_is_made_of(network):
    rows = network.processes()
    names = [row["name"] for row in rows]
    assert names[:3] == ["user (this process)", "chain", "validator-0"]
    assert {f"worker-{index} compute" for index in range(3)} <= set(names)
    assert all(row["resident_bytes"] > 1 << 20 for row in rows)
    assert "3 workers" in str(network)
    assert len(network.validators()) == 1
    assert "E " not in network.local.log_of("worker-0")


def test_workers_are_found_with_what_they_offer(network):
    found = network.find_workers(3, 5.0)
    assert len(found) == 3
    assert all(worker.offers["memory_bytes"] > 0 and worker.offers["flops_per_s"] > 0 for worker in found)
    assert all(network.reaches(worker) for worker in found)
    assert all((network.reputation_of(worker.node_key) or 0) >= 1 for worker in found)
    assert len(network.find_workers(5, 0.3)) == 3


def test_an_announcement_of_nobody_is_not_reached(network):
    ghost = Announcement(
        node_key=Identity.create().node_key, role="worker", network_id=1, sequence=1, expires_at_s=1 << 31,
        endpoints=["127.0.0.1:9"], offers={},
    )  # fmt: skip
    assert not network.reaches(ghost)


def test_a_worker_that_has_not_seen_our_registration_is_asked_again(network, monkeypatch):
    answers = [AuthorityError("not registered"), ConnectionLostError("refused"), None]

    def reach(node_key):
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    worker = network.find_workers(1, 5.0)[0]
    monkeypatch.setattr(network.station.node, "reach", reach)
    assert network.reaches(worker)
    assert answers == []


def test_no_free_worker_is_said_in_numbers(network, monkeypatch):
    monkeypatch.setattr(network.station, "find", lambda role: [])
    with pytest.raises(NoWorkersError, match=r"found no free worker \(0 announced, .*\), needed 2: start rigs"):
        network.find_workers(2, 0.1)


def test_another_user_joins_with_a_settings_file_and_trains(network, config):
    x = torch.randn(4, 3)
    with tensorlink.connect(config()) as joined:
        assert joined.network_id == network.network_id
        with tensorlink.DistributedModel(
            nn.Linear(3, 2), network=joined, stages=1, example_inputs=(x,), progress=False
        ) as model:
            optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)
            model(x).sum().backward()
            optimizer.step()
            assert model.report()["num_steps"] == 1


def test_a_job_is_paid_from_its_deposit_as_its_work_is_verified(network, config):
    x = torch.randn(4, 3)
    with tensorlink.connect(config()) as joined:
        network.chain.transfer(joined.chain.account, 10**9)
        joined.offer = Offer(Price(1, 1), deposit_wei=10**9, lasts_s=600)
        with tensorlink.DistributedModel(
            nn.Linear(3, 2), network=joined, stages=1, example_inputs=(x,), progress=False
        ) as model:
            optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)
            model(x).sum().backward()
            optimizer.step()
            job = model._placement.job
        chain = joined.chain
        escrow_id = chain.escrow_id(joined.network_id, chain.account, job.id)
        pause, deadline = threading.Event(), time.monotonic() + 60
        while chain.escrow(escrow_id).remaining_wei == 10**9:
            assert time.monotonic() < deadline
            pause.wait(0.2)
        work = 4 * job.record.work_units[0]  # as many micro-batches
        assert chain.escrow(escrow_id).remaining_wei == 10**9 - work - -(-work * 500 // 10_000)
        worker = joined.station.membership.account_of(job.worker_of(0))
        assert chain.balances(worker).credit_wei >= work
        with pytest.raises(RefusedError, match="NotYetRefundable"):
            take_back(chain, joined.network_id, job.id)


def test_joining_says_what_is_wrong(config, monkeypatch):
    monkeypatch.setattr(station, "JOIN_TIMEOUT_S", 0.5)
    with pytest.raises(ChainUnreachableError, match=r"http://127\.0\.0\.1:9"):
        tensorlink.connect(config(rpc_url="http://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="unknown setting 'bootstraps'"):
        tensorlink.connect(config(bootstraps="x"))
    with pytest.raises(ConfigError, match="no bootstrap validator"):
        tensorlink.connect(config(bootstrap=()))
    with pytest.raises(PeerUnreachableError, match=r"127\.0\.0\.1:9"):
        tensorlink.connect(config(bootstrap=("127.0.0.1:9",)))


def test_a_node_that_does_not_come_up_is_named_with_its_log(processes):
    before = set(processes.descendants(os.getpid()))
    ends = (sys.executable, "-c", "import sys; sys.stderr.write('no such rig\\n'); sys.exit(3)")
    with pytest.raises(LocalError, match=r"(?s)worker-1 ended with code 3; the end of its log:.*no such rig"):
        LocalNetwork(workers=2, commands={"worker-1": ends})
    started = set(processes.descendants(os.getpid())) - before
    assert processes.wait_until(lambda: not processes.alive(started), 1.0) is not None


@pytest.mark.parametrize("settings", [{"workers": 0}, {"validators": 0}])
def test_a_network_has_at_least_one_of_each(settings):
    with pytest.raises(ConfigError, match="at least 1 of each"):
        LocalNetwork(**settings)


def test_nodes_are_known_by_name(network):
    with pytest.raises(ConfigError, match=r"found no node 'worker-7'.*'worker-2'"):
        network.local.kill("worker-7")
