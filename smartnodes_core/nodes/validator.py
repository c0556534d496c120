"""The validator role: its desks on one node.

`placement.py` opens and closes jobs, `auditing.py` audits them (with `drawing.py` and `challenging.py`), `evidence.py`
re-runs what others found, `rounding.py` (with `voting.py` and `balloting.py`) carries the results on chain,
`resuming.py` goes on after a restart, `job_keeping.py` has records of jobs kept by several. This module only joins
them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smartnodes_core.audit import Auditor, HashChain
from smartnodes_core.chain.proposal import Parameters
from smartnodes_core.dht.node import DhtNode
from smartnodes_core.errors import SmartnodesError
from smartnodes_core.identity import Identity
from smartnodes_core.jobs import Job
from smartnodes_core.journal import Journal
from smartnodes_core.nodes.auditing import AuditDesk
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.evidence import EvidenceDesk
from smartnodes_core.nodes.job_keeping import JobKeeper
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.placement import JobDesk
from smartnodes_core.nodes.resuming import ResumeDesk
from smartnodes_core.nodes.rounding import RoundDesk
from smartnodes_core.records import NodeKey, Signed
from smartnodes_core.reputation import ReputationRule, next_reputation

logger = logging.getLogger(__name__)

#: A validator that leaves finishes its audits for so long.
LEAVE_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class ValidatorSettings:
    """Times of a validator: commitments are gathered `list_interval_s` into one list, which waits `reveal_timeout_s`
    for the other validators'; a worker has `challenge_timeout_s` to open; a validator that owes its part in a
    draw for `withhold_timeout_s` is said to withhold it; the chain is looked at every `poll_s`, and a
    silent proposer is given up after `proposer_timeout_s`. `parameters` are those of the network that this validator
    wants (None: those in force): it proposes them, and signs no others. `reputation_rule` is the network's."""

    list_interval_s: float = 0.25
    reveal_timeout_s: float = 30.0
    challenge_timeout_s: float = 60.0
    withhold_timeout_s: float = 120.0
    poll_s: float = 5.0
    proposer_timeout_s: float = 30.0
    parameters: Parameters | None = None
    reputation_rule: ReputationRule = next_reputation


class ValidatorNode:
    """Keeps jobs, audits workers, votes on rounds. `hash_chain`'s tip must be the one posted on chain, `folder` is
    where evidence of fraud and proofs of equivocation are kept (None: in memory only, for tests), `announced` gives
    what a node announced last, `dht` this node's place in the DHT once it has joined.
    """

    def __init__(
        self,
        node: Node,
        identity: Identity,
        account_key: bytes,
        membership: Membership,
        auditor: Auditor,
        hash_chain: HashChain,
        journal: Journal,
        settings: ValidatorSettings,
        learn_validators: Callable[[], None] = lambda: None,
        folder: Path | None = None,
        announced: Callable[[NodeKey], Signed | None] = lambda node_key: None,
        dht: Callable[[], DhtNode | None] = lambda: None,
    ):
        self.node = node
        self.evidence = EvidenceDesk(node, auditor, folder / "evidence" if folder is not None else None)
        self.audits = AuditDesk(
            node,
            identity,
            auditor,
            self.evidence,
            hash_chain,
            membership.tip_of,
            journal,
            list_interval_s=settings.list_interval_s,
            reveal_timeout_s=settings.reveal_timeout_s,
            challenge_timeout_s=settings.challenge_timeout_s,
            withhold_timeout_s=settings.withhold_timeout_s,
        )
        self._drain_s = settings.withhold_timeout_s + 2 * settings.challenge_timeout_s
        self.jobs = JobDesk(node, membership.network_id, membership.role_of, self.audits.idle_s)
        self.rounds = RoundDesk(
            node,
            membership.chain,
            account_key,
            membership.network_id,
            self.audits,
            membership,
            journal,
            learn_validators=learn_validators,
            poll_s=settings.poll_s,
            proposer_timeout_s=settings.proposer_timeout_s,
            folder=folder / "proofs" if folder is not None else None,
            wanted=settings.parameters,
            announced=announced,
            reputation_rule=settings.reputation_rule,
        )
        self._resuming = ResumeDesk(node, self.jobs, self.audits)
        self.keeper = JobKeeper(
            node, identity, membership.network_id, self.jobs, membership.role_of, self.rounds.books.others, dht
        )
        self.jobs.check_payment = self.rounds.books.escrows.check
        self.jobs.on_new = self.rounds.books.news.opened
        self.jobs.on_open = self._open
        self.jobs.on_close = self._close

    def start(self) -> None:
        """Begin to audit and to vote; the node must be listening."""
        self.audits.start()
        self.evidence.start()
        self.rounds.start()
        self.keeper.start()
        threading.Thread(target=self.resume, name="resume", daemon=True).start()

    def resume(self) -> None:
        """Take up the jobs that this validator audited before it was away."""
        try:
            self.rounds.meet()
            self._resuming.resume(self.rounds.books.others())
        except SmartnodesError as error:
            logger.warning("jobs that were open before are not taken up: %s", error)
        except Exception:
            logger.exception("taking up jobs")

    def leave(self) -> None:
        """Hand the audits of open jobs over, before `stop`; for one that goes for good, or for long."""
        self.audits.leave(LEAVE_TIMEOUT_S)

    def stop(self) -> None:
        """Hand the records of jobs over, and end."""
        self.keeper.stop()
        self.jobs.stop()
        self.rounds.stop()
        self.evidence.stop()
        self.audits.stop()

    def _open(self, job: Job) -> None:
        self.audits.open(job)
        self.keeper.changed(job.id)

    def _close(self, job: Job) -> None:
        """Let the audits under way end, draws that are made anew among them, then release the job's workers; beside
        everything else."""
        entry = self.jobs.entries.get(job.id)
        self.rounds.books.news.closed(job, entry.closing if entry is not None else b"")
        self.keeper.changed(job.id)

        def finish() -> None:
            self.audits.close(job.id, self._drain_s)
            self.jobs.release_workers(job, "completed")

        threading.Thread(target=finish, name="close-job", daemon=True).start()
