"""Asking a worker to open a challenged unit, and reading what it answers: for oneself, or for an auditor that got
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from smartnodes_core.audit import Case
from smartnodes_core.errors import JobError, PeerFault, RecordError, RemoteError, Unavailable
from smartnodes_core.evidence import chain_before, opening_of
from smartnodes_core.jobs import MAX_EARLIER, spec_digest
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.books import AuditedJob
from smartnodes_core.nodes.params import count_in, counts_in
from smartnodes_core.records import MAX_RECORD_BYTES, Challenge, Commitment

MAX_SPEC_BYTES = 64 << 20
MAX_OPENING_BYTES = 8 << 30
SPEC_TIMEOUT_S = 30.0

#: What a worker that opens nothing looks like: it refuses, answers wrongly, is away, or does not have the stage.
NO_ANSWER = (PeerFault, Unavailable, RemoteError, JobError)


@dataclass(frozen=True)
class Inquiry:
    """A challenge and the papers that go with it, each as it was signed."""

    audited: AuditedJob
    commitment: Commitment
    challenge: Challenge
    signed_challenge: bytes
    signed_commitment: bytes
    lists: list[bytes]
    reveals: list[bytes]
    grounds: list[bytes]

    @property
    def key(self) -> str:
        """The name under which the worker keeps the stage."""
        return self.audited.of_stage(self.commitment.stage, self.commitment.replica)


@dataclass(frozen=True)
class Answer:
    """What a worker opened: the case, its signed earlier commitments and opening, the opened bytes; `raw` is all of it
    as it came."""

    case: Case
    earlier: list[bytes]
    signed_opening: bytes
    body: memoryview
    raw: tuple[dict[str, Any], memoryview]


def ask(node: Node, inquiry: Inquiry, timeout_s: float) -> Answer:
    """Have the worker open the unit. Raises one of NO_ANSWER where it refuses, answers wrongly or not at all."""
    spec = spec_of(node, inquiry)
    params = {
        "key": inquiry.key,
        "challenge": inquiry.signed_challenge,
        "lists": inquiry.lists,
        "reveals": inquiry.reveals,
    }
    reply = node.call(
        inquiry.commitment.worker,
        "challenge",
        params,
        [msgspec.msgpack.encode(inquiry.grounds)],
        timeout_s=timeout_s,
        max_body_bytes=MAX_OPENING_BYTES,
    )
    return read(inquiry, spec, reply.params, reply.body)


def read(inquiry: Inquiry, spec: bytes, params: dict[str, Any], body: memoryview) -> Answer:
    """The parts of an answer, each held against what the worker signed. Raises PeerFault for what answers nothing."""
    commitment, challenge = inquiry.commitment, inquiry.challenge
    at = count_in(params, "opening_bytes", len(body))
    end = at + count_in(params, "order_bytes", len(body) - at)
    signed_opening, order = bytes(body[:at]), bytes(body[at:end])
    earlier: list[bytes] = []
    for num_bytes in counts_in(params, "earlier_bytes", MAX_EARLIER, MAX_RECORD_BYTES):
        earlier.append(bytes(body[end : end + num_bytes]))
        end += num_bytes
    opened = body[end:]
    opening = opening_of(signed_opening, commitment.worker, challenge.digest(), order, opened)
    chain = chain_before(commitment, earlier)
    case = Case(inquiry.audited.job.record, spec, commitment, challenge, order, opening.encode(), chain)
    names = ("opening_bytes", "order_bytes", "earlier_bytes")
    return Answer(case, earlier, signed_opening, opened, ({name: params[name] for name in names}, body))


def spec_of(node: Node, inquiry: Inquiry) -> bytes:
    """What the stage runs, fetched once from its worker and checked against the job record."""
    audited, commitment = inquiry.audited, inquiry.commitment
    spec = audited.specs.get(commitment.stage)
    if spec is None:
        reply = node.call(
            commitment.worker, "spec", {"key": inquiry.key}, timeout_s=SPEC_TIMEOUT_S, max_body_bytes=MAX_SPEC_BYTES
        )
        spec = bytes(reply.body)
        if spec_digest(spec) != audited.job.record.specs[commitment.stage]:
            raise RecordError("the worker gave another spec than the job record names")
        audited.specs[commitment.stage] = spec
    return spec
