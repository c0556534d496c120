"""Validators that keep a draw from being made: asked for what they owe, then shut out when most say that they owe it.

Who waits too long for somebody's list or preimage asks all assigned validators for the draw's papers, since messages
get lost, and says so in a signed `Absence` only when they are nowhere. With the word of more than half of the others
the absent one is out of the job's draws (`audit_proofs.Withholding`); the next in rank takes its place, and what was
not drawn is drawn anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from smartnodes_core.audit_proofs import majority
from smartnodes_core.errors import AuthorityError, SmartnodesError
from smartnodes_core.identity import Identity, verify
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.books import AuditBooks, AuditedJob
from smartnodes_core.nodes.mailing import Mailer
from smartnodes_core.nodes.params import bytes_in, bytes_list_in, digest_in
from smartnodes_core.nodes.polling import ask_all
from smartnodes_core.nodes.proving import ProofDesk
from smartnodes_core.records import Absence, NodeKey, Signed, Withholding
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 10.0
#: Draws of one job that are asked after at a time: whoever withholds one, withholds more.
MAX_ASKED = 4


class WithholdingDesk:
    """`take_draw(list, reveal)` takes a list with its preimage (or nothing) as another shows them; a draw is missed
    `timeout_s` after its commitment came."""

    def __init__(
        self,
        node: Node,
        identity: Identity,
        books: AuditBooks,
        proofs: ProofDesk,
        mailer: Mailer,
        take_draw: Callable[[bytes, bytes], None],
        timeout_s: float,
    ):
        self._node, self._identity, self._books, self._proofs = node, identity, books, proofs
        self._mailer, self._take_draw, self._timeout_s = mailer, take_draw, timeout_s
        self._said: set[tuple[bytes, NodeKey]] = set()
        self._heard: dict[tuple[bytes, NodeKey], dict[NodeKey, bytes]] = {}  # by job and who is absent: statements
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="absences", daemon=True)
        node.serve(self)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._stopping.wait(self._timeout_s / 4):
            with self._books.lock:
                jobs = list(self._books.jobs.values())
            for audited in jobs:
                try:
                    self._look(audited)
                except SmartnodesError as error:
                    logger.warning("draws that are missed: %s", error)
                except Exception:
                    logger.exception("draws that are missed")

    def _look(self, audited: AuditedJob) -> None:
        """Ask for draws that are missed, and say who owes them."""
        missed = self._missed(audited)
        for digest in missed:
            self._ask(audited, digest)
        absent = {each for digest in missed for each in self._owing(audited, digest)}
        for validator in sorted(absent):
            self._say(audited, validator)

    def _missed(self, audited: AuditedJob) -> list[bytes]:
        now_s = time.monotonic()
        with self._books.lock:
            found = [
                digest
                for digest in audited.commitments
                if digest not in audited.drawn
                and now_s - max(audited.came_at_s[digest], audited.excluded_at_s) > self._timeout_s
            ]
        return found[:MAX_ASKED]

    def _owing(self, audited: AuditedJob, digest: bytes) -> list[NodeKey]:
        """Who keeps a draw from being made; nobody while this validator owes its own part."""
        with self._books.lock:
            if digest in audited.drawn or digest not in audited.commitments:
                return []
            missing = audited.missing_from(digest)
        return [] if self._node.node_key in missing else missing

    def _ask(self, audited: AuditedJob, digest: bytes) -> None:
        """What the assigned validators hold of a draw: their own parts, and those of the others."""

        def ask(validator: NodeKey) -> None:
            try:
                params = {"job": audited.job.id, "commitment": digest}
                reply = self._node.call(validator, "fetch_draw", params, timeout_s=ASK_TIMEOUT_S)
                lists = bytes_list_in(reply.params, "lists", 16)
                reveals = bytes_list_in(reply.params, "reveals", 16)
                for listed, revealed in zip(lists, reveals, strict=False):
                    self._take_draw(listed, revealed)
            except SmartnodesError as error:
                logger.info("no papers of a draw from %s: %s", validator.hex()[:8], error)
            except Exception:
                logger.exception("papers of a draw from %s", validator.hex()[:8])

        others = [each for each in audited.assigned if each != self._node.node_key]
        ask_all(others, ask, lambda found: False, ASK_TIMEOUT_S, 0.0)

    def _say(self, audited: AuditedJob, absent: NodeKey) -> None:
        """Tell the job's validators once that one is absent."""
        place = (audited.job.id, absent)
        if place in self._said:
            return
        self._said.add(place)
        logger.warning("validator %s keeps draws of job %s from being made", absent.hex()[:8], place[0].hex()[:8])
        statement = Absence(job=audited.job.id, absent=absent, validator=self._node.node_key)
        data = self._identity.sign(statement).encode()
        self._take(statement, data)
        self._mailer.post(audited.job.plan.validators, "absence", {"absence": data})

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_absence(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """Another validator of the job misses a third one's part in a draw."""
        data = bytes_in(params, "absence")
        signed = Signed.decode(data)
        statement = verify(signed, Absence)
        if not signed.signer == statement.validator == caller.node_key:
            raise AuthorityError("an absence is signed and sent by who misses somebody")
        self._take(statement, data)

    def _take(self, statement: Absence, data: bytes) -> None:
        """Keep a statement; with enough of them there is a proof."""
        with self._books.lock:
            audited = self._books.job(statement.job)
            validators = audited.job.plan.validators
            if not {statement.validator, statement.absent} <= set(validators) or statement.absent in audited.excluded:
                return
            heard = self._heard.setdefault((statement.job, statement.absent), {})
            heard[statement.validator] = data
            said = [heard[each] for each in sorted(heard) if each != statement.absent]
        if len(said) >= majority(len(validators) - 1):
            self._proofs.take(Withholding(job=statement.job, absent=statement.absent, statements=said))

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_fetch_draw(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """Lists that hold a commitment, and what was revealed for each (empty: nothing yet)."""
        job, digest = digest_in(params, "job"), digest_in(params, "commitment")
        with self._books.lock:
            audited = self._books.job(job)
            places = [
                (key, index)
                for listed in audited.listed_by.get(digest, {}).values()
                for key, index in sorted(listed.items())
            ][:16]
            lists = [audited.lists[place][1] for place in places]
            reveals = [audited.reveals[place][1] if place in audited.reveals else b"" for place in places]
        return {"lists": lists, "reveals": reveals}, []
