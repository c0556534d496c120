"""A validator's part in the draw: fix lists of commitments, reveal preimages, draw what the seeds select.

A list is revealed once every other assigned validator has fixed one with the same commitments, so that nobody can
choose what to list when a preimage is known. The rules are pure and live in `smartnodes_core/audit.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from smartnodes_core.audit import HashChain, Selection, TipTracker
from smartnodes_core.errors import AuthorityError, RecordError, SmartnodesError
from smartnodes_core.identity import Identity, verify
from smartnodes_core.journal import Journal
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.books import AuditBooks, AuditedJob
from smartnodes_core.nodes.draw_books import MAX_LIST
from smartnodes_core.nodes.mailing import Mailer
from smartnodes_core.nodes.params import bytes_in
from smartnodes_core.records import NodeKey, ReceivedList, Reveal, Signed
from smartnodes_core.rpc import allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

#: Calls back: a selection that falls to this validator; commitments that `holder` listed and nobody here holds.
OnSelected = Callable[[AuditedJob, bytes, Selection], None]
Fetch = Callable[[AuditedJob, NodeKey, Iterable[bytes]], None]


class DrawDesk:
    """Fixes and reveals this validator's lists on a thread of its own, and takes those of the others.

    `tip` gives a validator's hash-chain tip on chain. Commitments are gathered for `list_interval_s`; a list that
    another validator has not listed is revealed after `reveal_timeout_s` all the same, so that nobody blocks others.
    """

    def __init__(
        self,
        node: Node,
        identity: Identity,
        books: AuditBooks,
        chain: HashChain,
        tip: Callable[[NodeKey], bytes | None],
        journal: Journal,
        mailer: Mailer,
        fetch: Fetch,
        on_selected: OnSelected,
        list_interval_s: float,
        reveal_timeout_s: float,
    ):
        self._node, self._identity, self._books = node, identity, books
        self._chain, self._tip, self._journal, self._mailer = chain, tip, journal, mailer
        self._fetch, self._on_selected = fetch, on_selected
        self._list_interval_s, self._reveal_timeout_s = list_interval_s, reveal_timeout_s
        self._trackers: dict[tuple[NodeKey, bytes], TipTracker] = {}
        self._next_reveal = 1 + journal.count(f"list/{chain.tip.hex()}/")
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._leaving = False
        #: Told of each job of which a validator revealed something.
        self.on_revealed: Callable[[AuditedJob], None] = lambda audited: None
        self._thread = threading.Thread(target=self._run, name="audit-lists", daemon=True)
        node.serve(self)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def leave(self) -> None:
        """List nothing more: what was listed is revealed."""
        self._leaving = True
        self.wake()

    def wake(self) -> None:
        """There is something to list."""
        self._wake.set()

    # -- own lists and preimages --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._books.lock:
                waits = any(audited.pending for audited in self._books.jobs.values())
            self._wake.wait(self._reveal_timeout_s / 4 if waits else None)
            self._wake.clear()
            self._stopping.wait(self._list_interval_s)  # gathers what arrives together into one list
            try:
                self._fix_lists()
                self._reveal_ready()
            except SmartnodesError as error:
                logger.warning("lists of commitments: %s", error)
            except Exception:
                logger.exception("lists of commitments")

    def _fix_lists(self) -> None:
        with self._books.lock:
            jobs = list(self._books.jobs.values())
        for audited in jobs:
            if self._leaving or self._node.node_key not in audited.assigned:
                audited.unlisted.clear()
            while self._fix_list(audited):
                pass

    def _fix_list(self, audited: AuditedJob) -> bool:
        """Sign a list of what is not listed yet; False where there is nothing."""
        with self._books.lock:
            digests = [digest for digest in audited.unlisted[:MAX_LIST] if digest in audited.commitments]
            if not digests:
                audited.unlisted.clear()
                return False
            index = self._next_reveal
            if index > self._chain.length:
                audited.unlisted.clear()
                logger.error("the hash chain is used up after %d lists: post the tip of a new one", index - 1)
                return False
            received = ReceivedList(
                job=audited.job.id,
                validator=self._node.node_key,
                reveal=index,
                commitments=sorted(digests),
                excluded=list(audited.excluded),
            )
            self._journal.once(f"list/{self._chain.tip.hex()}/{index}", received.digest())
            self._next_reveal += 1
            del audited.unlisted[:MAX_LIST]
            data = self._identity.sign(received).encode()
            audited.store_list(received, data)
            audited.pending.append((index, time.monotonic()))
        self._mailer.post(audited.job.plan.validators, "received_list", {"list": data})
        return True

    def _reveal_ready(self) -> None:
        """Reveal own lists in order, each once every other assigned validator has listed all its commitments."""
        with self._books.lock:
            waiting = sorted(
                (index, at_s, job.job.id) for job in self._books.jobs.values() for index, at_s in job.pending
            )
        for index, fixed_at_s, job_id in waiting:
            with self._books.changed:
                audited = self._books.job(job_id)
                received = audited.lists[(self._node.node_key, index)][0]
                if not audited.is_listed(received) and time.monotonic() - fixed_at_s < self._reveal_timeout_s:
                    return  # later preimages would give this one away
                reveal = Reveal(
                    job=job_id,
                    validator=self._node.node_key,
                    reveal=index,
                    received_list=received.digest(),
                    preimage=self._chain.reveal(index),
                )
                data = self._identity.sign(reveal).encode()
                audited.pending.remove((index, fixed_at_s))
                self._books.changed.notify_all()
                audited.reveals[(self._node.node_key, index)] = (reveal, data)
                self._books.note_reveal(reveal, data)
            self._mailer.post(audited.job.plan.validators, "reveal", {"reveal": data})
            self.draw(audited, received.commitments)

    # -- those of the others ------------------------------------------------------------------------------------------

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_received_list(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """Another assigned validator fixed the list behind its next preimage."""
        self.take_list(bytes_in(params, "list"))

    def take_list(self, data: bytes) -> None:
        """Keep a signed list, and get what it names. Raises AuthorityError, RecordError, BusyError."""
        signed = Signed.decode(data)
        received = verify(signed, ReceivedList)
        with self._books.lock:
            audited = self._books.job(received.job)
            if signed.signer != received.validator or not audited.may_audit(signed.signer):
                raise AuthorityError("a list is signed by an assigned validator")
            audited.store_list(received, data)
            unknown = [digest for digest in received.commitments if digest not in audited.commitments]
        if unknown and received.validator != self._node.node_key:
            self._fetch(audited, received.validator, unknown)
        self._wake.set()

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_reveal(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """Another assigned validator spends a preimage on a list it fixed before."""
        self.take_reveal(bytes_in(params, "reveal"))

    def take_reveal(self, data: bytes) -> None:
        """Keep a signed preimage, and draw. Raises AuthorityError, RecordError."""
        signed = Signed.decode(data)
        reveal = verify(signed, Reveal)
        place = (reveal.validator, reveal.reveal)
        with self._books.lock:
            audited = self._books.job(reveal.job)
            fixed = audited.lists.get(place)
        if signed.signer != reveal.validator or fixed is None or fixed[0].digest() != reveal.received_list:
            raise RecordError("a preimage was revealed for a list that was not fixed before")
        if not self._tracker(reveal.validator).check(reveal.reveal, reveal.preimage):
            raise RecordError("a preimage does not lead to the tip its validator posted on chain")
        with self._books.lock:
            audited.reveals.setdefault(place, (reveal, data))
            given_away = self._books.note_reveal(reveal, data)
        for other, digests in given_away:
            self.draw(other, digests)
            self.on_revealed(other)

    def _tracker(self, validator: NodeKey) -> TipTracker:
        tip = self._tip(validator)  # may ask the chain: never under the lock of the books
        if tip is None:
            raise AuthorityError("this validator has posted no hash-chain tip on chain")
        with self._books.lock:
            return self._trackers.setdefault((validator, tip), TipTracker(tip))

    def resume(self, audited: AuditedJob) -> None:
        """Own lists that were fixed before a restart and not revealed: the others wait for their preimages."""
        own = self._node.node_key
        with self._books.lock:
            waiting = {index for index, _ in audited.pending}
            for key, index in list(audited.lists):
                if key == own and (key, index) not in audited.reveals and index not in waiting:
                    audited.pending.append((index, time.monotonic()))
        self._wake.set()

    # -- draws --------------------------------------------------------------------------------------------------------

    def draw(self, audited: AuditedJob, digests: Iterable[bytes]) -> None:
        """Draw for every commitment whose preimages are all out; hand on the cases that fall to this validator."""
        with self._books.changed:
            for digest in digests:
                for selection in audited.draw(digest):
                    known = (digest, selection.tier, selection.unit) in audited.by_unit  # from before a restart
                    if selection.auditor == self._node.node_key and not known:
                        self._on_selected(audited, digest, selection)
            self._books.changed.notify_all()
