"""Evidence of fraud as an auditor's node makes it, about stages that train in this process."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from blake3 import blake3

from smartnodes_core.audit import HashChain, Opened, Selection, assigned_validators, seed_of, select
from smartnodes_core.evidence import HEAD
from smartnodes_core.identity import Identity
from smartnodes_core.jobs import spec_digest
from smartnodes_core.records import (
    Assignment,
    AuditTerms,
    Challenge,
    Evidence,
    JobRecord,
    Opening,
    OpeningItem,
    Plan,
    ReceivedList,
    Reveal,
    Verdict,
)
from tensorlink.stage_papers import LOSS_PROGRAM, earlier_order
from tensorlink.worker import JOB_TYPE

from .test_examine import SEED

replace = msgspec.structs.replace


@dataclass
class Accusation:
    """A worker runs stage 1 of `training` for an author, and three validators draw the whole of its step `step`.

    What it holds may be changed before `file` is called, and each signature can be made again with `sign`.
    """

    training: object
    step: int = 0
    job_type: str = JOB_TYPE
    author: Identity = field(default_factory=Identity.create)
    worker: Identity = field(default_factory=Identity.create)
    validators: list = field(default_factory=lambda: [Identity.create() for _ in range(3)])

    def __post_init__(self):
        training, stage = self.training, self.training.pipe.stages[1]
        programs = [one.program.to_json() for one in training.pipe.stages]
        terms = AuditTerms(unit_rate_ppm=0, step_rate_ppm=1_000_000, window_steps=2, window_s=60, auditors=[])
        self.job = JobRecord(
            network_id=1, job_type=self.job_type, author=self.author.node_key, nonce=bytes(32), created_at_s=0,
            num_stages=len(programs), num_replicas=1, specs=[spec_digest(program) for program in programs],
            initial_roots=training.initial_roots, work_units=[1] * len(programs), audit=terms,
            terms={"seed": SEED, "state_interval_steps": training.interval},
        )  # fmt: skip
        self.plan = Plan(
            job=self.job.digest(), version=0, spares=[], reason="",
            validators=[one.node_key for one in self.validators],
            assignments=[
                Assignment(stage=index, replica=0, worker=self.worker.node_key, endpoint="127.0.0.1:1")
                for index in range(len(programs))
            ],
        )  # fmt: skip
        self.commitments, self.orders = [], []
        for step in range(self.step + 1):
            order = replace(training.order(stage, step), job=self.job.digest())
            before = self.commitments[-1].digest() if self.commitments else self.job.digest()
            known = training.committed[(1, step)]
            self.orders.append(self.author.sign(order).encode())
            self.commitments.append(
                replace(
                    known, job=self.job.digest(), worker=self.worker.node_key, previous=before, order=order.digest()
                )
            )
        params, body = training.case(1, self.step, 2, -1)
        earlier = {earlier_order(at): self.orders[at] for at in range(len(params["earlier_orders"]))}
        papers = {**earlier, LOSS_PROGRAM: params["loss_program"]}
        self.items = Opening.decode(params["opening"]).items
        self.items += [OpeningItem(label=label, meta=b"", num_bytes=len(data)) for label, data in papers.items()]
        self.body = bytes(body) + b"".join(papers.values())
        self.draw()

    def draw(self):
        """The validators' lists and preimages, and the challenge that follows."""
        digest = self.commitments[-1].digest()
        chains = {one.node_key: HashChain(one.node_key, 3) for one in self.validators}
        lists = {
            one.node_key: ReceivedList(job=self.job.digest(), validator=one.node_key, reveal=1, commitments=[digest])
            for one in self.validators
        }
        reveals = [
            Reveal(
                job=self.job.digest(), validator=key, reveal=1, received_list=lists[key].digest(),
                preimage=chain.reveal(1),
            )
            for key, chain in sorted(chains.items())
        ]  # fmt: skip
        seed = seed_of({one.validator: one.preimage for one in reveals}, digest)
        assigned = assigned_validators(self.job.digest(), self.plan.validators)
        (selection,) = select(seed, self.job.audit, len(self.commitments[-1].units), assigned)
        assert selection == Selection(2, -1, selection.auditor)
        by_key = {one.node_key: one for one in self.validators}
        self.auditor = by_key[selection.auditor]
        self.lists = [by_key[key].sign(lists[key]).encode() for key in sorted(lists)]
        self.reveals = [by_key[one.validator].sign(one).encode() for one in reveals]
        self.challenge = Challenge(
            job=self.job.digest(), commitment=digest, tier=2, unit=-1, seed=seed,
            reveals=[one.digest() for one in reveals], auditor=selection.auditor,
        )  # fmt: skip

    def opened(self):
        """What the worker signs."""
        opening = Opening(
            challenge=self.challenge.digest(), commitment=self.commitments[-1].digest(), items=self.items
        )  # fmt: skip
        return Opened(
            opening=opening.encode(),
            body_digest=blake3(self.body).digest(),
            order_digest=blake3(self.orders[-1]).digest(),
        )

    def evidence(self):
        return Evidence(
            job=self.author.sign(self.job).encode(),
            plan=self.author.sign(self.plan).encode(),
            spec=self.training.pipe.stages[1].program.to_json(),
            commitment=self.worker.sign(self.commitments[-1]).encode(),
            earlier=[self.worker.sign(one).encode() for one in self.commitments[:-1]],
            order=self.orders[-1],
            challenge=self.challenge.encode(),
            lists=self.lists,
            reveals=self.reveals,
            grounds=[],
            opening=self.worker.sign(self.opened()).encode(),
            body_digest=blake3(self.body).digest(),
            body_bytes=len(self.body),
        )

    def verdict(self, evidence=None):
        commitment = self.commitments[-1]
        same = ("job", "plan_version", "replica", "stage", "step", "worker", "work_units")
        return Verdict(
            **{name: getattr(commitment, name) for name in same},
            challenge=self.challenge.digest(), commitment=commitment.digest(), tier=2, unit=-1,
            auditor=self.auditor.node_key, finding="fraudulent", reason="so it was found",
            evidence=(evidence or self.evidence()).digest(), decided_at_s=0,
        )  # fmt: skip


def file_of(evidence, body, signed_verdict=b""):
    """The bytes of an evidence file."""
    record = evidence.encode()
    return HEAD.pack(len(record)) + record + body + signed_verdict
