"""What a validator that was away asks the others for: the jobs that it is to audit, and what was drawn in them.

Without them it could justify no round that settles those jobs until they end. Every record carries the signature of
whom it speaks for, so that it does not matter who shows it. A job is taken up again when so many of its validators name
it that one of them is honest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from smartnodes_core.audit_proofs import decode_proof
from smartnodes_core.errors import AuthorityError, RecordError, SmartnodesError
from smartnodes_core.jobs import Job
from smartnodes_core.nodes.auditing import AuditDesk
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.params import bytes_in, digest_in
from smartnodes_core.nodes.placement import JobDesk
from smartnodes_core.nodes.polling import ask_all
from smartnodes_core.records import MAX_RECORD_BYTES, NodeKey
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

T = TypeVar("T")

CALL_TIMEOUT_S = 10.0
MAX_JOBS = 256
MAX_PAGE_BYTES = 8 << 20
#: Pages of one job's records that are asked for at most.
MAX_PAGES = 1 << 10
#: Kinds of records, in the order in which they are told: what was found before is known before anything is drawn.
COMMITMENT, VERDICT, PROOF, DEPARTURE, LIST = b"0", b"1", b"2", b"3", b"4"
MAX_PLACE_BYTES = 64

_jobs = msgspec.msgpack.Decoder(list[tuple[bytes, bytes]])
_records = msgspec.msgpack.Decoder(list[tuple[bytes, bytes, bytes]])


class ResumeDesk:
    """Tells others what they missed, and asks them. `resume` is for a start; harmless when repeated."""

    def __init__(self, node: Node, jobs: JobDesk, audits: AuditDesk):
        self._node, self._jobs, self._audits = node, jobs, audits
        node.serve(self)

    def resume(self, validators: Sequence[NodeKey]) -> int:
        """Take up the open jobs that `validators` name, and what was drawn in them; how many jobs were new."""
        told: dict[bytes, tuple[Job, set[NodeKey]]] = {}
        answers = ask_all(validators, self._ask_jobs, lambda found: False, CALL_TIMEOUT_S, 0.0)
        for validator, jobs in answers.items():
            for job in jobs:
                newest, tellers = told.get(job.id, (job, set()))
                if validator in job.plan.validators:
                    newest = job if job.plan.version > newest.plan.version else newest
                    told[job.id] = (newest, tellers | {validator})
        num_new = 0
        for job, tellers in told.values():
            num_faulty = (len(job.plan.validators) - 1) // 3
            if len(tellers) <= min(num_faulty, len(job.plan.validators) - 2):
                continue
            try:
                num_new += self._jobs.take_up(job)
                for validator in sorted(tellers):
                    self._take_records(job, validator)
                self._audits.resume(job.id)
            except SmartnodesError as error:
                logger.warning("job %s is not taken up again: %s", job.id.hex()[:8], error)
        return num_new

    def _ask_jobs(self, validator: NodeKey) -> list[Job]:
        try:
            reply = self._node.call(validator, "open_jobs", {}, timeout_s=CALL_TIMEOUT_S, max_body_bytes=MAX_PAGE_BYTES)
            page = _decode(_jobs, reply.body)
            return [Job.open(record, plan) for record, plan in page[:MAX_JOBS]]
        except SmartnodesError as error:
            logger.info("no jobs from validator %s: %s", validator.hex()[:8], error)
        except Exception:
            logger.exception("jobs of validator %s", validator.hex()[:8])
        return []

    def _take_records(self, job: Job, validator: NodeKey) -> None:
        after = b""
        for _ in range(MAX_PAGES):
            params = {"job": job.id, "after": after}
            try:
                reply = self._node.call(
                    validator, "audit_records", params, timeout_s=CALL_TIMEOUT_S, max_body_bytes=MAX_PAGE_BYTES
                )
                page = _decode(_records, reply.body)
            except SmartnodesError as error:
                logger.info("no records of job %s from %s: %s", job.id.hex()[:8], validator.hex()[:8], error)
                return
            if not page or page[-1][0] <= after:
                return
            after = page[-1][0]
            for place, data, revealed in page:
                self._take(place[:1], data, revealed)

    def _take(self, kind: bytes, data: bytes, revealed: bytes) -> None:
        """Keep what its signer signed; what is not taken is told."""
        try:
            if kind == COMMITMENT:
                self._audits.take_commitment(data)
            elif kind == VERDICT:
                self._audits.take_verdict(data, revealed)
            elif kind == PROOF:
                self._audits.proofs.take(decode_proof(data))
            elif kind == DEPARTURE:
                self._audits.proofs.take_departure(data)
            elif kind == LIST:
                self._audits.take_draw(data, revealed)
        except SmartnodesError as error:
            logger.info("a record is not taken over: %s", error)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_open_jobs(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The open jobs that the caller is to audit: signed records with their plans in force."""
        page, num_bytes = [], 0
        for job in self._jobs.open_jobs()[:MAX_JOBS]:
            num_bytes += len(job.signed_record) + len(job.signed_plan) + 16
            if caller.node_key in job.plan.validators and num_bytes < MAX_PAGE_BYTES:
                page.append((job.signed_record, job.signed_plan))
        return {}, [msgspec.msgpack.encode(page)]

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_audit_records(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The signed records of a job that no round has settled: first commitments, then verdicts (of silence with
        their proofs), other proofs, then lists with what was revealed for each (empty: nothing yet), as triples (place,
        record, what goes with it) behind the place `after`.
        """
        job_id, after = digest_in(params, "job"), bytes_in(params, "after", MAX_PLACE_BYTES)
        with self._audits.lock:
            audited = self._audits.books.job(job_id)
            if caller.node_key not in audited.job.plan.validators:
                raise AuthorityError("only a validator of the job's plan audits it")
            found = [(COMMITMENT + digest, data, b"") for digest, data in audited.signed.items()]
            found += [
                (VERDICT + digest, data, audited.silence_of(digest)) for digest, (_, data) in audited.verdicts.items()
            ]
            found += [(PROOF + name, proof.encode(), b"") for name, proof in audited.proofs.items()]
            found += [(DEPARTURE + validator, data, b"") for validator, data in audited.departures.items()]
            found += [
                (
                    LIST + validator + index.to_bytes(8, "big"),
                    data,
                    audited.reveals[(validator, index)][1] if (validator, index) in audited.reveals else b"",
                )
                for (validator, index), (received, data) in audited.lists.items()
                if audited.is_used(received)
            ]
        page: list[tuple[bytes, bytes, bytes]] = []
        num_bytes = 0
        for item in sorted(item for item in found if item[0] > after):
            num_bytes += sum(len(part) for part in item) + 16
            if page and num_bytes > MAX_RECORD_BYTES:
                break
            page.append(item)
        return {}, [msgspec.msgpack.encode(page)]


def _decode(decoder: msgspec.msgpack.Decoder[list[T]], body: memoryview | bytes) -> list[T]:
    try:
        found = decoder.decode(body)
    except msgspec.DecodeError as error:
        raise RecordError(f"not a page of records: {error}") from None
    return found
