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
from dataclasses import dataclass, replace

from smartnodes_core.audit import Auditor, Case, Selection
from smartnodes_core.errors import SmartnodesError
from smartnodes_core.identity import Identity, verify
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.books import AuditBooks, AuditedJob
from smartnodes_core.nodes.claim_books import SecondVersionError
from smartnodes_core.nodes.evidence import EvidenceDesk, Signatures
from smartnodes_core.nodes.inquiry import NO_ANSWER, Answer, Inquiry, ask
from smartnodes_core.nodes.seconding import SecondDesk, inquiry_of
from smartnodes_core.records import NO_DIGEST, Challenge, Commitment, Digest, Finding, Signed, Silence

logger = logging.getLogger(__name__)

NUM_EXAMINERS = 3


@dataclass(frozen=True)
class Found:
    """What an audit came to: the challenge, the finding with its reason, the evidence kept (or NO_DIGEST), and of a
    silence the signed proof."""

    commitment: Commitment
    challenge: Challenge
    finding: Finding
    reason: str
    evidence: Digest
    silence: bytes = b""


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
        seconds: SecondDesk,
        timeout_s: float,
    ):
        self._seconds = seconds
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
        with self._books.lock:
            drawn = inquiry_of(audited, commitment.digest(), case.selection)
        if drawn is None:
            return  # settled meanwhile, or the job is forgotten
        inquiry = replace(drawn, signed_challenge=self._identity.sign(drawn.challenge).encode())
        in_time = self._seconds.announce(inquiry)
        finding, reason, answer = self._ask(inquiry)
        evidence, silence = NO_DIGEST, b""
        if finding == "silent":
            if in_time:
                finding, reason, answer, silence = self._ask_others(inquiry, reason, answer)
            else:
                finding, reason = "inconclusive", f"asked for after its audit window: {reason}"
        if finding == "silent":
            evidence = verify(Signed.decode(silence), Silence).digest()
        if finding == "fraudulent" and answer is not None:
            signatures = Signatures(
                audited.job.signed_record,
                audited.job.signed_plan,
                inquiry.signed_commitment,
                answer.earlier,
                inquiry.lists,
                inquiry.reveals,
                inquiry.grounds,
                answer.signed_opening,
            )
            evidence = self._evidence.keep(answer.case, signatures, answer.body)
        self._on_found(audited, Found(commitment, inquiry.challenge, finding, reason, evidence, silence))

    def _ask(self, inquiry: Inquiry) -> tuple[Finding, str, Answer | None]:
        """What comes of asking the worker; `silent` stands for no answer, until others have asked too."""
        try:
            answer = ask(self._node, inquiry, self._timeout_s)
            self._compare_versions(answer.earlier)
        except SecondVersionError as fault:
            return "inconclusive", f"not opened: {fault}", None
        except NO_ANSWER as error:
            return "silent", f"not opened: {error}", None
        except SmartnodesError as error:
            return "inconclusive", f"the opening could not be taken: {error}", None
        return *self._compare(answer.case, answer.body), answer

    def _ask_others(
        self, inquiry: Inquiry, reason: str, answer: Answer | None
    ) -> tuple[Finding, str, Answer | None, bytes]:
        """Whether the worker is silent to all, with the signed proof; else the finding on what it opened to another."""
        found = self._seconds.ask_others(inquiry, reason if answer is not None else "")
        if isinstance(found, Answer):
            finding, reason = self._compare(found.case, found.body)
            if finding != "silent":
                return finding, f"{reason} (opened through another validator)", found, b""
            found = []
        silence = self._seconds.silence(inquiry, found)
        if silence is None:
            return "inconclusive", f"{reason}; borne out by {len(found)} other validators only", None, b""
        return "silent", reason, None, self._identity.sign(silence).encode()

    def _compare(self, case: Case, body: memoryview) -> tuple[Finding, str]:
        with self._examining:
            try:
                return self._auditor.examine(case, body)
            except Exception as error:  # an auditor must not raise; if it does, nothing is known of the worker
                logger.exception("an auditor failed")
                return "inconclusive", f"the audit could not be run: {type(error).__name__}"

    def _compare_versions(self, earlier: list[bytes]) -> None:
        """Raises SecondVersionError where the worker opens another commitment of a step than it published."""
        for data in earlier:
            try:
                self._take_commitment(data)
            except SecondVersionError:
                raise
            except SmartnodesError as error:  # settled long since, or of a job that has ended
                logger.debug("a commitment that was opened is not kept: %s", error)
