"""`tensorlink status --job` shows a job's record: its author, or whoever runs one of its nodes."""

from __future__ import annotations

import dataclasses
import time

import pytest

from smartnodes_core.config import UserConfig
from smartnodes_core.errors import ConfigError, IdentityError, JobError
from smartnodes_core.jobs import Job
from smartnodes_core.nodes.job_keeping import JobKeeper
from smartnodes_core.nodes.metrics import MetricsServer
from smartnodes_core.nodes.placement import JobDesk
from smartnodes_core.records import Assignment, AuditTerms, JobRecord, Plan
from tensorlink.cli.job_status import as_author, from_node, rows
from tensorlink.cli.main import main

from ...smartnodes_core.nodes.test_station import Place, eventually, place

__all__ = ["place"]


class Kept:
    """A validator that keeps one job of a user's, over real connections; the user's program has ended."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.validator, self.worker = place.open(1, "validator"), place.open(2, "worker")
        author = place.open(3, "user")
        self.author = author.identity
        author.close()
        role_of, node = self.validator.membership.role_of, self.validator.node
        desk = JobDesk(node, 1, role_of)
        self.keeper = JobKeeper(node, self.validator.identity, 1, desk, role_of, list, self.validator.dht_node)
        self.validator.own_copy = self.keeper.copy_of
        self.validator.join()
        self.validator.announce(dict)
        self.job = self.signed()
        desk._enter(self.job, node.node_key)
        eventually(lambda: self.validator.dht_node()._endpoints())  # it takes part
        self.keeper.look_after(self.job.id)

    def signed(self) -> Job:
        record = JobRecord(
            network_id=1,
            job_type="hash/1",
            author=self.author.node_key,
            nonce=b"n" * 32,
            created_at_s=int(time.time()),
            num_stages=1,
            num_replicas=1,
            specs=[bytes(32)],
            initial_roots=[bytes(32)],
            work_units=[1],
            audit=AuditTerms(unit_rate_ppm=0, step_rate_ppm=0, window_steps=1, window_s=1, auditors=[]),
            terms={},
        )
        worker, validator = self.worker.node, self.validator.node
        plan = Plan(
            job=record.digest(),
            version=0,
            assignments=[Assignment(stage=0, replica=0, worker=worker.node_key, endpoint=worker.endpoint)],
            spares=[],
            validators=[validator.node_key],
            reason="to be \x1b[31mread",
        )
        return Job.open(self.author.sign(record).encode(), self.author.sign(plan).encode())

    def config(self, number: int) -> UserConfig:
        values = dataclasses.asdict(self.place.config(number, bootstrap=[self.validator.node.endpoint]))
        return UserConfig(**values)


@pytest.fixture
def kept(place):
    return Kept(place)


def test_the_author_is_shown_its_job_when_its_program_has_ended(kept):
    job = kept.job.id.hex()
    lines = list(rows(as_author(kept.config(3), job)))
    assert lines[0] == f"job {job}, hash/1"
    assert lines[1].startswith(f"author {kept.author.node_key.hex()}, signed 20")
    assert lines[2] == "open, plan 0"
    assert lines[4].split() == ["0", "0", kept.worker.node.node_key.hex(), kept.worker.node.endpoint]
    assert lines[5] == f"validator {kept.validator.node.node_key.hex()}"
    assert lines[6].endswith("UTC  plan 0: to be \x1b[31mread")
    with pytest.raises(JobError, match="not found"):
        as_author(kept.config(3), "00" * 32)


def test_a_running_node_is_asked_and_what_strangers_wrote_does_not_steer_the_terminal(kept, capsys):
    server = MetricsServer(kept.validator, "0")
    port = str(server.port)
    assert from_node(port, kept.job.id.hex())["state"] == "open"
    assert main(["status", "--node", port, "--job", kept.job.id.hex()]) == 0
    assert "UTC  plan 0: to be ?[31mread\n" in capsys.readouterr().out
    with pytest.raises(JobError, match="not found"):
        from_node(port, "00" * 32)
    server.close()
    assert main(["status", "--node", port, "--job", kept.job.id.hex()]) == 2
    assert "start it with --metrics" in capsys.readouterr().err


def test_who_may_not_be_shown_it_is_told_before_anything_is_sent(kept):
    job, nobody = kept.job.id.hex(), kept.config(7)
    with pytest.raises(ConfigError, match="is not registered in network 1: a job is shown to its author"):
        as_author(nobody, job)
    with pytest.raises(ConfigError, match=r"is a worker in network 1.*with --node"):
        as_author(kept.config(2), job)
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        as_author(nobody, "12")
    running = kept.place.open(3, "user")
    with pytest.raises(IdentityError, match="in use by a node that runs"):
        as_author(kept.config(3), job)
    running.close()
    assert main(["status"]) == 2
