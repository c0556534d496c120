"""A worker's answers to auditors: what a stage runs, and what is behind a commitment that the seed selects.

What the seed does not select is refused without penalty, so that nobody can copy a stage's weights by asking.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
from blake3 import blake3

from smartnodes_core.audit import NUM_ASSIGNED, Opened, TipTracker, check_challenge
from smartnodes_core.audit_grounds import MAX_GROUNDS_BYTES, grounds_of
from smartnodes_core.errors import AuditError, AuthorityError, RecordError
from smartnodes_core.evidence import from_validator
from smartnodes_core.identity import Identity, verify
from smartnodes_core.jobs import JobHandler, StageOfJob
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.ledgers import HeldStages, only_validators_of
from smartnodes_core.nodes.params import bytes_in, bytes_list_in, text_in
from smartnodes_core.records import Challenge, Commitment, NodeKey, Opening, ReceivedList, Reveal, Signed, Verdict
from smartnodes_core.rpc import allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

MAX_VERDICTS = 1000
_decoder = msgspec.msgpack.Decoder(list[bytes])
#: Lists and preimages that come with a challenge: of each assigned validator one.
MAX_PREIMAGES = NUM_ASSIGNED


class OpeningDesk:
    """Serves the calls of auditors; `tip` gives a validator's hash-chain tip as posted on chain."""

    def __init__(
        self,
        node: Node,
        identity: Identity,
        handler: JobHandler,
        tip: Callable[[NodeKey], bytes | None],
        held: HeldStages,
    ):
        self.verdicts: deque[Verdict] = deque(maxlen=MAX_VERDICTS)
        self._own_key, self._identity, self._handler, self._tip, self._held = (
            node.node_key,
            identity,
            handler,
            tip,
            held,
        )
        self._trackers: dict[tuple[NodeKey, bytes], TipTracker] = {}
        node.serve(self)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_spec(self, caller: Peer, params: dict[str, Any], body: memoryview) -> tuple[dict[str, Any], list[bytes]]:
        """What a stage runs, for the validators that audit it."""
        stage = self._held.stage(text_in(params, "key"))
        only_validators_of(stage, caller)
        return {}, [self._handler.spec(stage)]

    @allow(roles=("validator",), max_body_bytes=MAX_GROUNDS_BYTES)
    def rpc_challenge(
        self, caller: Peer, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[bytes | memoryview]]:
        """Open a committed unit, provided that the seed selects it, or the papers in the body do (`audit_grounds.py`);
        otherwise AuditError, without penalty. The auditor asks, or another validator that it has asked to."""
        signed = Signed.decode(bytes_in(params, "challenge"))
        lists, reveals = (bytes_list_in(params, name, MAX_PREIMAGES) for name in ("lists", "reveals"))
        challenge = verify(signed, Challenge)
        stage = self._held.stage(text_in(params, "key"))
        only_validators_of(stage, caller)
        if signed.signer != challenge.auditor:
            raise AuthorityError("a challenge is signed by its auditor")
        commitment = self._committed(stage, challenge)
        self._check_draw(stage, challenge, commitment, lists, reveals, _papers(body))
        with self._held.lock:
            ledger = self._held.ledgers.get(stage.key)
            if ledger is None:
                raise AuditError("the stage was given up")
            ledger.count_opening(challenge.commitment, challenge.unit, caller.node_key)
        opened = self._handler.open(stage, commitment, challenge.tier, challenge.unit)
        opening = Opening(challenge=challenge.digest(), commitment=challenge.commitment, items=opened.items)
        signable = Opened(
            opening=opening.encode(),
            body_digest=blake3(opened.body).digest(),
            order_digest=blake3(opened.order).digest(),
        )
        signed_opening = self._identity.sign(signable).encode()
        with self._held.lock:
            before = ledger.before(challenge.commitment, opened.num_earlier)
        earlier = [self._identity.sign(one).encode() for one in before]
        sizes = {
            "opening_bytes": len(signed_opening),
            "order_bytes": len(opened.order),
            "earlier_bytes": [len(one) for one in earlier],
        }
        return sizes, [signed_opening, opened.order, *earlier, opened.body]

    def _committed(self, stage: StageOfJob, challenge: Challenge) -> Commitment:
        with self._held.lock:
            ledger = self._held.ledgers.get(stage.key)
            commitment = ledger.commitments.get(challenge.commitment) if ledger else None
        if commitment is None:
            raise AuditError("no such commitment is held: its audit window has passed, or it was never made")
        return commitment

    def _check_draw(
        self,
        stage: StageOfJob,
        challenge: Challenge,
        commitment: Commitment,
        lists: list[bytes],
        reveals: list[bytes],
        papers: list[bytes],
    ) -> None:
        grounds = grounds_of(papers, stage.job, commitment)
        assigned = grounds.assigned(stage.job)
        tips = {key: tip for key in assigned if (tip := self._tip(key)) is not None}
        with self._held.lock:
            trackers = {key: self._trackers.setdefault((key, tip), TipTracker(tip)) for key, tip in tips.items()}
        check_challenge(
            challenge,
            commitment,
            stage.job.record.audit,
            assigned,
            [from_validator(item, ReceivedList) for item in lists],
            [from_validator(item, Reveal) for item in reveals],
            trackers,
            grounds.excluded,
            grounds.forced,
        )

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_verdict(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """An auditor tells the worker what it found."""
        signed = Signed.decode(bytes_in(params, "verdict"))
        verdict = verify(signed, Verdict)
        stages = self._held.of_job(verdict.job)
        if not signed.signer == verdict.auditor == caller.node_key or verdict.worker != self._own_key:
            raise AuthorityError("a verdict is signed and sent by its auditor, to the worker it is about")
        if not any(verdict.auditor in stage.job.plan.validators for stage in stages):
            return  # a job that has ended
        self.verdicts.append(verdict)
        if verdict.finding != "honest":
            logger.warning("audit of step %s: %s (%s)", verdict.step, verdict.finding, verdict.reason)


def _papers(body: memoryview) -> list[bytes]:
    """The papers that come with a challenge. Raises RecordError."""
    try:
        return _decoder.decode(body) if len(body) else []
    except msgspec.DecodeError as error:
        raise RecordError(f"not a list of papers: {error}") from None
