"""A validator's auditing: collect commitments, fix lists, reveal preimages, challenge what the seeds select, give
verdicts.

The rules are pure and live in `smartnodes_core/audit.py`; this module moves the messages. One thread fixes and
reveals lists, one re-executes; neither ever waits for the other or for the chain.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from smartnodes_core.audit import (
    Auditor,
    Case,
    HashChain,
    Selection,
    TipTracker,
    assigned_validators,
    link_disagreements,
    seed_of,
    select,
)
from smartnodes_core.errors import AuthorityError, PeerFault, RecordError, SmartnodesError
from smartnodes_core.identity import Identity, verify
from smartnodes_core.jobs import Job, spec_digest
from smartnodes_core.journal import Journal
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.evidence import EvidenceDesk
from smartnodes_core.records import (
    MAX_RECORD_BYTES,
    NO_DIGEST,
    Challenge,
    Commitment,
    Finding,
    NodeKey,
    Opening,
    ReceivedList,
    Reveal,
    Signed,
    Verdict,
)
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

#: Commitments in one list: three lists and their preimages fit the header of a challenge.
MAX_LIST = 256
MAX_SPEC_BYTES = 64 << 20
MAX_OPENING_BYTES = 8 << 30


@dataclass
class AuditedJob:
    """What a validator holds of one job's audits. Guarded by the desk's lock."""

    job: Job
    assigned: list[NodeKey]
    commitments: dict[bytes, Commitment] = field(default_factory=dict)
    signed: dict[bytes, bytes] = field(default_factory=dict)
    by_place: dict[tuple[int, int, int, int], bytes] = field(default_factory=dict)
    unlisted: list[bytes] = field(default_factory=list)
    lists: dict[tuple[NodeKey, int], tuple[ReceivedList, bytes]] = field(default_factory=dict)
    listed_by: dict[bytes, dict[NodeKey, int]] = field(default_factory=dict)
    reveals: dict[tuple[NodeKey, int], tuple[Reveal, bytes]] = field(default_factory=dict)
    pending: list[tuple[int, float]] = field(
        default_factory=list
    )  # own lists not yet revealed, and when they were fixed
    drawn: dict[bytes, list[Selection]] = field(default_factory=dict)
    specs: dict[int, bytes] = field(default_factory=dict)
    verdicts: dict[bytes, tuple[Verdict, bytes]] = field(default_factory=dict)
    confirmed: set[bytes] = field(default_factory=set)  # fraudulent verdicts that this validator re-ran itself
    link_faults: list[str] = field(default_factory=list)
    latest_step: dict[tuple[int, int], int] = field(default_factory=dict)
    num_open: int = 0  # cases that wait for this validator's verdict
    closed: bool = False

    @property
    def is_drawn(self) -> bool:
        """Whether every commitment has been drawn for."""
        return len(self.drawn) == len(self.commitments)

    def of_stage(self, stage: int, replica: int) -> str:
        return f"{self.job.id.hex()}/{replica}/{stage}"


class AuditDesk:
    """The auditing of one validator over all its jobs.

    `tip` gives a validator's hash-chain tip on chain; `list_interval_s` is how long commitments are gathered before a
    list is fixed, `reveal_timeout_s` after how long a list is revealed although another validator has not listed the
    same.
    """

    def __init__(
        self,
        node: Node,
        identity: Identity,
        auditor: Auditor,
        evidence: EvidenceDesk,
        chain: HashChain,
        tip: Callable[[NodeKey], bytes | None],
        journal: Journal,
        list_interval_s: float = 0.25,
        reveal_timeout_s: float = 30.0,
        challenge_timeout_s: float = 60.0,
    ):
        self.jobs: dict[bytes, AuditedJob] = {}
        self.lock = threading.RLock()
        evidence.on_confirmed = self.confirm
        self._node = node
        self._identity = identity
        self._auditor = auditor
        self._evidence = evidence
        self._chain = chain
        self._tip = tip
        self._trackers: dict[tuple[NodeKey, bytes], TipTracker] = {}
        self._journal = journal
        self._list_interval_s = list_interval_s
        self._reveal_timeout_s = reveal_timeout_s
        self._challenge_timeout_s = challenge_timeout_s
        self._next_reveal = 1 + journal.count(f"list/{chain.tip.hex()}/")
        self._drained = threading.Condition(self.lock)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._cases: queue.Queue[tuple[AuditedJob, bytes, Selection] | None] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._fix_lists, name="audit-lists", daemon=True),
            threading.Thread(target=self._examine_cases, name="audit-cases", daemon=True),
        ]
        node.serve(self)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends both threads; a case under way is given up."""
        self._stopping.set()
        self._wake.set()
        self._cases.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=2)

    def open(self, job: Job) -> None:
        """Begin to audit a job (or go on under a newer plan)."""
        with self.lock:
            if job.id not in self.jobs:
                self.jobs[job.id] = AuditedJob(job, assigned_validators(job.id, job.plan.validators))
            elif job.plan.version > self.jobs[job.id].job.plan.version:
                self.jobs[job.id].job = job

    def close(self, job_id: bytes, timeout_s: float) -> None:
        """The job ended: returns when everything of it is drawn and examined here, or after `timeout_s`."""
        with self._drained:
            audited = self.jobs.get(job_id)
            if audited is not None:
                self._drained.wait_for(lambda: audited.num_open == 0 and audited.is_drawn, timeout_s)
                audited.closed = True

    # -- commitments --------------------------------------------------------------------------------------------------

    @allow(roles=("worker", "validator"), max_body_bytes=MAX_RECORD_BYTES)
    def rpc_commitment(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """A worker's commitment, from itself or passed on by a validator."""
        self.take_commitment(bytes(body))

    def take_commitment(self, data: bytes) -> None:
        """Store a signed commitment. Raises AuthorityError for a stage the signer does not run, RecordError for a
        second one.
        """
        signed = Signed.decode(data)
        commitment = verify(signed, Commitment)
        digest = commitment.digest()
        with self.lock:
            audited = self._job(commitment.job)
            job = audited.job
            if (
                signed.signer != commitment.worker
                or job.worker_of(commitment.stage, commitment.replica) != signed.signer
            ):
                raise AuthorityError(f"stage {commitment.stage} is not run by the signer of this commitment")
            num_units = sum(unit.backward_pass >= 0 for unit in commitment.units)
            if commitment.work_units != job.record.work_units[commitment.stage] * num_units:
                raise RecordError("the work claimed is not the units times what the job says each is worth")
            place = (commitment.plan_version, commitment.replica, commitment.stage, commitment.step)
            before = audited.by_place.setdefault(place, digest)
            if before != digest:
                raise RecordError(
                    f"two commitments for step {commitment.step} of stage {commitment.stage}: equivocation"
                )
            if digest in audited.commitments:
                return
            audited.commitments[digest], audited.signed[digest] = commitment, data
            steps = audited.latest_step
            key = (commitment.stage, commitment.replica)
            steps[key] = max(steps.get(key, 0), commitment.step)
            audited.unlisted.append(digest)
            self._compare_links(audited, commitment)
        self._wake.set()

    def _compare_links(self, audited: AuditedJob, commitment: Commitment) -> None:
        """T0: both ends of a link say the same."""
        for lower in (commitment.stage - 1, commitment.stage):
            ends = [
                audited.commitments.get(
                    audited.by_place.get(
                        (commitment.plan_version, commitment.replica, stage, commitment.step), NO_DIGEST
                    )
                )
                for stage in (lower, lower + 1)
            ]
            if ends[0] is not None and ends[1] is not None:
                faults = link_disagreements(ends[0], ends[1])
                audited.link_faults.extend(f"step {commitment.step}: {fault}" for fault in faults)
                if faults:
                    logger.warning("step %s: %s", commitment.step, faults[0])

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_fetch_commitment(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """A commitment by its digest, for a validator that the worker's message did not reach."""
        with self.lock:
            found = self._job(bytes(params["job"])).signed.get(bytes(params["digest"]))
        return {}, [found or b""]

    def fetch(self, audited: AuditedJob, holder: NodeKey, digests: Iterable[bytes]) -> None:
        """Get commitments that another validator holds."""
        for digest in digests:
            try:
                params = {"job": audited.job.id, "digest": digest}
                reply = self._node.call(holder, "fetch_commitment", params, timeout_s=10)
                if reply.body:
                    self.take_commitment(bytes(reply.body))
            except SmartnodesError as error:
                logger.warning("a commitment that a validator listed could not be fetched: %s", error)

    # -- lists and reveals --------------------------------------------------------------------------------------------

    def _fix_lists(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            self._wake.clear()
            self._stopping.wait(self._list_interval_s)  # gathers what arrives together into one list
            with self.lock:
                jobs = list(self.jobs.values())
            for audited in jobs:
                if self._node.node_key in audited.assigned:
                    self._fix_list(audited)
            self._reveal_ready()

    def _fix_list(self, audited: AuditedJob) -> None:
        with self.lock:
            digests = audited.unlisted[:MAX_LIST]
            if not digests:
                return
            del audited.unlisted[: len(digests)]
            index = self._next_reveal
            self._next_reveal += 1
            received = ReceivedList(
                job=audited.job.id, validator=self._node.node_key, reveal=index, commitments=sorted(digests)
            )
            self._journal.once(f"list/{self._chain.tip.hex()}/{index}", received.digest())
            data = self._identity.sign(received).encode()
            self._store_list(audited, received, data)
            audited.pending.append((index, time.monotonic()))
        self._tell(audited, "received_list", {"list": data})

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_received_list(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """Another assigned validator fixed the list behind its next preimage."""
        signed = Signed.decode(params["list"])
        received = verify(signed, ReceivedList)
        with self.lock:
            audited = self._job(received.job)
            if signed.signer != received.validator or signed.signer not in audited.assigned:
                raise AuthorityError("a list is signed by an assigned validator")
            self._store_list(audited, received, params["list"])
            unknown = [digest for digest in received.commitments if digest not in audited.commitments]
        if unknown:
            self.fetch(audited, received.validator, unknown)
        self._wake.set()

    def _store_list(self, audited: AuditedJob, received: ReceivedList, data: bytes) -> None:
        place = (received.validator, received.reveal)
        if audited.lists.setdefault(place, (received, data))[0] != received:
            raise RecordError(f"two lists for preimage {received.reveal} of one validator: equivocation")
        for digest in received.commitments:
            listed = audited.listed_by.setdefault(digest, {})
            listed[received.validator] = min(received.reveal, listed.get(received.validator, received.reveal))

    def _reveal_ready(self) -> None:
        """Reveal own lists in order, each once every other assigned validator has listed all its commitments."""
        with self.lock:
            waiting = sorted((index, at, job.job.id) for job in self.jobs.values() for index, at in job.pending)
        for index, fixed_at, job_id in waiting:
            audited = self.jobs[job_id]
            with self.lock:
                received = audited.lists[(self._node.node_key, index)][0]
                complete = all(
                    len(audited.listed_by[digest]) == len(audited.assigned) for digest in received.commitments
                )
                if not complete and time.monotonic() - fixed_at < self._reveal_timeout_s:
                    return  # later preimages would give this one away
                audited.pending.remove((index, fixed_at))
                reveal = Reveal(
                    job=job_id,
                    validator=self._node.node_key,
                    reveal=index,
                    received_list=received.digest(),
                    preimage=self._chain.reveal(index),
                )
                data = self._identity.sign(reveal).encode()
                audited.reveals[(self._node.node_key, index)] = (reveal, data)
            self._tell(audited, "reveal", {"reveal": data})
            self._draw(audited, received.commitments)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_reveal(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """Another assigned validator spends a preimage on a list it fixed before."""
        signed = Signed.decode(params["reveal"])
        reveal = verify(signed, Reveal)
        with self.lock:
            audited = self._job(reveal.job)
            fixed = audited.lists.get((reveal.validator, reveal.reveal))
            if signed.signer != reveal.validator or fixed is None or fixed[0].digest() != reveal.received_list:
                raise RecordError("a preimage was revealed for a list that was not fixed before")
            if not self._tracker(reveal.validator).check(reveal.reveal, reveal.preimage):
                raise RecordError("a preimage does not lead to the tip its validator posted on chain")
            audited.reveals[(reveal.validator, reveal.reveal)] = (reveal, params["reveal"])
        self._draw(audited, fixed[0].commitments)

    def _tracker(self, validator: NodeKey) -> TipTracker:
        tip = self._tip(validator)
        if tip is None:
            raise AuthorityError("this validator has posted no hash-chain tip on chain")
        return self._trackers.setdefault((validator, tip), TipTracker(tip))

    # -- draw, challenge, verdict -------------------------------------------------------------------------------------

    def _draw(self, audited: AuditedJob, digests: list[bytes]) -> None:
        """Draw for every commitment whose preimages are all out; queue the cases that fall to this validator."""
        with self.lock:
            for digest in digests:
                commitment = audited.commitments.get(digest)
                if digest in audited.drawn or commitment is None:
                    continue
                reveals = self._reveals_for(audited, digest)
                if len(reveals) < len(audited.assigned):
                    continue
                seed = seed_of({key: reveal.preimage for key, (reveal, _) in reveals.items()}, digest)
                chosen = select(seed, audited.job.record.audit, len(commitment.units), audited.assigned)
                audited.drawn[digest] = chosen
                for selection in chosen:
                    if selection.auditor == self._node.node_key:
                        audited.num_open += 1
                        self._cases.put((audited, digest, selection))
            self._drained.notify_all()

    def _reveals_for(self, audited: AuditedJob, digest: bytes) -> dict[NodeKey, tuple[Reveal, bytes]]:
        """By validator, the preimage it spent on its first list that holds `digest`."""
        listed = audited.listed_by.get(digest, {})
        found = {key: audited.reveals.get((key, index)) for key, index in listed.items()}
        return {key: reveal for key, reveal in found.items() if reveal is not None}

    def _examine_cases(self) -> None:
        while (case := self._cases.get()) is not None and not self._stopping.is_set():
            try:
                self._examine(*case)
            except Exception:
                logger.exception("an audit was given up")
            with self._drained:
                case[0].num_open -= 1
                self._drained.notify_all()

    def _examine(self, audited: AuditedJob, digest: bytes, selection: Selection) -> None:
        with self.lock:
            commitment = audited.commitments[digest]
            reveals = self._reveals_for(audited, digest)
            lists = [audited.lists[(key, reveal.reveal)][1] for key, (reveal, _) in reveals.items()]
        challenge = Challenge(
            job=audited.job.id,
            commitment=digest,
            tier=selection.tier,  # type: ignore[arg-type]
            unit=selection.unit,
            seed=seed_of({key: reveal.preimage for key, (reveal, _) in reveals.items()}, digest),
            reveals=[reveals[key][0].digest() for key in sorted(reveals)],
            auditor=self._node.node_key,
            deadline_s=int(time.time() + self._challenge_timeout_s),
        )
        signed_reveals = [reveals[key][1] for key in sorted(reveals)]
        try:
            case, body = self._open(audited, commitment, challenge, lists, signed_reveals)
        except PeerFault as fault:
            self._give_verdict(audited, commitment, challenge, "inconclusive", f"not opened: {fault}")
            return
        except SmartnodesError as error:
            self._give_verdict(audited, commitment, challenge, "inconclusive", f"no opening came: {error}")
            return
        finding, reason = self._auditor.examine(case, body)
        evidence = NO_DIGEST
        if finding == "fraudulent":
            evidence = self._evidence.keep(case, audited.signed[digest], body)
        self._give_verdict(audited, commitment, challenge, finding, reason, evidence)

    def _open(
        self,
        audited: AuditedJob,
        commitment: Commitment,
        challenge: Challenge,
        lists: list[bytes],
        reveals: list[bytes],
    ) -> tuple[Case, memoryview]:
        """Have the worker open the unit. Raises PeerFault where it refuses or answers wrongly, Unavailable where it
        does not.
        """
        key = audited.of_stage(commitment.stage, commitment.replica)
        params = {"key": key, "challenge": self._identity.sign(challenge).encode(), "lists": lists, "reveals": reveals}
        spec = self._spec(audited, commitment, key)
        reply = self._node.call(
            commitment.worker,
            "challenge",
            params,
            timeout_s=self._challenge_timeout_s,
            max_body_bytes=MAX_OPENING_BYTES,
        )
        at = int(reply.params["opening_bytes"])
        order_end = at + int(reply.params["order_bytes"])
        signed = Signed.decode(bytes(reply.body[:at]))
        opening = verify(signed, Opening)
        if signed.signer != commitment.worker or opening.challenge != challenge.digest():
            raise RecordError("the opening is not the worker's, or answers another challenge")
        order = bytes(reply.body[at:order_end])
        return Case(audited.job.record, spec, commitment, challenge, order, opening.encode()), reply.body[order_end:]

    def _spec(self, audited: AuditedJob, commitment: Commitment, key: str) -> bytes:
        """What the stage runs, fetched once from its worker and checked against the job record."""
        spec = audited.specs.get(commitment.stage)
        if spec is None:
            reply = self._node.call(
                commitment.worker, "spec", {"key": key}, timeout_s=30, max_body_bytes=MAX_SPEC_BYTES
            )
            spec = bytes(reply.body)
            if spec_digest(spec) != audited.job.record.specs[commitment.stage]:
                raise RecordError("the worker gave another spec than the job record names")
            audited.specs[commitment.stage] = spec
        return spec

    def _give_verdict(
        self,
        audited: AuditedJob,
        commitment: Commitment,
        challenge: Challenge,
        finding: Finding,
        reason: str,
        evidence: bytes = NO_DIGEST,
    ) -> None:
        verdict = Verdict(
            job=audited.job.id,
            plan_version=commitment.plan_version,
            replica=commitment.replica,
            stage=commitment.stage,
            step=commitment.step,
            challenge=challenge.digest(),
            commitment=challenge.commitment,
            tier=challenge.tier,
            unit=challenge.unit,
            worker=commitment.worker,
            auditor=self._node.node_key,
            finding=finding,
            reason=reason[:4000],
            evidence=evidence,
            work_units=commitment.work_units,
            decided_at_s=int(time.time()),
        )
        data = self._identity.sign(verdict).encode()
        self._store_verdict(audited, verdict, data)
        self._tell(audited, "verdict", {"verdict": data}, also=(commitment.worker, audited.job.record.author))

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_verdict(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """What another auditor found."""
        signed = Signed.decode(params["verdict"])
        verdict = verify(signed, Verdict)
        with self.lock:
            audited = self._job(verdict.job)
            if signed.signer != verdict.auditor or verdict.auditor not in audited.assigned:
                raise AuthorityError("a verdict is signed by an assigned validator")
        self._store_verdict(audited, verdict, params["verdict"])

    def _store_verdict(self, audited: AuditedJob, verdict: Verdict, data: bytes) -> None:
        with self.lock:
            if verdict.digest() in audited.verdicts:
                return
            audited.verdicts[verdict.digest()] = (verdict, data)
            own = verdict.auditor == self._node.node_key
            if own:
                audited.confirmed.add(verdict.digest())
        if verdict.finding == "fraudulent" and not own:
            self._evidence.confirm(verdict)

    def confirm(self, verdict: Verdict) -> None:
        """This validator has re-run a fraud verdict and found the same: rounds may carry it."""
        with self.lock:
            self._job(verdict.job).confirmed.add(verdict.digest())

    # -- small parts --------------------------------------------------------------------------------------------------

    def _job(self, job_id: bytes) -> AuditedJob:
        audited = self.jobs.get(job_id)
        if audited is None:
            raise RecordError("a job this validator does not know")
        return audited

    def _tell(self, audited: AuditedJob, method: str, params: dict[str, Any], also: tuple[NodeKey, ...] = ()) -> None:
        """One-way to all other validators of the job (all keep its history), and to `also`."""
        for peer in (*audited.job.plan.validators, *also):
            if peer != self._node.node_key:
                try:
                    self._node.notify(peer, method, params)
                except SmartnodesError as error:
                    logger.debug("%s did not reach a peer: %s", method, error)
