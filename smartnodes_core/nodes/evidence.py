"""Evidence of fraud: kept by the auditor that found it, fetched and re-run by every validator that is to sign for
it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from blake3 import blake3

from smartnodes_core.audit import Auditor, Case
from smartnodes_core.errors import RecordError, SmartnodesError
from smartnodes_core.identity import verify
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import Challenge, Commitment, Digest, Evidence, JobRecord, Signed, Verdict
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

MAX_EVIDENCE_BYTES = 8 << 30
FETCH_TIMEOUT_S = 120.0
MAX_KEPT = 64


class EvidenceDesk:
    """Keeps evidence, and re-runs what other auditors found; `on_confirmed(verdict)` is told where it came out the
    same.
    """

    def __init__(self, node: Node, auditor: Auditor):
        self.on_confirmed: Callable[[Verdict], None] = lambda verdict: None
        self._node, self._auditor = node, auditor
        self._kept: dict[bytes, tuple[Evidence, bytes]] = {}
        self._lock = threading.Lock()
        self._queue: queue.Queue[Verdict | None] = queue.Queue()
        self._thread = threading.Thread(target=self._confirm_all, name="evidence", daemon=True)
        node.serve(self)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def keep(self, case: Case, signed_commitment: bytes, body: memoryview) -> Digest:
        """Keep what a fraud was found in; returns the digest that the verdict carries."""
        evidence = Evidence(
            job=case.job.encode(),
            spec=case.spec,
            commitment=signed_commitment,
            previous=b"",
            order=case.order,
            challenge=case.challenge.encode(),
            opening=case.opening,
            body_digest=blake3(body).digest(),
            body_bytes=len(body),
        )
        digest = evidence.digest()
        with self._lock:
            self._kept[digest] = (evidence, bytes(body))
            while len(self._kept) > MAX_KEPT:
                del self._kept[next(iter(self._kept))]
        return digest

    def confirm(self, verdict: Verdict) -> None:
        """Re-run another auditor's fraud verdict, in the background."""
        self._queue.put(verdict)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_evidence(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The evidence with this digest: the record, then the opened bytes."""
        with self._lock:
            found = self._kept.get(bytes(params["digest"]))
        if found is None:
            raise RecordError("no such evidence is kept here")
        record = found[0].encode()
        return {"record_bytes": len(record)}, [record, found[1]]

    def _confirm_all(self) -> None:
        while (verdict := self._queue.get()) is not None:
            try:
                self._confirm(verdict)
            except SmartnodesError as error:
                logger.warning("a fraud verdict could not be re-run and is not signed for: %s", error)
            except Exception:
                logger.exception("re-running a fraud verdict")

    def _confirm(self, verdict: Verdict) -> None:
        reply = self._node.call(
            verdict.auditor,
            "evidence",
            {"digest": verdict.evidence},
            timeout_s=FETCH_TIMEOUT_S,
            max_body_bytes=MAX_EVIDENCE_BYTES,
        )
        num_bytes = int(reply.params["record_bytes"])
        evidence = Evidence.decode(bytes(reply.body[:num_bytes]))
        body = reply.body[num_bytes:]
        if evidence.digest() != verdict.evidence or blake3(body).digest() != evidence.body_digest:
            raise RecordError("the evidence is not what the verdict names")
        case = case_of(evidence)
        if (case.commitment.digest(), case.challenge.digest()) != (verdict.commitment, verdict.challenge):
            raise RecordError("the evidence is of another unit than the verdict")
        finding, reason = self._auditor.examine(case, body)
        if finding == "fraudulent":
            self.on_confirmed(verdict)
        else:
            logger.warning("a fraud verdict of %s is not confirmed: %s", verdict.auditor.hex()[:8], reason)


def case_of(evidence: Evidence) -> Case:
    """The case that evidence tells. Raises RecordError or SignatureError."""
    return Case(
        job=JobRecord.decode(evidence.job),
        spec=evidence.spec,
        commitment=verify(Signed.decode(evidence.commitment), Commitment),
        challenge=Challenge.decode(evidence.challenge),
        order=evidence.order,
        opening=evidence.opening,
    )
