"""Evidence of fraud: kept by the auditor that found it, fetched and re-run by every validator that is to sign for
it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from smartnodes_core.audit import Auditor, Case
from smartnodes_core.errors import AuthorityError, SmartnodesError
from smartnodes_core.evidence import MAX_EVIDENCE_BYTES, case_of, check_verdict
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.evidence_shelf import EvidenceShelf
from smartnodes_core.nodes.params import count_in, digest_in
from smartnodes_core.records import Digest, Evidence, Signed, Verdict
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 120.0


class Signatures(NamedTuple):
    """The signed records behind a case, each as its signer sent it; `lists` and `reveals` are those of the draw,
    `grounds` what it stands on besides."""

    job: bytes
    plan: bytes
    commitment: bytes
    earlier: list[bytes]
    lists: list[bytes]
    reveals: list[bytes]
    grounds: list[bytes]
    opening: bytes


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

    def keep(self, case: Case, signed: Signatures, body: memoryview) -> Digest:
        """Keep what a fraud was found in; returns the digest that the verdict carries, when it is durable. Raises
        LocalError where it cannot be written: then the fraud is not announced."""
        evidence = Evidence(
            **signed._asdict(),
            spec=case.spec,
            order=case.order,
            challenge=case.challenge.encode(),
            body_digest=blake3(body).digest(),
            body_bytes=len(body),
        )
        return self._shelf.put(evidence, body)

    def accuse(self, digest: Digest, signed_verdict: bytes) -> None:
        """Keep the signed verdict with its evidence, so that the file tells who accuses; without, it still tells of
        what."""
        try:
            self._shelf.add_verdict(digest, signed_verdict)
        except SmartnodesError as error:
            logger.warning("a verdict is not kept with its evidence: %s", error)

    def confirm(self, verdict: Verdict) -> None:
        """Re-run another auditor's fraud verdict, in the background; once at a time for each."""
        with self._lock:
            if verdict.digest() in self._waiting:
                return
            self._waiting.add(verdict.digest())
        self._queue.put(verdict)

    @allow(roles=("validator", "user"), max_body_bytes=0)
    def rpc_evidence(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The evidence with this digest, for validators and the job's author: the record, then the opened bytes."""
        record, opened = self._shelf.get(digest_in(params, "digest"))
        if caller.role == "user" and Signed.decode(Evidence.decode(record).job).signer != caller.node_key:
            raise AuthorityError("evidence is shown to validators and to the author of the job")
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
        if is_confirmed(self._node, self._auditor, verdict):
            self.on_confirmed(verdict)


def is_confirmed(node: Node, auditor: Auditor, verdict: Verdict) -> bool:
    """Fetch the evidence of a fraud verdict from its auditor, hold it against all signatures, and run it again. Raises
    what the call raises, RecordError or SignatureError for evidence of something else."""
    reply = node.call(
        verdict.auditor,
        "evidence",
        {"digest": verdict.evidence},
        timeout_s=FETCH_TIMEOUT_S,
        max_body_bytes=MAX_EVIDENCE_BYTES,
    )
    num_bytes = count_in(reply.params, "record_bytes", len(reply.body))
    evidence = Evidence.decode(bytes(reply.body[:num_bytes]))
    body = reply.body[num_bytes:]
    case = case_of(evidence, body)
    check_verdict(verdict, evidence, case)
    finding, reason = auditor.examine(case, body)
    if finding != "fraudulent":
        logger.warning("a fraud verdict of %s is not confirmed: %s", verdict.auditor.hex()[:8], reason)
    return finding == "fraudulent"
