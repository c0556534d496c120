"""A validator's challenges: have a worker open what the seed selects, re-execute it, find.

Several openings are fetched side by side but never two from one worker, so that a worker that answers slowly delays
its own audits only; re-execution is one at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from smartnodes_core.audit import Auditor, Case, Selection, seed_of
from smartnodes_core.errors import PeerFault, RecordError, SmartnodesError
from smartnodes_core.evidence import chain_before, opening_of
from smartnodes_core.identity import Identity
from smartnodes_core.jobs import MAX_EARLIER, spec_digest
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.books import AuditBooks, AuditedJob, SecondVersionError
from smartnodes_core.nodes.evidence import EvidenceDesk, Signatures
from smartnodes_core.nodes.params import count_in, counts_in
from smartnodes_core.records import MAX_RECORD_BYTES, NO_DIGEST, Challenge, Commitment, Digest, Finding

logger = logging.getLogger(__name__)

MAX_SPEC_BYTES = 64 << 20
MAX_OPENING_BYTES = 8 << 30
SPEC_TIMEOUT_S = 30.0
NUM_EXAMINERS = 3


@dataclass(frozen=True)
class Found:
    """What an audit came to: the challenge, the finding with its reason, and the evidence kept (or NO_DIGEST)."""

    commitment: Commitment
    challenge: Challenge
    finding: Finding
    reason: str
    evidence: Digest


@dataclass(frozen=True)
class _Waiting:
    audited: AuditedJob
    commitment: Commitment
    selection: Selection


class ChallengeDesk:
    """Examines the cases that fall to this validator; `on_found` is told of each."""

    def __init__(
        self,
        node: Node,
        identity: Identity,
        auditor: Auditor,
        evidence: EvidenceDesk,
        books: AuditBooks,
        take_commitment: Callable[[bytes], None],
        on_found: Callable[[AuditedJob, Found], None],
        timeout_s: float,
    ):
        self._node, self._identity, self._auditor, self._evidence = node, identity, auditor, evidence
        self._books, self._on_found, self._timeout_s = books, on_found, timeout_s
        self._take_commitment = take_commitment
        self._changed = threading.Condition()
        self._cases: deque[_Waiting] = deque()
        self._asked: set[bytes] = set()  # workers that are opening something now
        self._stopping = False
        self._examining = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"audit-cases {number}", daemon=True)
            for number in range(NUM_EXAMINERS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads; a case under way is given up."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        deadline_s = time.monotonic() + 2.0
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline_s - time.monotonic()))

    def add(self, audited: AuditedJob, digest: bytes, selection: Selection) -> None:
        """Queue a case; the caller holds the lock of the books."""
        audited.num_open += 1
        with self._changed:
            self._cases.append(_Waiting(audited, audited.commitments[digest], selection))
            self._changed.notify()

    def _run(self) -> None:
        while (case := self._take()) is not None:
            try:
                self._examine(case)
            except Exception:
                logger.exception("an audit was given up")
            with self._changed:
                self._asked.discard(case.commitment.worker)
                self._changed.notify_all()
            with self._books.changed:
                case.audited.num_open -= 1
                self._books.changed.notify_all()

    def _take(self) -> _Waiting | None:
        """The first case whose worker is not being asked; None when it is time to stop."""
        with self._changed:
            while not self._stopping:
                for case in self._cases:
                    if case.commitment.worker not in self._asked:
                        self._cases.remove(case)
                        self._asked.add(case.commitment.worker)
                        return case
                self._changed.wait()
            return None

    def _examine(self, case: _Waiting) -> None:
        """Challenge, opening, finding. A worker that answers wrongly, and one that does not, both get a verdict."""
        audited, commitment = case.audited, case.commitment
        digest = commitment.digest()
        with self._books.lock:
            reveals = audited.reveals_for(digest)
            lists = [audited.lists[(key, reveal.reveal)][1] for key, (reveal, _) in sorted(reveals.items())]
            signed_commitment = audited.signed.get(digest, b"")
        challenge = Challenge(
            job=audited.job.id,
            commitment=digest,
            tier=case.selection.tier,  # type: ignore[arg-type]
            unit=case.selection.unit,
            seed=seed_of({key: reveal.preimage for key, (reveal, _) in reveals.items()}, digest),
            reveals=[reveals[key][0].digest() for key in sorted(reveals)],
            auditor=self._node.node_key,
            deadline_s=int(time.time() + self._timeout_s),
        )
        finding: Finding = "inconclusive"
        evidence = NO_DIGEST
        try:
            signed_reveals = [reveals[key][1] for key in sorted(reveals)]
            opened, earlier, signed_opening, body = self._open(audited, commitment, challenge, lists, signed_reveals)
        except PeerFault as fault:
            reason = f"not opened: {fault}"
        except SmartnodesError as error:
            reason = f"no opening came: {error}"
        else:
            finding, reason = self._compare(opened, body)
            if finding == "fraudulent":
                signatures = Signatures(
                    audited.job.signed_record,
                    audited.under(commitment.plan_version).signed_plan,
                    signed_commitment,
                    earlier,
                    lists,
                    signed_reveals,
                    signed_opening,
                )
                evidence = self._evidence.keep(opened, signatures, body)
        self._on_found(audited, Found(commitment, challenge, finding, reason, evidence))

    def _compare(self, case: Case, body: memoryview) -> tuple[Finding, str]:
        with self._examining:
            try:
                return self._auditor.examine(case, body)
            except Exception as error:  # an auditor must not raise; if it does, nothing is known of the worker
                logger.exception("an auditor failed")
                return "inconclusive", f"the audit could not be run: {type(error).__name__}"

    def _open(
        self,
        audited: AuditedJob,
        commitment: Commitment,
        challenge: Challenge,
        lists: list[bytes],
        reveals: list[bytes],
    ) -> tuple[Case, list[bytes], bytes, memoryview]:
        """Have the worker open the unit: the case, its signed earlier commitments and opening, the body.

        Raises PeerFault where it refuses or answers wrongly, Unavailable where it does not answer.
        """
        key = audited.of_stage(commitment)
        params = {"key": key, "challenge": self._identity.sign(challenge).encode(), "lists": lists, "reveals": reveals}
        spec = self._spec(audited, commitment, key)
        reply = self._node.call(
            commitment.worker, "challenge", params, timeout_s=self._timeout_s, max_body_bytes=MAX_OPENING_BYTES
        )
        at = count_in(reply.params, "opening_bytes", len(reply.body))
        end = at + count_in(reply.params, "order_bytes", len(reply.body) - at)
        signed_opening, order = bytes(reply.body[:at]), bytes(reply.body[at:end])
        earlier: list[bytes] = []
        for num_bytes in counts_in(reply.params, "earlier_bytes", MAX_EARLIER, MAX_RECORD_BYTES):
            earlier.append(bytes(reply.body[end : end + num_bytes]))
            end += num_bytes
        body = reply.body[end:]
        opening = opening_of(signed_opening, commitment.worker, challenge.digest(), order, body)
        chain = chain_before(commitment, earlier)
        self._compare_versions(earlier)
        job = audited.under(commitment.plan_version)
        state_root = job.state_root_of(commitment.stage, commitment.replica)
        case = Case(job.record, spec, commitment, challenge, order, opening.encode(), chain, state_root)
        return case, earlier, signed_opening, body

    def _compare_versions(self, earlier: list[bytes]) -> None:
        """Raises SecondVersionError where the worker opens another commitment of a step than it published."""
        for data in earlier:
            try:
                self._take_commitment(data)
            except SecondVersionError:
                raise
            except SmartnodesError as error:  # settled long since, or of a job that has ended
                logger.debug("a commitment that was opened is not kept: %s", error)

    def _spec(self, audited: AuditedJob, commitment: Commitment, key: str) -> bytes:
        """What the stage runs, fetched once from its worker and checked against the job record."""
        spec = audited.specs.get(commitment.stage)
        if spec is None:
            reply = self._node.call(
                commitment.worker, "spec", {"key": key}, timeout_s=SPEC_TIMEOUT_S, max_body_bytes=MAX_SPEC_BYTES
            )
            spec = bytes(reply.body)
            if spec_digest(spec) != audited.job.record.specs[commitment.stage]:
                raise RecordError("the worker gave another spec than the job record names")
            audited.specs[commitment.stage] = spec
        return spec
