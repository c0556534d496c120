"""What a validator holds of what was found in one job: verdicts, proofs of silence, and what follows from them for its
draws.

Part of the books (`books.py`), guarded by their lock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from smartnodes_core.audit import Selection
from smartnodes_core.audit_grounds import grounds_of
from smartnodes_core.audit_proofs import MIN_WITNESSES, Proof, check_silence
from smartnodes_core.audit_silence import is_forced, strikes
from smartnodes_core.errors import RecordError
from smartnodes_core.identity import verify
from smartnodes_core.nodes.claim_books import ClaimBook, SecondVersionError
from smartnodes_core.records import Commitment, NodeKey, Signed, Silence, TwoVersions, Verdict


@dataclass(eq=False)
class VerdictBook(ClaimBook):
    """See the module."""

    verdicts: dict[bytes, tuple[Verdict, bytes]] = field(default_factory=dict)
    silences: dict[bytes, tuple[Silence, bytes]] = field(default_factory=dict)  # by the verdict that names each
    by_unit: dict[tuple[bytes, int, int], bytes] = field(default_factory=dict)

    def store_verdict(self, verdict: Verdict, data: bytes, silence: bytes = b"") -> bool:
        """Keep a verdict, one of silence with the signed `Silence` that it names; False where it is held already.
        Raises RecordError for one that speaks of another commitment than it names, of one that is not held, differs
        from an earlier one of the same unit, or of silence without its proof."""
        digest = verdict.digest()
        if digest in self.verdicts:
            return False
        commitment = self.commitments.get(verdict.commitment)
        if commitment is None:
            raise RecordError("a verdict about a commitment that is not held here")
        names = ("plan_version", "replica", "stage", "step", "worker", "work_units")
        wrong = [name for name in names if getattr(verdict, name) != getattr(commitment, name)]
        if wrong or (verdict.tier == 2) != (verdict.unit == -1) or verdict.unit >= len(commitment.units):
            raise RecordError(f"a verdict that does not fit its commitment: {', '.join(wrong) or 'tier and unit'}")
        found = self._check_silence(verdict, silence) if verdict.finding == "silent" else None
        if self.by_unit.setdefault((verdict.commitment, verdict.tier, verdict.unit), digest) != digest:
            raise SecondVersionError("two verdicts about one unit")
        self.verdicts[digest] = (verdict, data)
        if found is not None:
            self.silences[digest] = (found, silence)
        return True

    def _check_silence(self, verdict: Verdict, data: bytes) -> Silence:
        """Raises RecordError or SignatureError where the proof is not the one that the verdict names."""
        signed = Signed.decode(data)
        silence = verify(signed, Silence)
        check_silence(silence, signed.signer, self.job)
        names = ("job", "replica", "stage", "step", "commitment", "challenge", "worker", "auditor")
        if silence.digest() != verdict.evidence or any(getattr(silence, n) != getattr(verdict, n) for n in names):
            raise RecordError("a verdict of silence names the proof that comes with it")
        return silence

    def findings(self) -> Iterator[tuple[bytes, Verdict | Proof]]:
        """What rounds may carry, by the digest that names it: verdicts on what was drawn (of frauds, those that were
        found or re-run here) and proofs; that a validator withheld, only where there are witnesses enough."""
        for digest, (verdict, _) in self.verdicts.items():
            if self.is_selected(verdict) and (verdict.finding != "fraudulent" or digest in self.confirmed):
                yield digest, verdict
        for name, proof in self.proofs.items():
            if isinstance(proof, TwoVersions) or len(self.job.plan.validators) >= MIN_WITNESSES:
                yield name, proof

    def silent_verdicts(self, about: Verdict) -> dict[bytes, Verdict]:
        """The verdicts of silence, by digest, of the stage and worker that one is about."""
        held = {digest: self.verdicts[digest][0] for digest in self.silences}
        return {
            digest: each
            for digest, each in held.items()
            if stage_of(each) == stage_of(about) and self.is_selected(each)
        }

    def silence_of(self, digest: bytes) -> bytes:
        """The signed proof that a verdict of silence names; empty for others."""
        return self.silences[digest][1] if digest in self.silences else b""

    def followed_by(self, verdict: Verdict) -> list[bytes]:
        """The later commitments that are held of the stage that a verdict is about."""
        return [
            digest
            for digest, commitment in self.commitments.items()
            if stage_of(commitment) == stage_of(verdict) and commitment.step > verdict.step
        ]

    def strikes(self, verdict: Verdict, steps: Collection[int]) -> int:
        """How many silences count with this one, of those in `steps`; none where there are too few witnesses."""
        if len(self.job.plan.validators) < MIN_WITNESSES:
            return 0
        return strikes(verdict.step, steps, self.job.record.audit.window_steps)

    def is_selected(self, verdict: Verdict) -> bool:
        """Whether the seed selects the unit, and its auditor: only then does a verdict count."""
        selection = Selection(verdict.tier, verdict.unit, verdict.auditor)
        return selection in self.drawn.get(verdict.commitment, [])

    # -- what is drawn whatever the seed says -------------------------------------------------------------------------

    def grounds(self, digest: bytes) -> list[bytes]:
        """The papers on which a commitment is audited whatever its seed says (`audit_grounds.py`)."""
        commitment = self.commitments[digest]
        silences = [
            data
            for verdict, (silence, data) in self.silences.items()
            if (silence.replica, silence.stage, silence.worker)
            == (commitment.replica, commitment.stage, commitment.worker)
            and is_forced(commitment.step, silence.forced_from)
            and self.is_selected(self.verdicts[verdict][0])
        ]
        others = [self.signed[other] for other in sorted(self.disputes.get(digest, ())) if other in self.signed]
        return [*silences[:1], *others[:2]]

    def forced(self, digest: bytes) -> frozenset[int]:
        """The units of a commitment that are audited whatever its seed says."""
        return grounds_of(self.grounds(digest), self.job, self.commitments[digest]).forced

    def draw(self, digest: bytes) -> list[Selection]:
        """Draw for a commitment whose preimages are all out; returns what is newly selected. Harmless when repeated:
        more may be drawn when a silence or a contradiction is known."""
        draws = self.draws(digest) if digest in self.commitments else []
        if not draws:
            return []
        forced = self.forced(digest)
        chosen = self.drawn.setdefault(digest, [])
        found = [each for one in draws for each in self.selections(digest, one, forced)]
        fresh = [each for each in dict.fromkeys(found) if each not in chosen]
        chosen.extend(fresh)
        return fresh


def stage_of(each: Commitment | Verdict) -> tuple[int, int, NodeKey]:
    return each.stage, each.replica, each.worker
