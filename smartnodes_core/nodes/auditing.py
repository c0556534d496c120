"""A validator's auditing: take commitments, keep verdicts, give both to validators that lack them.

The draw is in `drawing.py`, challenges in `challenging.py`, what is held in `books.py`; this module joins them. No
thread of theirs waits for another, for a peer that is down, or for the chain.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from smartnodes_core.audit import Auditor, HashChain, assigned_validators
from smartnodes_core.audit_proofs import decode_proof
from smartnodes_core.counters import COUNTERS
from smartnodes_core.errors import AuthorityError, RecordError, SmartnodesError, Unavailable
from smartnodes_core.identity import Identity, verify
from smartnodes_core.jobs import Job
from smartnodes_core.journal import Journal
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.books import AuditBooks, AuditedJob
from smartnodes_core.nodes.challenging import ChallengeDesk, Found
from smartnodes_core.nodes.claim_books import SecondVersionError
from smartnodes_core.nodes.drawing import DrawDesk
from smartnodes_core.nodes.evidence import EvidenceDesk
from smartnodes_core.nodes.mailing import Mailer
from smartnodes_core.nodes.params import bytes_in, count_in, digest_in
from smartnodes_core.nodes.proving import ProofDesk
from smartnodes_core.nodes.seconding import SecondDesk
from smartnodes_core.nodes.withholding import WithholdingDesk
from smartnodes_core.records import MAX_RECORD_BYTES, Commitment, Departure, NodeKey, Signed, TwoVersions, Verdict
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 10.0
QUIET_S = 1.0
#: How long records are fetched from one validator in one go: one that answers each call slowly stops nobody's rounds.
MAX_FETCH_S = 20.0
#: Records fetched from one validator in one go.
MAX_FETCH = 512


class AuditDesk:
    """The auditing of one validator over all its jobs.

    `tip` gives a validator's hash-chain tip on chain; `list_interval_s` is how long commitments are gathered before a
    list is fixed, `reveal_timeout_s` after how long a list is revealed although another validator has not listed the
    same, `challenge_timeout_s` how long a worker has to open, `withhold_timeout_s` after how long a validator whose
    part in a draw is missing is said to withhold it.
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
        withhold_timeout_s: float = 120.0,
    ):
        self.books = AuditBooks()
        self.lock, self.jobs = self.books.lock, self.books.jobs
        evidence.on_confirmed = self.confirm
        self._node, self._identity, self._evidence = node, identity, evidence
        self._mailer = Mailer(node, "audit-mail")
        self.proofs = ProofDesk(node, self.books, self._mailer)
        seconds = SecondDesk(node, identity, auditor, self.books, self._mailer, challenge_timeout_s)
        self._challenges = ChallengeDesk(
            node,
            identity,
            auditor,
            evidence,
            self.books,
            self.take_commitment,
            self._give_verdict,
            seconds,
            challenge_timeout_s,
        )
        self._draws = DrawDesk(
            node,
            identity,
            self.books,
            chain,
            tip,
            journal,
            self._mailer,
            self.fetch,
            self._challenges.add,
            list_interval_s,
            reveal_timeout_s,
        )
        self._absences = WithholdingDesk(
            node, identity, self.books, self.proofs, self._mailer, self.take_draw, withhold_timeout_s
        )
        self.proofs.on_excluded = lambda audited: self._draws.wake()
        self._draws.on_revealed = self.proofs.honour_departures
        node.serve(self)

    def start(self) -> None:
        self._draws.start()
        self._challenges.start()
        self._absences.start()

    def stop(self) -> None:
        """Ends all threads; a case under way is given up."""
        self._absences.stop()
        self._draws.stop()
        self._challenges.stop()
        self._mailer.stop()

    def leave(self, timeout_s: float) -> None:
        """Hand the audits of open jobs over to the validators that come next in rank: list nothing more, reveal what is
        owed, say so in a signed departure, and finish the cases at hand. Returns after `timeout_s` in any case.
        """
        deadline_s, own = time.monotonic() + timeout_s, self._node.node_key
        self._draws.leave()
        with self.books.changed:
            self._wait_until(lambda: not any(audited.pending for audited in self.jobs.values()), deadline_s)
            jobs = [audited.job.id for audited in self.jobs.values() if not audited.closed]
        for job_id in jobs:
            self.proofs.take_departure(self._identity.sign(Departure(job=job_id, validator=own)).encode())
        with self.books.changed:
            self._wait_until(lambda: not any(audited.num_open for audited in self.jobs.values()), deadline_s)
        self._mailer.flush(max(0.0, deadline_s - time.monotonic()))

    def _wait_until(self, condition: Callable[[], bool], deadline_s: float) -> None:
        """Under the lock of the books, which tell of changes."""
        while not condition() and (left_s := deadline_s - time.monotonic()) > 0:
            self.books.changed.wait(left_s)

    def open(self, job: Job) -> None:
        """Begin to audit a job (or go on under a newer plan)."""
        with self.lock:
            audited = self.jobs.get(job.id)
            if audited is None:
                self.jobs[job.id] = AuditedJob(job, assigned_validators(job.id, job.plan.validators))
            elif job.plan.version > audited.job.plan.version:
                audited.go_on_with(job)

    def close(self, job_id: bytes, timeout_s: float) -> None:
        """The job ended: returns when everything of it is drawn and examined here, or after `timeout_s`.

        Its last commitments may still be on their way, so that it waits for QUIET_S without any.
        """
        deadline_s = time.monotonic() + timeout_s
        with self.books.changed:
            audited = self.jobs.get(job_id)
            if audited is None:
                return
            while (now_s := time.monotonic()) < deadline_s:
                quiet_in_s = audited.active_at_s + QUIET_S - now_s
                if quiet_in_s <= 0 and audited.num_open == 0 and audited.is_drawn:
                    break
                self.books.changed.wait(min(deadline_s - now_s, quiet_in_s if quiet_in_s > 0 else QUIET_S))
            audited.closed, audited.closed_at_s = True, time.monotonic()

    def take_draw(self, listed: bytes, revealed: bytes) -> None:
        """A list of some validator, with its preimage if that is out, as another shows it. Raises as its calls do."""
        self._draws.take_list(listed)
        if revealed:
            self._draws.take_reveal(revealed)

    def resume(self, job_id: bytes) -> None:
        """Go on with a job that was taken up again after a restart."""
        with self.lock:
            audited = self.jobs.get(job_id)
        if audited is not None:
            self._draws.resume(audited)

    def idle_s(self, job_id: bytes) -> float:
        """Seconds since the job was opened here, or its last commitment came; endless for one that is not known."""
        with self.lock:
            audited = self.jobs.get(job_id)
            return time.monotonic() - audited.active_at_s if audited else float("inf")

    # -- commitments --------------------------------------------------------------------------------------------------

    @allow(roles=("worker", "validator"), max_body_bytes=MAX_RECORD_BYTES)
    def rpc_commitment(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """A worker's commitment, from itself or passed on by a validator."""
        self.take_commitment(bytes(body))

    def take_commitment(self, data: bytes) -> None:
        """Store a signed commitment; see `AuditedJob.take` for what it raises."""
        signed = Signed.decode(data)
        commitment = verify(signed, Commitment)
        with self.lock:
            audited = self.books.job(commitment.job)
            try:
                if not audited.take(commitment, signed.signer, data):
                    return
            except SecondVersionError as error:
                if error.proof is not None:
                    self.proofs.take(error.proof)
                raise
            faults = audited.compare_links(commitment)
            disputed = list(audited.disputes.get(commitment.digest(), ()))
        COUNTERS.add("commitments", "taken")
        if faults:
            logger.warning("step %s: %s", commitment.step, faults[0])
        self._draws.draw(audited, [commitment.digest(), *disputed])  # others may have revealed before it came
        self._draws.wake()

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_fetch_commitment(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """A signed commitment by its digest, for a validator that the worker's message did not reach; else nothing."""
        digest = digest_in(params, "digest")
        with self.lock:
            found = [audited.signed[digest] for audited in self.jobs.values() if digest in audited.signed]
        return {}, found[:1]

    def fetch(self, audited: AuditedJob, holder: NodeKey, digests: Iterable[bytes]) -> None:
        """Get commitments of a job that another validator holds."""
        with self.lock:
            lacking = [digest for digest in digests if digest not in audited.commitments]
        self._fetch_all(holder, "fetch_commitment", lacking, self._take_fetched)

    def fetch_missing(self, holder: NodeKey, commitments: Iterable[bytes], found: Sequence[bytes]) -> None:
        """Get records of any job that another validator's proposal names."""
        self._fetch_all(holder, "fetch_commitment", commitments, self._take_fetched)
        self._fetch_all(holder, "fetch_verdict", found, self._take_fetched_verdict)
        with self.lock:
            held = {digest for audited in self.jobs.values() for digest in audited.verdicts}
        proofs = [digest for digest in found if digest not in held]
        self._fetch_all(holder, "fetch_proof", proofs, lambda data, _: self.proofs.take(decode_proof(data)))

    def _take_fetched(self, data: bytes, params: dict[str, Any]) -> None:
        self.take_commitment(data)

    def _take_fetched_verdict(self, data: bytes, params: dict[str, Any]) -> None:
        num_bytes = count_in(params, "verdict_bytes", len(data))
        self.take_verdict(data[:num_bytes], data[num_bytes:])

    def _fetch_all(
        self,
        holder: NodeKey,
        method: str,
        digests: Iterable[bytes],
        take: Callable[[bytes, dict[str, Any]], None],
    ) -> None:
        end_s = time.monotonic() + MAX_FETCH_S
        for digest in list(digests)[:MAX_FETCH]:
            if time.monotonic() > end_s:
                logger.warning("%s: %s takes too long to show what it named", method, holder.hex()[:8])
                return
            try:
                reply = self._node.call(
                    holder, method, {"digest": digest}, timeout_s=FETCH_TIMEOUT_S, max_body_bytes=TwoVersions.max_bytes
                )
                if reply.body:
                    take(bytes(reply.body), reply.params)
            except Unavailable as error:
                logger.warning("%s: what a validator named could not be fetched: %s", method, error)
                return
            except SmartnodesError as error:
                logger.warning("%s: what a validator named cannot be taken: %s", method, error)

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def _give_verdict(self, audited: AuditedJob, found: Found) -> None:
        """Sign what was found here, and tell validators, worker and author."""
        commitment, challenge = found.commitment, found.challenge
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
            finding=found.finding,
            reason=found.reason[:4000],
            evidence=found.evidence,
            work_units=commitment.work_units,
            decided_at_s=int(time.time()),
        )
        COUNTERS.add("verdicts", verdict.finding)
        data = self._identity.sign(verdict).encode()
        if found.finding == "fraudulent":
            self._evidence.accuse(found.evidence, data)
        self.take_verdict(data, found.silence)
        self._mailer.post(audited.job.plan.validators, "verdict", {"verdict": data}, found.silence)
        self._mailer.post((commitment.worker, audited.job.record.author), "verdict", {"verdict": data})

    @allow(roles=("validator",), max_body_bytes=MAX_RECORD_BYTES)
    def rpc_verdict(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """What another auditor found; the body is the proof of a silence."""
        self.take_verdict(bytes_in(params, "verdict"), bytes(body))

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_fetch_verdict(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """A signed verdict by its digest, of a silence with its proof; else nothing."""
        digest = digest_in(params, "digest")
        with self.lock:
            for audited in self.jobs.values():
                if digest in audited.verdicts:
                    data = audited.verdicts[digest][1]
                    return {"verdict_bytes": len(data)}, [data, audited.silence_of(digest)]
        return {}, []

    def take_verdict(self, data: bytes, silence: bytes = b"") -> None:
        """Store a signed verdict, of a silence with its signed proof; a fraud that another found is re-run. Raises
        AuthorityError, RecordError."""
        signed = Signed.decode(data)
        verdict = verify(signed, Verdict)
        own = verdict.auditor == self._node.node_key
        with self.books.changed:
            audited = self.books.job(verdict.job)
            if signed.signer != verdict.auditor or not audited.may_audit(verdict.auditor):
                raise AuthorityError("a verdict is signed by an assigned validator")
            if not audited.store_verdict(verdict, data, silence):
                return
            follow = audited.followed_by(verdict) if silence else []
            if own:
                audited.confirmed[verdict.digest()] = time.monotonic()
            self.books.changed.notify_all()
        self._draws.draw(audited, follow)  # they are audited now whatever their seeds say
        if verdict.finding == "fraudulent" and not own:
            self._evidence.confirm(verdict)

    def confirm(self, verdict: Verdict) -> None:
        """This validator has re-run a fraud verdict and found the same: rounds may carry it."""
        with self.books.changed:
            audited = self.jobs.get(verdict.job)
            if audited is None or verdict.digest() not in audited.verdicts:
                raise RecordError("a verdict that is not held any more")
            audited.confirmed[verdict.digest()] = time.monotonic()
            self.books.changed.notify_all()

    def confirm_again(self, digests: Iterable[bytes]) -> None:
        """Re-run frauds among `digests` that are held and not yet confirmed: their evidence may be reachable now."""
        with self.lock:
            waiting = [
                audited.verdicts[digest][0]
                for digest in digests
                for audited in self.jobs.values()
                if digest in audited.verdicts and digest not in audited.confirmed
            ]
        for verdict in waiting:
            if verdict.finding == "fraudulent":
                self._evidence.confirm(verdict)
