"""Proofs by signatures (`audit_proofs.py`) among the validators of a job: taken, told once, shown to who lacks one. And
the word of those who leave.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from smartnodes_core.audit_proofs import Proof, decode_proof, name_of
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.books import AuditBooks, AuditedJob
from smartnodes_core.nodes.mailing import Mailer
from smartnodes_core.nodes.params import digest_in
from smartnodes_core.records import Departure, Signed, TwoVersions, Withholding
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

MAX_DEPARTURE_BYTES = 1024


class ProofDesk:
    """`on_excluded(audited)` is told when a validator was shut out of a job's draws."""

    def __init__(self, node: Node, books: AuditBooks, mailer: Mailer):
        self.on_excluded: Callable[[AuditedJob], None] = lambda audited: None
        self._books, self._mailer = books, mailer
        node.serve(self)

    def take(self, proof: Proof) -> None:
        """Keep a proof and tell the job's other validators, once for each. Raises RecordError or SignatureError for
        what proves nothing."""
        with self._books.changed:
            audited = self._books.job(proof.job)
            if not audited.add_proof(proof):
                return
            self._books.changed.notify_all()
        kind = "two commitments of one step" if isinstance(proof, TwoVersions) else "a validator that withholds a draw"
        logger.warning("job %s: proof of %s: %s", proof.job.hex()[:8], kind, name_of(proof).hex()[:16])
        self._mailer.post(audited.job.plan.validators, "proof", {}, proof.encode())
        if isinstance(proof, Withholding):
            self.on_excluded(audited)

    def take_departure(self, data: bytes) -> None:
        """Keep a validator's word that it leaves and tell the job's other validators, once. Raises RecordError or
        SignatureError."""
        departure = Departure.decode(Signed.decode(data).record)
        with self._books.changed:
            audited = self._books.job(departure.job)
            if not audited.add_departure(data):
                return
        logger.info("validator %s leaves job %s", departure.validator.hex()[:8], departure.job.hex()[:8])
        self._mailer.post(audited.job.plan.validators, "departure", {}, data)
        self.honour_departures(audited)

    def honour_departures(self, audited: AuditedJob) -> None:
        """Make draws without those who leave, where they owe nothing any more."""
        with self._books.changed:
            left = audited.honour_departures()
            self._books.changed.notify_all()
        if left:
            self.on_excluded(audited)

    @allow(roles=("validator",), max_body_bytes=MAX_DEPARTURE_BYTES)
    def rpc_departure(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """A validator of a job leaves it, as it says itself."""
        self.take_departure(bytes(body))

    @allow(roles=("validator",), max_body_bytes=TwoVersions.max_bytes)
    def rpc_proof(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """Another validator found or was told a proof."""
        self.take(decode_proof(body))

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_fetch_proof(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The proof with this name; else nothing."""
        name = digest_in(params, "digest")
        with self._books.lock:
            found = [audited.proofs[name] for audited in self._books.jobs.values() if name in audited.proofs]
        return {}, [proof.encode() for proof in found[:1]]
