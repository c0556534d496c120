"""A whole network in this process: validators, workers and a user on the in-memory transport and chain.

The work is bytes: the right result of a unit is a hash that everybody can compute, so an auditor tells right from wrong
at once. Nothing here sleeps; `eventually` looks again and again until a deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from smartnodes_core.audit import Case, HashChain, assigned_validators, seed_of, select
from smartnodes_core.chain.memory import MemoryChain
from smartnodes_core.chain.model import CHAIN_ID, REGISTRY, ChainModel
from smartnodes_core.chain.proposal import UNCAPPED
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of
from smartnodes_core.errors import AuditError
from smartnodes_core.identity import Identity, make_binding
from smartnodes_core.jobs import Job, OpenedUnit, StageOfJob, spec_digest
from smartnodes_core.journal import Journal
from smartnodes_core.nodes.authority import ChainAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.user import JobListener, UserNode
from smartnodes_core.nodes.validator import ValidatorNode, ValidatorSettings
from smartnodes_core.nodes.worker import WorkerNode
from smartnodes_core.records import (
    NO_DIGEST,
    Assignment,
    AuditTerms,
    Challenge,
    Commitment,
    JobRecord,
    Opening,
    OpeningItem,
    Plan,
    ReceivedList,
    Reveal,
    Unit,
)
from smartnodes_core.transport.memory import MemoryHub, MemoryTransport

NETWORK = 1
SPEC = b"hash the step and the unit"
FAST = ValidatorSettings(
    list_interval_s=0.01, reveal_timeout_s=60.0, challenge_timeout_s=60.0, poll_s=0.05, proposer_timeout_s=2.0
)


def eventually(condition: Callable[[], Any], timeout_s: float = 40.0) -> Any:
    """The first true value of `condition`; fails after `timeout_s`."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        pause.wait(0.01)
    return value


def result_of(job: bytes, stage: int, step: int, unit: int) -> bytes:
    """The right result of a unit."""
    return blake3(job + bytes([stage, step % 256, step // 256, unit])).digest() * 4


def content_of(stage: StageOfJob, step: int, num_units: int, wrong: bool = False) -> dict[str, Any]:
    """What a worker commits to for a step of `num_units` units."""
    job, index = stage.job.id, stage.stage

    def link(border: int, unit: int) -> bytes:
        return blake3(job + bytes([border, step % 256, step // 256, unit]) + b"link").digest()

    units = [
        {
            "call": 0,
            "backward_pass": 0,
            "micro_batch": unit,
            "roots": {
                "x": link(index, unit),
                "y": link(index + 1, unit),
                "out": blake3(opened_of(stage, step, unit, wrong)).digest(),
            },
        }
        for unit in range(num_units)
    ]
    return {
        "step": step,
        "numeric_class": "bytes",
        "roots": {},
        "units": units,
        "shared_roots": {},
        "order": NO_DIGEST,
        "squared_norm": (1.0).hex(),
        "clip_coefficient": (1.0).hex(),
        "work_units": stage.job.record.work_units[index] * num_units,
    }


def opened_of(stage: StageOfJob, step: int, unit: int, wrong: bool) -> bytes:
    right = result_of(stage.job.id, stage.stage, step, unit)
    return bytes(len(right)) if wrong else right


class HashHandler:
    """A `JobHandler`; `wrong` steps are computed badly, `other` data is opened for right ones."""

    job_type = "hash/1"

    def __init__(self) -> None:
        self.stages: dict[str, StageOfJob] = {}
        self.released: list[str] = []
        self.frames: list[bytes] = []
        self.wrong: set[int] = set()
        self.opens_other = self.refuses = False
        self.num_openings = self.num_earlier = 0
        self.refuse_stage: int | None = None
        self.port: Any = None

    def attach(self, port: Any) -> None:
        self.port = port

    def offers(self) -> dict[str, int | str]:
        return {}

    def assign(self, stage: StageOfJob) -> None:
        if stage.stage == self.refuse_stage:
            raise AuditError("not that stage")
        self.stages[stage.key] = stage

    def release(self, stage: StageOfJob, reason: str) -> None:
        self.stages.pop(stage.key, None)
        self.released.append(stage.key)

    def call(self, stage: StageOfJob, method: str, params: dict[str, Any], body: memoryview) -> tuple[dict, list]:
        if method == "work":
            self.work(stage, params["step"], params.get("num_units", 2))
        return {"method": method}, []

    def work(self, stage: StageOfJob, step: int, num_units: int = 2) -> None:
        self.port.commit(stage, content_of(stage, step, num_units, step in self.wrong))

    def allocate(self, stage: StageOfJob, sender: bytes, header: dict[str, Any], num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def receive(self, stage: StageOfJob, sender: bytes, header: dict[str, Any], body: memoryview) -> None:
        self.frames.append(bytes(body))

    def spec(self, stage: StageOfJob) -> bytes:
        return SPEC

    def open(self, stage: StageOfJob, commitment: Commitment, tier: int, unit: int) -> OpenedUnit:
        if self.refuses:
            raise AuditError("no longer held")
        self.num_openings += 1
        wrong = commitment.step in self.wrong or self.opens_other
        units = range(len(commitment.units)) if tier == 2 else [unit]
        pieces = [opened_of(stage, commitment.step, each, wrong) for each in units]
        items = [OpeningItem(label="out", meta=b"", num_bytes=len(piece)) for piece in pieces]
        return OpenedUnit(items, b"".join(pieces), b"the order", self.num_earlier)


class HashAuditor:
    """An `Auditor` that hashes."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def examine(self, case: Case, body: memoryview) -> tuple[Any, str]:
        self.cases.append(case)
        opening, commitment = Opening.decode(case.opening), case.commitment
        units = range(len(commitment.units)) if case.challenge.tier == 2 else [case.challenge.unit]
        at = 0
        for unit, item in zip(units, opening.items, strict=True):
            piece = bytes(body[at : at + item.num_bytes])
            at += item.num_bytes
            if blake3(piece).digest() != commitment.units[unit].roots["out"]:
                return "fraudulent", "opened other data"
            if piece != result_of(commitment.job, commitment.stage, commitment.step, unit):
                return "fraudulent", "the result is wrong"
        return "honest", "equal"


class Heard(JobListener):
    """Keeps what a user hears."""

    def __init__(self) -> None:
        self.events: list[tuple[int, str, dict]] = []
        self.commitments: list[Commitment] = []
        self.verdicts: list[Any] = []
        self.lost: list[int] = []

    def on_event(self, stage: int, event: str, params: dict[str, Any]) -> None:
        self.events.append((stage, event, params))

    def on_commitment(self, commitment: Commitment) -> None:
        self.commitments.append(commitment)

    def on_verdict(self, verdict: Any) -> None:
        self.verdicts.append(verdict)

    def on_lost(self, stage: int, error: Exception) -> None:
        self.lost.append(stage)


class Citizen:
    """One member: its keys, its place on chain, its node, and the role it plays."""

    def __init__(self, net: Net, number: int, role: Any, register: bool = True) -> None:
        self.identity = Identity.from_seed(bytes([number] * 32))
        self.account_key = bytes([number + 100] * 32)
        self.account, self.key = address_of(self.account_key), self.identity.node_key
        self.chain = MemoryChain(net.model, self.account_key)
        self.membership = Membership(self.chain, NETWORK, max_age_s=0.2)
        self.hash_chain = HashChain(bytes([number] * 32), length=512) if role == "validator" else None
        if register:
            self.membership.join(role, self.key, self.hash_chain.tip if self.hash_chain else None)
        binding = make_binding(
            self.identity, self.account_key, role, CHAIN_ID, REGISTRY, NETWORK, int(time.time()) + 3600
        )
        authority = ChainAuthority(
            lambda: self.membership.members(0.0),
            poll_interval_s=0.1,
            min_refresh_interval_s=0.0,
            stake_wei=self.chain.stake_wei,
        )
        endpoint = None if role == "user" else f"10.0.0.{number}:9000"
        self.node = Node(self.identity, binding, MemoryTransport(net.hub, self.identity, binding), authority, endpoint)
        self.node.start()
        self.role: Any = None
        self.handler: Any = None
        self.auditor: Any = None
        self.dht: Any = None
        self.journal = Journal(None)
        self.folder: Path | None = None  # where a validator keeps evidence and proofs

    def sign(self, record: Any) -> bytes:
        return self.identity.sign(record).encode()

    def stop(self) -> None:
        if isinstance(self.role, ValidatorNode):
            self.role.stop()
        self.node.stop()


class Net:
    """`num_validators` of the validators run; the others are only nodes, for tests to play them."""

    def __init__(self, num_validators: int = 4, num_workers: int = 3, settings: ValidatorSettings = FAST) -> None:
        self.hub = MemoryHub()
        accounts = [address_of(bytes([number + 100] * 32)) for number in range(1, 31)]
        self.model = ChainModel(
            ChainSettings(
                round_interval_s=1,
                claim_delay_s=0,
                kappa_bps=UNCAPPED,
                worker_stake_wei=10 * SNO,
                networks={NETWORK: 10_000},
                genesis={account: 2_000_000 * SNO for account in accounts},
            )
        )
        self.settings = settings
        self.everybody: list[Citizen] = []
        self.validators = [self.citizen(number, "validator") for number in range(1, 1 + num_validators)]
        self.workers = [self.citizen(number, "worker") for number in range(11, 11 + num_workers)]
        self.user = self.citizen(21, "user")
        for worker in self.workers:
            self.make_worker(worker)
        self.user.role = UserNode(self.user.node, self.user.identity)
        self.heard = Heard()
        self._num_jobs = 0
        self._renamed: list[Node] = []
        self.meet()

    def citizen(self, number: int, role: Any, register: bool = True) -> Citizen:
        made = Citizen(self, number, role, register)
        self.everybody.append(made)
        return made

    def renamed(self, citizen: Citizen, identity: Identity) -> Node:
        """A node of a citizen's account under another identity, which knows the validators."""
        binding = make_binding(
            identity, citizen.account_key, "worker", CHAIN_ID, REGISTRY, NETWORK, int(time.time()) + 3600
        )
        authority = ChainAuthority(lambda: citizen.membership.members(0.0), min_refresh_interval_s=0.0)
        node = Node(identity, binding, MemoryTransport(self.hub, identity, binding), authority, None)
        for validator in self.validators:
            node.add_address(validator.key, validator.node.endpoint)
        self._renamed.append(node)
        return node

    def meet(self) -> None:
        """Everybody knows where everybody is."""
        for citizen in self.everybody:
            citizen.membership.members(0.0)
            for other in self.everybody:
                if other is not citizen and other.node._listener is not None:
                    citizen.node.add_address(other.key, other.node.endpoint)
                    if not other.node._stopped:
                        citizen.membership.of(other.key)

    def make_worker(self, worker: Citizen, num_slots: int = 1) -> None:
        worker.handler = HashHandler()
        worker.role = WorkerNode(
            worker.node, worker.identity, worker.handler, worker.membership.tip_of, worker.journal, num_slots
        )
        worker.node.on_peer_lost(lambda peer, reason: worker.role.release_jobs_of(peer, reason))

    def make_validator(self, validator: Citizen, settings: ValidatorSettings | None = None) -> None:
        validator.auditor = HashAuditor()
        validator.role = ValidatorNode(
            validator.node,
            validator.identity,
            validator.account_key,
            validator.membership,
            validator.auditor,
            validator.hash_chain,
            validator.journal,
            settings or self.settings,
            dht=lambda: validator.dht,
            folder=validator.folder,
        )

    def start(self, rounds: bool = False, only: Sequence[Citizen] | None = None) -> None:
        """Begin to audit, and to hold rounds."""
        for validator in only if only is not None else self.validators:
            if validator.role is None:
                self.make_validator(validator)
            validator.role.audits.start()
            validator.role.evidence.start()
            if rounds:
                validator.role.rounds.start()

    def record(self, num_stages: int = 2, **changes: Any) -> JobRecord:
        self._num_jobs += 1
        terms = {"unit_rate_ppm": 1_000_000, "step_rate_ppm": 0, "window_steps": 2, "window_s": 60, "auditors": []}
        fields = {
            "network_id": NETWORK,
            "job_type": "hash/1",
            "author": self.user.key,
            "nonce": bytes([self._num_jobs] * 32),
            "created_at_s": int(time.time()),
            "num_stages": num_stages,
            "num_replicas": 1,
            "specs": [spec_digest(SPEC)] * num_stages,
            "initial_roots": [NO_DIGEST] * num_stages,
            "work_units": [10] * num_stages,
            "audit": AuditTerms(**{**terms, **changes.pop("audit", {})}),
            "terms": {},
        }
        return JobRecord(**{**fields, **changes})

    def plan(self, record: JobRecord, workers: Sequence[Citizen] | None = None, **changes: Any) -> Plan:
        workers = workers or self.workers
        fields = {
            "job": record.digest(),
            "version": 0,
            "assignments": [
                Assignment(stage=stage, replica=0, worker=workers[stage].key, endpoint=workers[stage].node.endpoint)
                for stage in range(record.num_stages)
            ],
            "spares": [],
            "validators": [validator.key for validator in self.validators],
            "reason": "first",
        }
        return Plan(**{**fields, **changes})

    def job(self, record: JobRecord, plan: Plan) -> Job:
        return Job.open(self.user.sign(record), self.user.sign(plan))

    def open(self, record: JobRecord | None = None, plan: Plan | None = None, **changes: Any) -> Job:
        record = record or self.record(**changes)
        return self.user.role.open_job(record, plan or self.plan(record), self.heard, timeout_s=40)

    def work(self, job: Job, steps: range, num_units: int = 2) -> None:
        """Every stage works and commits to these steps."""
        for step in steps:
            for stage in range(job.record.num_stages):
                params = {"step": step, "num_units": num_units}
                self.user.role.begin_call(StageOfJob(job, stage, 0), "work", params, timeout_s=40).result()

    def audited(self, validator: Citizen, job: Job) -> Any:
        return validator.role.audits.jobs.get(job.id)

    def num_verdicts(self, job: Job) -> list[int]:
        return [len(self.audited(validator, job).verdicts) for validator in self.validators]

    def everyone_has(self, num_verdicts: int, job: Job) -> bool:
        return self.num_verdicts(job) == [num_verdicts] * len(self.validators)

    def signed_commitment(
        self, of_job: Job, stage: int, step: int, signer: Citizen | None = None, **changes: Any
    ) -> bytes:
        """A commitment as the worker of a stage would sign it, with `changes`."""
        worker = next(each for each in self.workers if each.key == of_job.worker_of(stage))
        num_units = changes.pop("num_units", 2)
        wrong = changes.pop("wrong", False)
        content = content_of(StageOfJob(of_job, stage, 0), step, num_units, wrong)
        content["units"] = [Unit(**unit) for unit in content["units"]]
        fields = {
            "job": of_job.id,
            "plan_version": of_job.plan.version,
            "replica": 0,
            "stage": stage,
            "worker": (signer or worker).key,
            "previous": of_job.id,
            **content,
            **changes,
        }
        return (signer or worker).sign(Commitment(**fields))

    def draw(self, job: Job, commitment: Commitment, reveal: int = 1) -> Drawn:
        """A draw played by the test: every assigned validator lists the commitment and reveals."""
        return Drawn(self, job, commitment, reveal)

    def stop(self) -> None:
        for node in self._renamed:
            node.stop()
        for citizen in self.everybody:
            citizen.stop()


class Drawn:
    """Signed lists, reveals and challenges for one commitment."""

    def __init__(self, net: Net, job: Job, commitment: Commitment, reveal: int) -> None:
        self.job, self.commitment, digest = job, commitment, commitment.digest()
        assigned = assigned_validators(job.id, job.plan.validators)
        self.assigned = [validator for validator in net.validators if validator.key in assigned]
        self.assigned.sort(key=lambda validator: validator.key)
        self.lists, self.reveals = [], []
        for validator in self.assigned:
            listed = ReceivedList(job=job.id, validator=validator.key, reveal=reveal, commitments=[digest])
            preimage = validator.hash_chain.reveal(reveal)
            self.lists.append(listed)
            self.reveals.append(
                Reveal(
                    job=job.id,
                    validator=validator.key,
                    reveal=reveal,
                    received_list=listed.digest(),
                    preimage=preimage,
                )
            )
        preimages = {each.validator: each.preimage for each in self.reveals}
        self.seed = seed_of(preimages, digest)
        self.selections = select(self.seed, job.record.audit, len(commitment.units), assigned)
        self.auditor = next(v for v in net.validators if self.selections and v.key == self.selections[0].auditor)

    def challenge(self, **changes: Any) -> Challenge:
        first = self.selections[0]
        fields = {
            "job": self.job.id,
            "commitment": self.commitment.digest(),
            "tier": first.tier,
            "unit": first.unit,
            "seed": self.seed,
            "reveals": [reveal.digest() for reveal in self.reveals],
            "auditor": self.auditor.key,
        }
        return Challenge(**{**fields, **changes})

    def params(self, asked: Challenge | None = None, signer: Citizen | None = None, **changes: Any) -> dict:
        params = {
            "key": f"{self.job.id.hex()}/0/{self.commitment.stage}",
            "challenge": (signer or self.auditor).sign(asked or self.challenge()),
            "lists": [v.sign(item) for v, item in zip(self.assigned, self.lists, strict=True)],
            "reveals": [v.sign(item) for v, item in zip(self.assigned, self.reveals, strict=True)],
        }
        return {**params, **changes}


@pytest.fixture
def net() -> Iterator[Net]:
    """Four validators that audit, three workers, one user; rounds are not held."""
    made = Net()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def bare() -> Iterator[Net]:
    """The same with validators that only are there: `start` or play them."""
    made = Net()
    yield made
    made.stop()


@pytest.fixture
def make_net() -> Iterator[Callable[..., Net]]:
    """Networks of any size."""
    made: list[Net] = []

    def make(*args: Any, **options: Any) -> Net:
        made.append(Net(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., Any]:
    return eventually
