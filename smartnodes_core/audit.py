"""The audit protocol over bytes and hashes: who is challenged, on what, and why nobody could foresee it.

A worker's signed `Commitment` reaches the job's validators. Each assigned validator signs the list of commitments it
holds (`ReceivedList`) and, once every other assigned validator has fixed a list with the same commitments, reveals
the next preimage of its hash chain. The seed of a commitment is the hash over those preimages and the commitment: no
worker can foresee it, no single validator can steer it, and anyone checks afterwards that it selects exactly the unit
that was challenged.

Pure: no clock, no socket, no tensor. `nodes/drawing.py` and `nodes/challenging.py` move the messages,
`nodes/worker.py` answers challenges, and the network built on this layer compares what was opened (`Auditor`).
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from blake3 import blake3

from smartnodes_core.errors import AuditError
from smartnodes_core.records import (
    AuditTerms,
    Challenge,
    Commitment,
    Digest,
    Finding,
    JobRecord,
    ReceivedList,
    Record,
    Reveal,
)

NUM_ASSIGNED = 3
CHAIN_LENGTH = 1 << 16
WHOLE_STEP = -1


class Auditor(Protocol):
    """Re-executes what a worker opened; implemented by the network built on this layer."""

    def examine(self, case: Case, body: memoryview) -> tuple[Finding, str]:
        """The finding and its reason in words. Must not raise for anything a worker sent: that is a finding."""


@dataclass(frozen=True)
class Case:
    """One challenged unit with everything signed about it; `spec` is what the job record names for the stage.

    `earlier` are the stage's commitments before this one, oldest first and without a gap, as far back as the worker
    opened them.
    """

    job: JobRecord
    spec: bytes
    commitment: Commitment
    challenge: Challenge
    order: bytes
    opening: bytes
    earlier: tuple[Commitment, ...] = ()


class Opened(Record, frozen=True, kw_only=True, tag="Opened/2"):
    """What a worker signs when it opens: the `Opening`, and the digests of its body and of the author's order that it
    showed.

    Without both under the worker's signature, an auditor could put other bytes beside an honest opening and accuse
    with them.
    """

    opening: bytes
    body_digest: Digest
    order_digest: Digest


@dataclass(frozen=True)
class Selection:
    """One unit (tier 1) or a whole step (tier 2, `unit` = WHOLE_STEP) that a seed selects, and who audits it."""

    tier: int
    unit: int
    auditor: bytes


# -- hash chains ------------------------------------------------------------------------------------------------------


def hash_link(value: bytes) -> bytes:
    """One step of a validator's hash chain towards its tip."""
    return blake3(value, derive_key_context="smartnodes 1 hash chain").digest()


class HashChain:
    """A validator's preimages, spent one by one from the tip backwards.

    `reveal(k)` (k from 1) is the value whose k-fold hash is the tip that was posted on chain.
    """

    def __init__(self, secret: bytes, length: int = CHAIN_LENGTH):
        values = [secret]
        for _ in range(length):
            values.append(hash_link(values[-1]))
        self._values = values
        self.length = length
        self.tip = values[-1]

    def reveal(self, index: int) -> bytes:
        """Preimage number `index`, from 1. Raises AuditError when the chain is used up: post a new tip."""
        if not 0 < index < len(self._values):
            raise AuditError(f"preimage {index} of a chain of {len(self._values) - 1}: post the tip of a new chain")
        return self._values[-1 - index]


class TipTracker:
    """Checks revealed preimages of one validator against its tip, at the cost of the hashes between two reveals.

    Thread-safe.
    """

    def __init__(self, tip: bytes):
        self._lock = threading.Lock()
        self._known = {0: tip}
        self._indexes = [0]  # ascending

    def check(self, index: int, preimage: bytes) -> bool:
        """Whether `preimage` is number `index` behind the tip."""
        if not 0 < index <= CHAIN_LENGTH:
            return False
        with self._lock:
            if index in self._known:
                return self._known[index] == preimage
            place = bisect.bisect_left(self._indexes, index)
            anchor = self._indexes[place - 1]
            value = preimage
            for _ in range(index - anchor):
                value = hash_link(value)
            if value != self._known[anchor]:
                return False
            self._known[index] = preimage
            self._indexes.insert(place, index)
            return True


def gives_away(reveal: Reveal, received: ReceivedList) -> bool:
    """Whether a revealed preimage shows the one behind a list of the same validator: it is that, or a later one."""
    if reveal.reveal == received.reveal:
        return reveal.job == received.job and reveal.received_list == received.digest()
    return reveal.reveal > received.reveal


def preimage_of(reveal: Reveal, index: int) -> bytes:
    """Preimage number `index` of the chain of which `reveal` shows that number or a later one."""
    value = reveal.preimage
    for _ in range(min(reveal.reveal - index, CHAIN_LENGTH)):
        value = hash_link(value)
    return value


# -- drawing ----------------------------------------------------------------------------------------------------------


def assigned_validators(job: bytes, validators: Sequence[bytes]) -> list[bytes]:
    """The validators (node keys, at most three) that draw and audit for this job, sorted; all where there are fewer."""
    ranked = sorted(validators, key=lambda key: blake3(job + key, derive_key_context="smartnodes 1 assign").digest())
    return sorted(ranked[:NUM_ASSIGNED])


def seed_of(preimages: Mapping[bytes, bytes], commitment: bytes) -> bytes:
    """The seed of a commitment: hash over the assigned validators' preimages (by validator key) and its digest."""
    ordered = b"".join(preimages[validator] for validator in sorted(preimages))
    return blake3(ordered + commitment, derive_key_context="smartnodes 1 audit seed").digest()


def select(
    seed: bytes, terms: AuditTerms, num_units: int, auditors: Sequence[bytes], forced: Collection[int] = ()
) -> list[Selection]:
    """What `seed` selects: the whole step with the job's step rate, else each unit with its unit rate. `forced` units
    (or WHOLE_STEP) are selected whatever the seed says (`audit_grounds.py`); it draws their auditor.

    A pure function of its arguments, so that worker, validators and anyone later agree on it.
    """
    auditor = sorted(auditors)[_draw(seed, b"auditor", 0) % len(auditors)]
    if WHOLE_STEP in forced or _chance(seed, b"step", 0, terms.step_rate_ppm):
        return [Selection(2, WHOLE_STEP, auditor)]
    return [
        Selection(1, unit, auditor)
        for unit in range(num_units)
        if unit in forced or _chance(seed, b"unit", unit, terms.unit_rate_ppm)
    ]


def _draw(seed: bytes, purpose: bytes, index: int) -> int:
    return int.from_bytes(blake3(purpose + index.to_bytes(8, "big"), key=seed).digest(length=8), "big")


def _chance(seed: bytes, purpose: bytes, index: int, rate_ppm: int) -> bool:
    return _draw(seed, purpose, index) * 1_000_000 < rate_ppm << 64


def check_challenge(
    challenge: Challenge,
    commitment: Commitment,
    terms: AuditTerms,
    assigned: Sequence[bytes],
    lists: Sequence[ReceivedList],
    reveals: Sequence[Reveal],
    tips: Mapping[bytes, TipTracker] | None,
    excluded: Sequence[bytes] = (),
    forced: Collection[int] = (),
) -> None:
    """The worker's check before it opens anything. Raises AuditError with what does not hold.

    `lists` and `reveals` carry verified signatures of the validators they name; a preimage that a validator revealed
    later, for whatever, gives away all before it. `tips` None: without the chain, so that it stays open whether the
    preimages lead to what was posted there. `excluded` and `forced` are what `audit_grounds.py` makes of the papers
    that come with the challenge.
    """
    digest = commitment.digest()
    if challenge.commitment != digest or challenge.job != commitment.job:
        raise AuditError("the challenge names another commitment")
    listed = {
        item.validator: item
        for item in lists
        if item.job == commitment.job and digest in item.commitments and item.excluded == sorted(excluded)
    }
    preimages: dict[bytes, bytes] = {}
    for reveal in reveals:
        received = listed.get(reveal.validator)
        if received is None or not gives_away(reveal, received):
            raise AuditError("a preimage was revealed for a list that does not hold this commitment")
        tip = None if tips is None else tips.get(reveal.validator)
        if tips is not None and (tip is None or not tip.check(reveal.reveal, reveal.preimage)):
            raise AuditError("a preimage does not lead to the tip its validator posted on chain")
        preimages[reveal.validator] = preimage_of(reveal, received.reveal)
    if sorted(preimages) != sorted(assigned):
        raise AuditError(f"{len(preimages)} preimages, needed one of each of {len(assigned)} assigned validators")
    if challenge.seed != seed_of(preimages, digest):
        raise AuditError("the seed does not follow from the preimages")
    wanted = Selection(challenge.tier, challenge.unit, challenge.auditor)
    if wanted not in select(challenge.seed, terms, len(commitment.units), assigned, forced):
        raise AuditError(f"the seed does not select tier {challenge.tier}, unit {challenge.unit} for this auditor")


# -- T0: both ends of a link say the same -----------------------------------------------------------------------------


def disagreeing_units(one: Commitment, other: Commitment) -> list[int]:
    """Which units of `one`, by index, contradict what a neighbouring stage committed to for the same step; WHOLE_STEP
    where one of the two stages names a unit that the other does not, or they shared other sums."""
    theirs = {(unit.call, unit.micro_batch, unit.backward_pass): unit.roots for unit in other.units}
    pairs = (("y", "x"), ("gy", "gx")) if one.stage < other.stage else (("x", "y"), ("gx", "gy"))
    found = [WHOLE_STEP] if sharing_disagreements(one, other) else []
    if abs(one.stage - other.stage) != 1:
        return found
    if {(unit.call, unit.micro_batch, unit.backward_pass) for unit in one.units} != theirs.keys():
        return [WHOLE_STEP]
    for index, unit in enumerate(one.units):
        roots = theirs[(unit.call, unit.micro_batch, unit.backward_pass)]
        if any(unit.roots.get(name) != roots.get(their_name) for name, their_name in pairs):
            found.append(index)
    return found


def link_disagreements(before: Commitment, after: Commitment) -> list[str]:
    """Where the commitments of two neighbouring stages for one step contradict each other, in words; empty if
    nowhere.
    """
    found = []
    upstream = {(unit.call, unit.micro_batch, unit.backward_pass): unit.roots for unit in before.units}
    for unit in after.units:
        roots = upstream.pop((unit.call, unit.micro_batch, unit.backward_pass), None)
        if roots is None:
            found.append(f"micro-batch {unit.micro_batch} of call {unit.call} is committed by stage {after.stage} only")
            continue
        for ours, theirs in (("y", "x"), ("gy", "gx")):
            if roots.get(ours) != unit.roots.get(theirs):
                found.append(
                    f"micro-batch {unit.micro_batch}: {ours} of stage {before.stage} is not {theirs} of {after.stage}"
                )
    found += [
        f"micro-batch {micro_batch} of call {call} is committed by stage {before.stage} only"
        for call, micro_batch, _ in upstream
    ]
    return found


def sent_to(stage: int) -> str:
    """The name, in a commitment's `shared_roots`, of what this stage says it sent to `stage` for the whole step."""
    return f"to/{stage}"


def received_from(stage: int) -> str:
    """The name of what this stage says it received from `stage` for the whole step."""
    return f"from/{stage}"


def sharing_disagreements(one: Commitment, other: Commitment) -> list[str]:
    """Where two stages say different things of what one sent the other for a whole step, in words; empty if nowhere."""
    return [
        f"what stage {sender.stage} sent to stage {receiver.stage} is not what {receiver.stage} received"
        for sender, receiver in ((one, other), (other, one))
        if sender.shared_roots.get(sent_to(receiver.stage)) != receiver.shared_roots.get(received_from(sender.stage))
    ]
