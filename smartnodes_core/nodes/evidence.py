"""Evidence of fraud: kept by the auditor that found it, fetched and re-run by every validator that is to sign for
it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from smartnodes_core.audit import Auditor, Case, Opened
from smartnodes_core.errors import RecordError, SmartnodesError
from smartnodes_core.identity import verify
from smartnodes_core.jobs import spec_digest
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.evidence_shelf import MAX_EVIDENCE_BYTES, EvidenceShelf
from smartnodes_core.nodes.params import count_in, digest_in
from smartnodes_core.records import Challenge, Commitment, Digest, Evidence, JobRecord, Opening, Signed, Verdict
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 120.0


class EvidenceDesk:
    """Keeps evidence, and re-runs what other auditors found; `on_confirmed(verdict)` is told where it came out the
    same. `folder` makes what is kept durable (None: in memory only, for tests).
    """

    def __init__(self, node: Node, auditor: Auditor, folder: Path | None = None):
        self.on_confirmed: Callable[[Verdict], None] = lambda verdict: None
        self._node, self._auditor = node, auditor
        self._shelf = EvidenceShelf(folder)
        self._lock = threading.Lock()
        self._waiting: set[bytes] = set()
        self._queue: queue.Queue[Verdict | None] = queue.Queue()
        self._thread = threading.Thread(target=self._confirm_all, name="evidence", daemon=True)
        node.serve(self)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def keep(
        self, case: Case, signed_commitment: bytes, earlier: list[bytes], signed_opening: bytes, body: memoryview
    ) -> Digest:
        """Keep what a fraud was found in; returns the digest that the verdict carries, when it is durable. Raises
        LocalError where it cannot be written: then the fraud is not announced."""
        evidence = Evidence(
            job=case.job.encode(),
            spec=case.spec,
            commitment=signed_commitment,
            earlier=earlier,
            order=case.order,
            challenge=case.challenge.encode(),
            opening=signed_opening,
            body_digest=blake3(body).digest(),
            body_bytes=len(body),
        )
        return self._shelf.put(evidence, body)

    def confirm(self, verdict: Verdict) -> None:
        """Re-run another auditor's fraud verdict, in the background; once at a time for each."""
        with self._lock:
            if verdict.digest() in self._waiting:
                return
            self._waiting.add(verdict.digest())
        self._queue.put(verdict)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_evidence(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The evidence with this digest: the record, then the opened bytes."""
        record, opened = self._shelf.get(digest_in(params, "digest"))
        return {"record_bytes": len(record)}, [record, opened]

    def _confirm_all(self) -> None:
        while (verdict := self._queue.get()) is not None:
            try:
                self._confirm(verdict)
            except SmartnodesError as error:
                logger.warning("a fraud verdict could not be re-run and is not signed for: %s", error)
            except Exception:
                logger.exception("re-running a fraud verdict")
            with self._lock:
                self._waiting.discard(verdict.digest())

    def _confirm(self, verdict: Verdict) -> None:
        reply = self._node.call(
            verdict.auditor,
            "evidence",
            {"digest": verdict.evidence},
            timeout_s=FETCH_TIMEOUT_S,
            max_body_bytes=MAX_EVIDENCE_BYTES,
        )
        num_bytes = count_in(reply.params, "record_bytes", len(reply.body))
        evidence = Evidence.decode(bytes(reply.body[:num_bytes]))
        if evidence.digest() != verdict.evidence:
            raise RecordError("the evidence is not what the verdict names")
        body = reply.body[num_bytes:]
        finding, reason = self._auditor.examine(case_of(evidence, verdict, body), body)
        if finding == "fraudulent":
            self.on_confirmed(verdict)
        else:
            logger.warning("a fraud verdict of %s is not confirmed: %s", verdict.auditor.hex()[:8], reason)


def case_of(evidence: Evidence, verdict: Verdict, body: memoryview) -> Case:
    """The case that evidence tells, every part held against the verdict and against what the worker signed, so that
    no part can have been put there by the auditor. Raises RecordError or SignatureError."""
    job = JobRecord.decode(evidence.job)
    signed = Signed.decode(evidence.commitment)
    commitment = verify(signed, Commitment)
    challenge = Challenge.decode(evidence.challenge)
    if (job.digest(), commitment.digest(), challenge.digest()) != (verdict.job, verdict.commitment, verdict.challenge):
        raise RecordError("the evidence is of another job or unit than the verdict")
    if not signed.signer == commitment.worker == verdict.worker or commitment.job != verdict.job:
        raise RecordError("the commitment in the evidence is not the accused worker's")
    unit = (challenge.job, challenge.commitment, challenge.tier, challenge.unit, challenge.auditor)
    if unit != (verdict.job, verdict.commitment, verdict.tier, verdict.unit, verdict.auditor):
        raise RecordError("the challenge in the evidence asks for another unit than the verdict is about")
    if commitment.stage >= len(job.specs) or spec_digest(evidence.spec) != job.specs[commitment.stage]:
        raise RecordError("the spec in the evidence is not the one that the job record names")
    if (evidence.body_digest, evidence.body_bytes) != (blake3(body).digest(), len(body)):
        raise RecordError("the opened bytes are not those of the evidence")
    opening = opening_of(evidence.opening, commitment.worker, challenge.digest(), body)
    earlier = chain_before(commitment, evidence.earlier)
    return Case(job, evidence.spec, commitment, challenge, evidence.order, opening.encode(), earlier)


def chain_before(commitment: Commitment, signed: Sequence[bytes]) -> tuple[Commitment, ...]:
    """The commitments that precede one, oldest first, each signed by its worker and named by the next. Raises
    RecordError or SignatureError."""
    found: list[Commitment] = []
    following = commitment
    for data in reversed(signed):
        envelope = Signed.decode(data)
        earlier = verify(envelope, Commitment)
        if envelope.signer != commitment.worker or earlier.digest() != following.previous:
            raise RecordError(f"what was opened as the commitment before step {following.step} is not the one it names")
        found.append(earlier)
        following = earlier
    return tuple(reversed(found))


def opening_of(signed_opening: bytes, worker: bytes, challenge: bytes, body: memoryview) -> Opening:
    """The opening that `worker` signed for `challenge` over `body`. Raises RecordError or SignatureError."""
    signed = Signed.decode(signed_opening)
    opened = verify(signed, Opened)
    opening = Opening.decode(opened.opening)
    if signed.signer != worker or opening.challenge != challenge:
        raise RecordError("the opening is not the worker's, or answers another challenge")
    if opened.body_digest != blake3(body).digest():
        raise RecordError("the opening's body is not the one that the worker signed")
    return opening
