"""When a worker opens nothing to its auditor: the job's other validators ask too.

One whose way to the worker is not broken passes on what it opens; one that gets nothing either signs that. With more
than half of the validators saying so, the auditor among them, it is silence (`audit_proofs.py`), never on one's word.

Everybody is told of a challenge when it is made, and refuses to bear out what was asked for when the worker did not
have to hold it any more.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from dataclasses import replace
from typing import Any

from smartnodes_core.audit import Auditor, Selection
from smartnodes_core.audit_proofs import majority
from smartnodes_core.errors import AuditError, AuthorityError, RecordError, SmartnodesError
from smartnodes_core.identity import Identity, verify
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.books import AuditBooks, AuditedJob
from smartnodes_core.nodes.inquiry import MAX_OPENING_BYTES, NO_ANSWER, Answer, Inquiry, ask, read, spec_of
from smartnodes_core.nodes.mailing import Mailer
from smartnodes_core.nodes.params import bytes_in
from smartnodes_core.nodes.polling import ask_all
from smartnodes_core.records import Challenge, NodeKey, Signed, Silence, Unanswered
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

#: Challenges of others that are remembered.
MAX_NOTICED = 4096
#: How often a worker is asked for one unit on another's behalf: an opening may be large.
MAX_ASKED = 3
#: How long a draw may take from its auditor's books to those of the others.
DRAW_WAIT_S = 10.0


class SecondDesk:
    """Asks on behalf of auditors, and has others ask for this one. A worker has `timeout_s` to open."""

    def __init__(
        self, node: Node, identity: Identity, auditor: Auditor, books: AuditBooks, mailer: Mailer, timeout_s: float
    ):
        self._node, self._identity, self._auditor, self._books = node, identity, auditor, books
        self._mailer, self._timeout_s = mailer, timeout_s
        self._lock = threading.Lock()
        self._noticed: OrderedDict[bytes, bool] = OrderedDict()  # whether the worker had to hold the unit then
        self._asked: Counter[bytes] = Counter()
        self._examining = threading.Lock()
        node.serve(self)

    # -- for this auditor ---------------------------------------------------------------------------------------------

    def announce(self, inquiry: Inquiry) -> bool:
        """Tell the job's validators that a challenge is made now; False where the worker need not hold the unit any
        more, since so many steps followed."""
        self._mailer.post(inquiry.audited.job.plan.validators, "challenged", {"challenge": inquiry.signed_challenge})
        with self._books.lock:
            return not inquiry.audited.is_past(inquiry.commitment)

    def ask_others(self, inquiry: Inquiry, complaint: str) -> Answer | list[bytes]:
        """What the worker opens to another validator; else the signed statements of those who got nothing either.
        `complaint` is what was wrong with the answer here, if there was one."""
        others = [each for each in inquiry.audited.job.plan.validators if each != self._node.node_key]
        needed = majority(len(others) + 1) - 1

        def ask_one(validator: NodeKey) -> Answer | bytes | None:
            try:
                reply = self._node.call(
                    validator,
                    "second",
                    {"challenge": inquiry.signed_challenge, "complaint": complaint[:200].encode()},
                    timeout_s=2 * self._timeout_s,
                    max_body_bytes=MAX_OPENING_BYTES,
                )
                if "statement" in reply.params:
                    return self._statement(validator, inquiry, bytes_in(reply.params, "statement"))
                return read(inquiry, spec_of(self._node, inquiry), reply.params, reply.body)
            except SmartnodesError as error:
                logger.info("%s bears out no silence: %s", validator.hex()[:8], error)
            except Exception:
                logger.exception("a validator's word on a silence")
            return None

        def is_enough(found: dict[NodeKey, Answer | bytes | None]) -> bool:
            said = [each for each in found.values() if isinstance(each, bytes)]
            return any(isinstance(each, Answer) for each in found.values()) or len(said) >= needed

        found = ask_all(others, ask_one, is_enough, 2 * self._timeout_s, 1.0)
        for each in found.values():
            if isinstance(each, Answer):
                return each
        return [each for each in found.values() if isinstance(each, bytes)]

    def _statement(self, validator: NodeKey, inquiry: Inquiry, data: bytes) -> bytes:
        signed = Signed.decode(data)
        statement = verify(signed, Unanswered)
        asked = (inquiry.audited.job.id, inquiry.challenge.digest(), validator)
        if signed.signer != validator or (statement.job, statement.challenge, statement.validator) != asked:
            raise RecordError("a statement about something else")
        return data

    def silence(self, inquiry: Inquiry, statements: list[bytes]) -> Silence | None:
        """The proof, where more than half of the validators say so."""
        audited, commitment = inquiry.audited, inquiry.commitment
        if len(statements) + 1 < majority(len(audited.job.plan.validators)):
            return None
        with self._books.lock:
            newest = max(audited.steps.get((commitment.stage, commitment.replica), [commitment.step])[-1:])
        return Silence(
            job=audited.job.id,
            replica=commitment.replica,
            stage=commitment.stage,
            step=commitment.step,
            commitment=commitment.digest(),
            challenge=inquiry.challenge.digest(),
            worker=commitment.worker,
            auditor=self._node.node_key,
            forced_from=max(newest, commitment.step) + 1,
            statements=statements,
        )

    # -- for others ---------------------------------------------------------------------------------------------------

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_challenged(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """An auditor challenges a worker now."""
        self._notice(_challenge_of(caller, bytes_in(params, "challenge")))

    def _notice(self, challenge: Challenge) -> bool:
        """Whether the worker had to hold the unit when this validator first heard of the challenge."""
        with self._books.lock:
            audited = self._books.job(challenge.job)
            commitment = audited.commitments.get(challenge.commitment)
            in_time = commitment is None or not audited.is_past(commitment)
        with self._lock:
            in_time = self._noticed.setdefault(challenge.digest(), in_time)
            while len(self._noticed) > MAX_NOTICED:
                self._asked.pop(self._noticed.popitem(last=False)[0], None)
        return in_time

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_second(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """Ask the worker what an auditor's challenge names: its answer, or a signed statement that none came. Raises
        AuditError for what was not drawn, or was asked for too late."""
        data = bytes_in(params, "challenge")
        challenge, complaint = _challenge_of(caller, data), bytes_in(params, "complaint", 1024)
        if not self._notice(challenge):
            raise AuditError("the challenge was made when the worker had to hold the unit no more")
        inquiry = self._inquiry(challenge, data)
        with self._lock:
            self._asked[challenge.digest()] += 1
            if self._asked[challenge.digest()] > MAX_ASKED:
                raise AuditError(f"this was asked for {MAX_ASKED} times already")
        try:
            answer = ask(self._node, inquiry, self._timeout_s)
            if not complaint or self._is_enough(answer):
                answered, opened = answer.raw
                return answered, [opened]
        except NO_ANSWER as error:
            logger.info("nothing was opened here either: %s", error)
        statement = Unanswered(job=challenge.job, challenge=challenge.digest(), validator=self._node.node_key)
        return {"statement": self._identity.sign(statement).encode()}, []

    def _inquiry(self, challenge: Challenge, signed_challenge: bytes) -> Inquiry:
        """The challenge as it follows from the draw, which may be on its way here still."""
        selection = Selection(challenge.tier, challenge.unit, challenge.auditor)

        def drawn() -> Inquiry | None:
            return inquiry_of(self._books.job(challenge.job), challenge.commitment, selection)

        with self._books.changed:
            self._books.changed.wait_for(lambda: drawn() is not None, DRAW_WAIT_S)
            found = drawn()
        if found is None or found.challenge != challenge:
            raise AuditError("the challenge does not follow from what is held here of the draw")
        return replace(found, signed_challenge=signed_challenge)

    def _is_enough(self, answer: Answer) -> bool:
        """Whether an answer of which the auditor complains is one."""
        with self._examining:
            return self._auditor.examine(answer.case, answer.body)[0] != "silent"


def inquiry_of(audited: AuditedJob, digest: bytes, selection: Selection) -> Inquiry | None:
    """The challenge that follows from a draw, not yet signed; None where it was not drawn. Under the lock of the
    books."""
    if selection not in audited.drawn.get(digest, ()):
        return None
    commitment = audited.commitments[digest]
    grounds = audited.grounds(digest)
    for draw in audited.draws(digest):
        forced = audited.forced(digest)
        plain = selection in audited.selections(digest, draw, frozenset())
        if not plain and selection not in audited.selections(digest, draw, forced):
            continue
        challenge = Challenge(
            job=audited.job.id,
            commitment=digest,
            tier=selection.tier,  # type: ignore[arg-type]
            unit=selection.unit,
            seed=draw.seed(digest),
            reveals=[reveal.digest() for reveal, _ in draw.reveals.values()],
            auditor=selection.auditor,
        )
        shut_out = audited.shut_out(draw.excluded)
        return Inquiry(
            audited=audited,
            commitment=commitment,
            challenge=challenge,
            signed_challenge=b"",
            signed_commitment=audited.signed.get(digest, b""),
            lists=[data for _, data in draw.lists.values()],
            reveals=[data for _, data in draw.reveals.values()],
            grounds=shut_out if plain else [*shut_out, *grounds],
        )
    return None


def _challenge_of(caller: Peer, data: bytes) -> Challenge:
    signed = Signed.decode(data)
    challenge = verify(signed, Challenge)
    if not signed.signer == challenge.auditor == caller.node_key:
        raise AuthorityError("a challenge is signed and sent by its auditor")
    return challenge
