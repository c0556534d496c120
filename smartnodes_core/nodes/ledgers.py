"""What a worker remembers of its stages: commitments, each naming the one before, and who needs the stage still."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from smartnodes_core.errors import AuditError, AuthorityError, JobError
from smartnodes_core.jobs import MAX_EARLIER, StageOfJob
from smartnodes_core.records import Commitment, NodeKey, Unit
from smartnodes_core.transport.base import Peer

#: Commitments kept beyond the audit window, for challenges that are under way.
SPARE_COMMITMENTS = MAX_EARLIER
#: How often one unit is opened to one validator: again when an answer was lost, not without end.
MAX_OPENINGS = 3


class Ledger:
    """The commitments of one stage; the newest are kept for challenges. Guarded by the worker's lock."""

    def __init__(self, stage: StageOfJob):
        self._stage = stage
        self._tip = stage.job.id
        self._limit = stage.job.record.audit.window_steps + SPARE_COMMITMENTS
        self._openings: dict[bytes, Counter[tuple[int, NodeKey]]] = {}
        self.commitments: dict[bytes, Commitment] = {}
        self.released_by: set[NodeKey] = set()
        self.timer: threading.Timer | None = None
        self.waits_for_author = False  # the timer runs because the author was lost

    def next(self, worker: NodeKey, content: dict[str, Any]) -> Commitment:
        """The commitment with this content, chained to the last one that was kept."""
        stage = self._stage
        return Commitment(
            job=stage.job.id,
            plan_version=stage.job.plan.version,
            replica=stage.replica,
            stage=stage.stage,
            worker=worker,
            previous=self._tip,
            **{**content, "units": [Unit(**unit) for unit in content["units"]]},
        )

    def keep(self, commitment: Commitment) -> None:
        """It is signed: the next one names it."""
        self._tip = commitment.digest()
        self.commitments[self._tip] = commitment
        while len(self.commitments) > self._limit:
            oldest = next(iter(self.commitments))
            del self.commitments[oldest]
            self._openings.pop(oldest, None)

    def before(self, digest: bytes, count: int) -> list[Commitment]:
        """The `count` commitments before one, oldest first; fewer where fewer are held."""
        held = list(self.commitments)
        at = held.index(digest)
        return [self.commitments[earlier] for earlier in held[max(0, at - min(count, MAX_EARLIER)) : at]]

    def count_opening(self, digest: bytes, unit: int, validator: NodeKey) -> None:
        """Raises AuditError when a unit has been opened often enough: each opening costs much more than asking."""
        opened = self._openings.setdefault(digest, Counter())
        if opened[(unit, validator)] >= MAX_OPENINGS:
            raise AuditError(f"this unit was opened to this validator {MAX_OPENINGS} times already")
        opened[(unit, validator)] += 1

    def release(self, validator: NodeKey) -> tuple[bool, bool]:
        """A validator needs the stage no more: whether none does, and whether so many say so that one is honest."""
        validators = set(self._stage.job.plan.validators)
        self.released_by.add(validator)
        released = self.released_by & validators
        credible = len(released) > (len(validators) - 1) // 3
        self.waits_for_author &= not credible  # the job has ended, whoever calls
        return released == validators, credible


class HeldStages:
    """The stages that a worker runs, with their ledgers. Guarded by `lock`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stages: dict[str, StageOfJob] = {}
        self.ledgers: dict[str, Ledger] = {}

    def stage(self, key: str) -> StageOfJob:
        """The stage with this key. Raises JobError where it is not run here."""
        with self.lock:
            stage = self.stages.get(key)
        if stage is None:
            raise JobError("this worker does not run that stage: the job ended, or was never assigned here")
        return stage

    def of_job(self, job_id: bytes) -> list[StageOfJob]:
        """The stages of one job."""
        with self.lock:
            return [stage for stage in self.stages.values() if stage.job.id == job_id]


def only_validators_of(stage: StageOfJob, caller: Peer) -> None:
    """Raises AuthorityError for others than the validators of the job's plan."""
    if caller.node_key not in stage.job.plan.validators:
        raise AuthorityError("only a validator of the job's plan audits its stages")
