"""The rules of a round, pure: who proposes, what a proposal holds, who is paid what, when to sign.

A validator builds a proposal from its evidence with `propose`, and checks another's with `justify` against the one it
builds itself: the same evidence gives the same bytes. `contracts/Rounds.sol` executes what a quorum signed. Neighbours:
`reputation.py` (scores), `payments.py` (what jobs pay), `ballots.py` (votes), `chain/merkle.py` (rewards root),
`chain/base.py` (the chain that executes).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from smartnodes_core.chain.emission import WORKERS_PERCENT, fee_on, workers_cap_wei
from smartnodes_core.chain.merkle import RewardTree
from smartnodes_core.chain.packing import pack_reputations, unpack_reputations
from smartnodes_core.chain.proposal import (
    CORRECT,
    NO_RULING,
    UPHOLD,
    Admission,
    Domain,
    Parameters,
    RoundProposal,
    Settlement,
    Slash,
)
from smartnodes_core.chain.signing import keccak, word
from smartnodes_core.payments import JobWork, settle, share
from smartnodes_core.reputation import BLACKLISTED, ReputationRule, VerdictCounts, next_reputation

__all__ = [
    "Admission",
    "Correction",
    "Domain",
    "JobWork",
    "Parameters",
    "RoundContext",
    "RoundEvidence",
    "RoundProposal",
    "Settlement",
    "Slash",
    "Standing",
    "add",
    "allot",
    "draw_proposers",
    "evidence_root",
    "justify",
    "left_out",
    "propose",
    "quorum",
    "rewards_of",
    "undecided",
]

#: Below this many validators a verdict costs reputation only: too few to take somebody's stake.
MIN_VALIDATORS_TO_SLASH = 3
#: Views in which a proposal must be complete. In later ones it is enough that what it holds is justified: a round must
#: not wait for what some validators see and others cannot.
COMPLETE_VIEWS = 4


@dataclass(frozen=True)
class Standing:
    """A member as the rules see it: its place in the contract's list, reputation and stake."""

    index: int
    reputation: int
    stake_wei: int


@dataclass(frozen=True)
class Correction:
    """What a validator finds of roots that are frozen and wrong: the cumulative rewards before the first of them, what
    accounts did earn in the rounds since, and how much those rounds had allotted, which a correction may allot anew.
    """

    before_wei: Mapping[bytes, int]
    earned_wei: Mapping[bytes, int]
    released_wei: int

    @property
    def totals_wei(self) -> dict[bytes, int]:
        """The cumulative rewards as they should be; in proportion where less was allotted than was earned."""
        earned_wei, totals = sum(self.earned_wei.values()), dict(self.before_wei)
        for account, wei in sorted(self.earned_wei.items()):
            if earned_wei > self.released_wei:
                wei = wei * self.released_wei // earned_wei
            totals[account] = totals.get(account, 0) + wei
        return totals

    @property
    def allotment_wei(self) -> int:
        """What of `released_wei` is allotted anew."""
        return sum(self.totals_wei.values()) - sum(self.before_wei.values())


@dataclass(frozen=True)
class RoundContext:
    """What the chain says before a round; equal for every validator that proposes or checks it.

    `totals_wei` are the cumulative rewards under the last executed root, `signers` those whose signatures carried the
    round before, `emission_wei` what may be emitted up to `until_s`, `parameters` those of this round,
    `frozen_from` the round whose root a validator has frozen (0: none), `correction` what this validator finds
    instead, if it finds it wrong, `is_judged` whether it could find anything: who cannot judge does not rule.
    `reputation_rule` is the network's own.
    """

    domain: Domain
    network_id: int
    round: int
    view: int
    previous_hash: bytes
    until_s: int
    emission_wei: int
    num_validators: int
    parameters: Parameters
    signers: tuple[bytes, ...]
    standings: Mapping[bytes, Standing]
    totals_wei: Mapping[bytes, int]
    frozen_from: int = 0
    correction: Correction | None = None
    reputation_rule: ReputationRule = next_reputation
    is_judged: bool = True

    @property
    def ruled_round(self) -> int:
        """The frozen round on which this validator rules; 0 where there is none, or it cannot judge."""
        return self.frozen_from if self.is_judged else 0

    @property
    def base_wei(self) -> Mapping[bytes, int]:
        """The cumulative rewards on which those of the round are added."""
        return self.correction.totals_wei if self.correction and self.ruled_round else self.totals_wei


@dataclass(frozen=True)
class RoundEvidence:
    """What a validator collected in the round: the accounts' verdicts and their work in each job, and the digests of
    the records behind them; which jobs began, ended or had a fraud in them; who was verified to own its node key.
    """

    verdicts: Mapping[bytes, VerdictCounts] = field(default_factory=dict)
    work: Sequence[JobWork] = ()
    jobs_created: Sequence[bytes] = ()
    jobs_completed: Sequence[bytes] = ()
    jobs_disputed: Sequence[bytes] = ()
    admissions: Sequence[Admission] = ()
    parameters: Parameters | None = None
    digests: Sequence[bytes] = ()

    def paid_signers(self, signers: Sequence[bytes]) -> tuple[bytes, ...]:
        """Those of `signers` that share in the pay: who withheld a draw does not, unless all did."""
        kept = tuple(each for each in signers if not self.verdicts.get(each, VerdictCounts()).withheld)
        return kept or tuple(signers)


def quorum(num_validators: int) -> int:
    """Signatures that carry a round: more than two thirds."""
    return 2 * num_validators // 3 + 1


def draw_proposers(validators: Iterable[bytes], round_number: int) -> list[bytes]:
    """All validators in the order in which they may propose: the first in view 0, the next after each timeout.

    The order follows from who the validators are and the round's number, so no proposal can be varied until it names
    the next proposer. It is known beforehand, while nobody joins or leaves. Whoever joins last can try accounts: to be
    first in k given rounds among n validators takes about n^k of them.
    """
    members = sorted(set(validators))
    seed = keccak(b"".join(members)) + word(round_number)
    return sorted(members, key=lambda account: keccak(seed + account))


def allot(
    work: Sequence[tuple[Mapping[bytes, int], int | None]], signers: Iterable[bytes], emission_wei: int
) -> dict[bytes, int]:
    """Splits a round's emission: 85 % among workers by verified work, 15 % in equal parts among `signers`.

    `work` are jobs: units by account, and the most that their workers may get (None: no bound), which is what the job
    burned times kappa. Equal work earns equal pay, in one job always, in different ones where no bound is reached.
    Shares are rounded down and what remains is not minted, nor is a part that nobody earned.
    """
    pool_wei = emission_wei * WORKERS_PERCENT // 100
    signers_wei = emission_wei - pool_wei
    jobs = [({account: n for account, n in units.items() if n > 0}, cap_wei) for units, cap_wei in work]
    rewards: dict[bytes, int] = {}
    parts = share(pool_wei, [(sum(units.values()), cap_wei) for units, cap_wei in jobs])
    for (units, _), part_wei in zip(jobs, parts, strict=True):
        total = sum(units.values())
        for account, n in units.items():
            rewards[account] = rewards.get(account, 0) + part_wei * n // total
    distinct = sorted(set(signers))
    for account in distinct:
        rewards[account] = rewards.get(account, 0) + signers_wei // len(distinct)
    return {account: wei for account, wei in sorted(rewards.items()) if wei > 0}


def evidence_root(digests: Iterable[bytes]) -> bytes:
    """Binds the round to the records behind it, whatever order they came in; zero where there are none."""
    ordered = sorted(set(digests))
    return keccak(b"".join(ordered)) if ordered else bytes(32)


def propose(context: RoundContext, evidence: RoundEvidence) -> tuple[RoundProposal, dict[bytes, int]]:
    """The proposal that this evidence justifies, and the cumulative rewards under its root.

    A frozen root is upheld, unless this validator finds it wrong (then it is corrected) or cannot judge it. Work of an
    account that is convicted in this round, blacklisted or unknown earns nothing.
    """
    scores: dict[int, int] = {}
    slashes: list[Slash] = []
    for account, counts in sorted(evidence.verdicts.items()):
        standing = context.standings.get(account)
        if standing is None:
            continue
        score = context.reputation_rule(standing.reputation, counts)
        if score != standing.reputation:
            scores[standing.index] = score
        if counts.fraudulent and standing.stake_wei and context.num_validators >= MIN_VALIDATORS_TO_SLASH:
            slashes.append(Slash(index=standing.index, amount_wei=standing.stake_wei))
    work = [_earning(context, evidence, job) for job in sorted(evidence.work, key=lambda job: job.job)]
    signers = evidence.paid_signers(context.signers)
    paid = [settle(job, signers, context.parameters) for job in work]
    settlements = sorted((each for each in paid if each), key=lambda settlement: settlement.escrow_id)
    rewards = rewards_of(context, evidence, settlements)
    correction = context.correction if context.ruled_round else None
    totals = add(context.base_wei, rewards)
    ruling = NO_RULING if not context.ruled_round else CORRECT if correction else UPHOLD
    domain = context.domain
    proposal = RoundProposal(
        network_id=context.network_id,
        round=context.round,
        view=context.view,
        previous_hash=context.previous_hash,
        until_s=context.until_s,
        reputations=pack_reputations(scores),
        rewards_root=RewardTree(domain.chain_id, domain.contract, context.network_id, totals).root,
        allotment_wei=sum(rewards.values()) + (correction.allotment_wei if correction else 0),
        jobs_created=tuple(sorted(set(evidence.jobs_created))),
        jobs_completed=tuple(sorted(set(evidence.jobs_completed))),
        jobs_disputed=tuple(sorted(set(evidence.jobs_disputed))),
        admissions=tuple(sorted(evidence.admissions, key=lambda admission: admission.index)),
        slashes=tuple(sorted(slashes, key=lambda slash: slash.index)),
        settlements=tuple(settlements),
        ruling=ruling,
        ruled_round=context.ruled_round,
        parameters=() if evidence.parameters in (None, context.parameters) else (evidence.parameters,),
        evidence_root=evidence_root(evidence.digests),
    )
    return proposal, totals


def rewards_of(context: RoundContext, evidence: RoundEvidence, settlements: Iterable[Settlement]) -> dict[bytes, int]:
    """What accounts earn of the emission in a round that settles this: each job's workers up to what it burned."""
    paid_wei = {each.escrow_id: sum(payment.amount_wei for payment in each.payments) for each in settlements}
    earned = [
        (job.units, workers_cap_wei(context.parameters, fee_on(paid_wei.get(job.escrow_id, 0), context.parameters)))
        for job in (_earning(context, evidence, job) for job in evidence.work)
        if not job.in_coin
    ]
    return allot(earned, evidence.paid_signers(context.signers), context.emission_wei)


def add(totals_wei: Mapping[bytes, int], earned_wei: Mapping[bytes, int]) -> dict[bytes, int]:
    """Cumulative rewards with what was earned since."""
    totals = dict(totals_wei)
    for account, wei in earned_wei.items():
        totals[account] = totals.get(account, 0) + wei
    return totals


def _earning(context: RoundContext, evidence: RoundEvidence, job: JobWork) -> JobWork:
    """The job's work without that of accounts that may not earn."""
    units = {account: n for account, n in job.units.items() if n > 0 and _may_earn(context, evidence, account)}
    return replace(job, units=units)


def _may_earn(context: RoundContext, evidence: RoundEvidence, account: bytes) -> bool:
    standing = context.standings.get(account)
    if standing is None or standing.reputation == BLACKLISTED:
        return False
    return not evidence.verdicts.get(account, VerdictCounts()).is_convicted


def justify(proposed: RoundProposal, recomputed: RoundProposal) -> list[str] | None:
    """None if a validator that recomputed the round may sign `proposed`; else a reason per item it cannot justify."""
    reasons = []
    for name in RoundProposal.__dataclass_fields__:
        found, own = getattr(proposed, name), getattr(recomputed, name)
        if found == own:
            continue
        if name == "reputations":
            reasons += _reputation_differences(found, own)
        elif isinstance(own, tuple):
            reasons += [f"{name}: {_show(item)} is not justified" for item in found if item not in own]
            reasons += [f"{name}: {_show(item)} is missing" for item in own if item not in found]
            reasons += [f"{name}: order or repetition differs"] if set(found) == set(own) else []
        else:
            reasons.append(f"{name}: proposed {_show(found)}, recomputed {_show(own)}")
    return reasons or None


def left_out(
    settleable_since_s: Mapping[bytes, float], named: Collection[bytes], now_s: float, interval_s: float, view: int
) -> list[bytes]:
    """Records that a proposal in this view must name and does not: those that the validator that checks it could have
    settled itself for an interval or longer. A proposer whose knowledge is up to an interval older than the checking
    one's is so never refused, and nobody's work can be passed over for long.
    """
    if view >= COMPLETE_VIEWS:
        return []
    vested = (digest for digest, since_s in settleable_since_s.items() if since_s <= now_s - interval_s)
    return sorted(digest for digest in vested if digest not in named)


def undecided(context: RoundContext, proposed: RoundProposal) -> RoundContext:
    """The context in which to check a proposal that decides nothing about a frozen root: in later views it is signed
    by those who can judge too, so that rounds go on while too few can.
    """
    if proposed.ruling == NO_RULING and context.view >= COMPLETE_VIEWS:
        return replace(context, is_judged=False)
    return context


def _reputation_differences(found: bytes, own: bytes) -> list[str]:
    expected = unpack_reputations(own)
    try:
        given = unpack_reputations(found)
    except ValueError as error:
        return [f"reputations: {error}"]
    reasons = []
    for index in sorted(given.keys() | expected.keys()):
        found_score, own_score = given.get(index, "unchanged"), expected.get(index, "unchanged")
        if found_score != own_score:
            reasons.append(f"reputations: member {index} proposed {found_score}, recomputed {own_score}")
    return reasons


def _show(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else str(value)


def in_view(proposal: RoundProposal, view: int) -> RoundProposal:
    """The same content proposed again after a timeout."""
    return replace(proposal, view=view)
