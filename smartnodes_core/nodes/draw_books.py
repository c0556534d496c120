"""What a validator holds of one job's draws: lists, preimages, who takes part, what was drawn.

Part of the books (`books.py`), guarded by their lock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from smartnodes_core.audit import CHAIN_LENGTH, Selection, gives_away, preimage_of, seed_of, select
from smartnodes_core.audit_grounds import assigned_without, departed_in
from smartnodes_core.errors import BusyError, RecordError
from smartnodes_core.jobs import Job
from smartnodes_core.records import Commitment, NodeKey, ReceivedList, Reveal, Signed

#: Plans of a job that are remembered after they were replaced: audits of what was done under them end soon.
MAX_EARLIER_PLANS = 16
#: Commitments in one list: three lists and their preimages fit the header of a challenge.
MAX_LIST = 256
#: Of one validator and job: lists that wait for their preimage, and listed digests of which nobody has the commitment.
MAX_UNREVEALED, MAX_UNKNOWN = 1024, 1024

#: Validators that were shut out of a draw, sorted: with other ones, another draw is made.
Excluded = tuple[NodeKey, ...]


@dataclass(frozen=True)
class Draw:
    """A draw for one commitment that is complete: by validator, in order, its list and the preimage behind it, each as
    a record and as it was signed."""

    excluded: Excluded
    lists: dict[NodeKey, tuple[ReceivedList, bytes]]
    reveals: dict[NodeKey, tuple[Reveal, bytes]]

    def seed(self, digest: bytes) -> bytes:
        """The seed of the commitment with this digest."""
        shown = {key: preimage_of(self.reveals[key][0], received.reveal) for key, (received, _) in self.lists.items()}
        return seed_of(shown, digest)


@dataclass(eq=False)
class DrawBook:
    """See the module. `excluded` are the validators that take no part any more, `newest` each one's last preimage,
    whatever job it was for: it gives away all before it."""

    job: Job
    assigned: list[NodeKey]
    commitments: dict[bytes, Commitment] = field(default_factory=dict)
    earlier: dict[int, Job] = field(default_factory=dict)  # with the plans before, by their versions
    excluded: Excluded = ()
    excluded_at_s: float = 0.0
    departures: dict[NodeKey, bytes] = field(default_factory=dict)  # of validators that leave, as they signed it
    unlisted: list[bytes] = field(default_factory=list)
    lists: dict[tuple[NodeKey, int], tuple[ReceivedList, bytes]] = field(default_factory=dict)
    listed_by: dict[bytes, dict[Excluded, dict[NodeKey, int]]] = field(default_factory=dict)
    unknown: dict[NodeKey, set[bytes]] = field(default_factory=dict)  # listed, but of no commitment that is held
    reveals: dict[tuple[NodeKey, int], tuple[Reveal, bytes]] = field(default_factory=dict)
    newest: dict[NodeKey, tuple[Reveal, bytes]] = field(default_factory=dict)
    pending: list[tuple[int, float]] = field(default_factory=list)  # own lists not revealed, and when they were fixed
    drawn: dict[bytes, list[Selection]] = field(default_factory=dict)
    closed: bool = False
    closed_at_s: float = 0.0

    @property
    def is_drawn(self) -> bool:
        """Whether every commitment has been drawn for."""
        return len(self.drawn) == len(self.commitments)

    def store_list(self, received: ReceivedList, data: bytes) -> None:
        """Keep the list behind a validator's preimage. Raises RecordError, BusyError."""
        validator, digests = received.validator, received.commitments
        before = self.lists.get((validator, received.reveal))
        if before is not None:
            if before[0] != received:
                raise RecordError(f"two lists for preimage {received.reveal} of one validator")
            return
        if not 0 < len(set(digests)) == len(digests) <= MAX_LIST or not 0 < received.reveal <= CHAIN_LENGTH:
            raise RecordError(f"a list names 1 to {MAX_LIST} commitments, each once, and a preimage of the chain")
        if not set(received.excluded) <= set(self.excluded) or sorted(set(received.excluded)) != received.excluded:
            raise RecordError("a list is for a draw without validators of whom it is not known here that they withhold")
        if self.closed and not all(digest in self.commitments for digest in digests):
            raise RecordError("the job has ended")
        unrevealed = sum(key == validator and (key, index) not in self.reveals for key, index in self.lists)
        unknown = self.unknown.get(validator, set()).union(d for d in digests if d not in self.commitments)
        if unrevealed >= MAX_UNREVEALED or len(unknown) > MAX_UNKNOWN:
            raise BusyError(f"{unrevealed} lists wait for their preimages, {len(unknown)} commitments are not known")
        self.unknown[validator] = unknown
        self.lists[(validator, received.reveal)] = (received, data)
        for digest in digests:
            listed = self.listed_by.setdefault(digest, {}).setdefault(tuple(received.excluded), {})
            listed.setdefault(validator, received.reveal)  # a second list, made when the draw is known, changes nothing

    def is_used(self, received: ReceivedList) -> bool:
        """Whether a list is the one of its validator that counts for some commitment that is held."""
        excluded, place = tuple(received.excluded), received.validator
        return any(
            self.listed_by.get(digest, {}).get(excluded, {}).get(place) == received.reveal
            for digest in received.commitments
        )

    def go_on_with(self, job: Job) -> None:
        """A newer plan is in force."""
        self.earlier[self.job.plan.version] = self.job
        while len(self.earlier) > MAX_EARLIER_PLANS:
            del self.earlier[min(self.earlier)]
        self.job, self.assigned = job, assigned_without(job, self.excluded)

    def under(self, plan_version: int) -> Job:
        """The job with the plan of this version. Raises RecordError for one that is not remembered."""
        job = self.job if plan_version == self.job.plan.version else self.earlier.get(plan_version)
        if job is None:
            raise RecordError(f"plan {plan_version} was replaced long ago by plan {self.job.plan.version}")
        return job

    def is_listed(self, received: ReceivedList) -> bool:
        """Whether all who are assigned with this one's signer have listed what it lists."""
        excluded = tuple(received.excluded)
        needed = len(assigned_without(self.job, excluded))
        listed = [self.listed_by.get(digest, {}).get(excluded, {}) for digest in received.commitments]
        return all(len(validators) >= needed for validators in listed)

    def reveals_for(self, digest: bytes, excluded: Excluded = ()) -> dict[NodeKey, tuple[Reveal, bytes]]:
        """By validator, the preimage that it spent on its first list that holds `digest`, or a later one."""
        found = {}
        for key, index in self.listed_by.get(digest, {}).get(excluded, {}).items():
            shown = self.reveals.get((key, index)) or self.newest.get(key)
            if shown is not None and gives_away(shown[0], self.lists[(key, index)][0]):
                found[key] = shown
        return found

    def draws(self, digest: bytes) -> list[Draw]:
        """The draws of a commitment of which all lists and preimages are out, the first without anybody excluded."""
        found = []
        for excluded in sorted(self.listed_by.get(digest, {}), key=len):
            reveals = self.reveals_for(digest, excluded)
            if reveals and sorted(reveals) == assigned_without(self.job, excluded):
                listed = self.listed_by[digest][excluded]
                lists = {key: self.lists[(key, listed[key])] for key in sorted(reveals)}
                found.append(Draw(excluded, lists, {key: reveals[key] for key in sorted(reveals)}))
        return found

    def selections(self, digest: bytes, draw: Draw, forced: frozenset[int]) -> list[Selection]:
        """What a draw selects of a commitment that is held."""
        num_units = len(self.commitments[digest].units)
        auditors = sorted(draw.lists)
        return select(draw.seed(digest), self.job.record.audit, num_units, auditors, forced)

    def exclude(self, absent: NodeKey) -> None:
        """Make the draws without a validator: what is not drawn is to be listed again."""
        if absent in self.excluded:
            return
        self.excluded = tuple(sorted((*self.excluded, absent)))
        self.excluded_at_s = time.monotonic()
        self.assigned = assigned_without(self.job, self.excluded)
        self.unlisted = list(dict.fromkeys([*self.unlisted, *(d for d in self.commitments if d not in self.drawn)]))

    def add_departure(self, data: bytes) -> bool:
        """Keep a validator's signed word that it leaves; False where it is held. Raises RecordError, SignatureError."""
        validator = departed_in(Signed.decode(data), self.job)
        if validator is None:
            raise RecordError("this is no departure")
        if validator in self.departures:
            return False
        self.departures[validator] = data
        return True

    def honour_departures(self) -> bool:
        """Make draws without those who leave, once they have revealed what they owe: else one could leave when it sees
        what it would draw. Whether anybody left; the last one never does."""
        before = self.excluded
        for validator in sorted(self.departures):
            is_last = len(self.excluded) + 1 >= len(self.job.plan.validators)
            if not is_last and validator not in self.excluded and not self.owes(validator):
                self.exclude(validator)
        return self.excluded != before

    def may_audit(self, validator: NodeKey) -> bool:
        """Whether it is assigned, or was before it was shut out."""
        return validator in self.assigned or validator in self.excluded

    def owes(self, validator: NodeKey) -> bool:
        """Whether a preimage is not out that a validator owes for a list."""
        for (key, index), (received, _) in self.lists.items():
            shown = self.reveals.get((key, index)) or self.newest.get(key)
            if key == validator and (shown is None or not gives_away(shown[0], received)):
                return True
        return False

    def missing_from(self, digest: bytes) -> list[NodeKey]:
        """The assigned validators whose list or preimage for a commitment is not there."""
        shown = self.reveals_for(digest, self.excluded)
        return [each for each in self.assigned if each not in shown]
