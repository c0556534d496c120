"""The user of the network: opens a job over all workers, asks for blocks, and believes who was not found cheating."""

from __future__ import annotations

import logging
import threading
import time

from primes import JOB_TYPE, SPEC, STEP, UNIT, UNITS, audited_units, root_of

from smartnodes_core.errors import JobError, SmartnodesError
from smartnodes_core.jobs import Job, StageOfJob, spec_digest
from smartnodes_core.nodes.station import Station
from smartnodes_core.nodes.user import JobListener, UserNode
from smartnodes_core.records import NO_DIGEST, Assignment, AuditTerms, Commitment, JobRecord, Plan, Verdict

logger = logging.getLogger(__name__)

#: How long the last verdicts are waited for: nobody knows beforehand which units are audited, but for all of them.
LAST_VERDICTS_S, ALL_VERDICTS_S = 2.0, 60.0


class Ledger(JobListener):
    """What the user hears: what was committed to, what was audited, and who was found cheating."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.roots: dict[tuple[bytes, int], list[bytes]] = {}
        self.frauds: set[bytes] = set()
        self.audited: set[tuple[bytes, int, int]] = set()

    def on_commitment(self, commitment: Commitment) -> None:
        with self.changed:
            self.roots[commitment.worker, commitment.step] = [unit.roots["primes"] for unit in commitment.units]
            self.changed.notify_all()

    def on_verdict(self, verdict: Verdict) -> None:
        with self.changed:
            self.audited |= {(verdict.worker, verdict.step, unit) for unit in audited_units(verdict.unit)}
            if verdict.finding == "fraudulent":
                self.frauds.add(verdict.worker)
            self.changed.notify_all()

    def wait(self, everything: bool) -> None:
        """Until the verdicts on what was committed to are in: on all units, or as many as come in a moment."""
        with self.changed:
            units = {(worker, block, unit) for worker, block in self.roots for unit in range(UNITS)}
            timeout_s = ALL_VERDICTS_S if everything else LAST_VERDICTS_S
            self.changed.wait_for(lambda: units <= self.audited, timeout_s)


def search(station: Station, below: int, audited_percent: int) -> int:
    """How many primes there are below `below`. Raises JobError where no worker is to be believed."""
    user, ledger = UserNode(station.node, station.identity), Ledger()
    job = open_job(station, user, ledger, audited_percent)
    workers = [item.worker for item in job.plan.assignments]
    found: dict[bytes, dict[int, int]] = {worker: {} for worker in workers}
    left = list(range(-(-below // STEP)))
    while left:
        trusted = [replica for replica, worker in enumerate(workers) if worker not in ledger.frauds]
        if not trusted:
            raise JobError("every worker was found cheating: nothing is known")
        blocks, left = left[: len(trusted)], left[len(trusted) :]
        for replica, block in zip(trusted, blocks, strict=False):
            try:
                found[workers[replica]][block] = ask(user, job, replica, block, below, ledger)
            except SmartnodesError as error:
                logger.warning("block %d: %s", block, error)
                left.append(block)
        if not left:
            ledger.wait(everything=audited_percent == 100)
        for worker in ledger.frauds:  # nothing that it said counts
            left += found[worker]
            found[worker] = {}
    user.close_job(job)
    return sum(sum(blocks.values()) for blocks in found.values())


def open_job(station: Station, user: UserNode, ledger: Ledger, audited_percent: int) -> Job:
    """A job of one stage, which every worker that there is runs a replica of."""
    workers, validators = station.find("worker"), station.find("validator")
    record = JobRecord(
        network_id=station.config.network_id,
        job_type=JOB_TYPE,
        author=station.identity.node_key,
        nonce=user.nonce(),
        created_at_s=int(time.time()),
        num_stages=1,
        num_replicas=len(workers),
        specs=[spec_digest(SPEC)],
        initial_roots=[NO_DIGEST],
        work_units=[1],
        audit=AuditTerms(
            unit_rate_ppm=audited_percent * 10_000, step_rate_ppm=0, window_steps=64, window_s=600, auditors=[]
        ),
        terms={},
    )
    plan = Plan(
        job=record.digest(),
        version=0,
        assignments=[
            Assignment(stage=0, replica=number, worker=worker.node_key, endpoint=worker.endpoints[0])
            for number, worker in enumerate(workers)
        ],
        spares=[],
        validators=[validator.node_key for validator in validators],
        reason="every worker that there is",
    )
    return user.open_job(record, plan, ledger)


def ask(user: UserNode, job: Job, replica: int, block: int, below: int, ledger: Ledger) -> int:
    """The number of primes of one block. Raises JobError where the worker does not commit to what it answers: it is
    audited for what it commits to.
    """
    call = user.begin_call(
        StageOfJob(job, 0, replica), "search", {"block": block}, timeout_s=60, max_body_bytes=STEP * 8
    )
    body = bytes(call.result().body)
    primes = [int.from_bytes(body[at : at + 8], "big") for at in range(0, len(body), 8)]
    units = [[prime for prime in primes if prime // UNIT % UNITS == unit] for unit in range(UNITS)]
    roots = [root_of(b"".join(prime.to_bytes(8, "big") for prime in unit)) for unit in units]
    place = (job.worker_of(0, replica), block)
    with ledger.changed:
        if not ledger.changed.wait_for(lambda: place in ledger.roots, 30) or ledger.roots[place] != roots:
            raise JobError(f"the worker of block {block} did not commit to what it answered")
    return sum(prime < below for prime in primes)
