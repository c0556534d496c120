"""From verdicts to a score: one byte per member, pure and the same for every validator that computes it.

0 is blacklisted and stays so; 1 is a newcomer; 255 the best. Honest verdicts raise it by steps that shrink towards the
top and are capped per round, so that a good name takes many rounds to earn; an inconclusive verdict leaves it, as does
a silence, of which the third takes it; one fraudulent verdict takes all of it. Validators rise by the verdicts that
they give, and lose half for keeping a draw from being made. `rounds.py` puts the results on chain. A network may have a
rule of its own (`ReputationRule`): all its validators must run the same one, or they sign no round together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from smartnodes_core.audit_silence import MAX_STRIKES

BLACKLISTED = 0
NEWCOMER = 1
BEST = 255
#: A step is this share of the way to the top, at least one point: 180 honest verdicts lead from 1 to 255.
STEP_SHARE = 64
#: Honest verdicts that count in one round: more audits in a round do not make a name faster.
MAX_STEPS = 4


@dataclass(frozen=True)
class VerdictCounts:
    """What the validators found about one member in one round: verdicts on its work (two versions of a step count as a
    fraud), how many silences are held against it where there was one, draws that it withheld, verdicts that it gave.
    """

    honest: int = 0
    inconclusive: int = 0
    fraudulent: int = 0
    silent: int = 0
    strikes: int = 0
    withheld: int = 0
    given: int = 0

    @property
    def is_convicted(self) -> bool:
        """Whether it is to be blacklisted, and earns nothing any more."""
        return self.fraudulent > 0 or self.strikes >= MAX_STRIKES


#: From the reputation (0..255) before a round and the round's verdicts to the one after it; pure.
ReputationRule = Callable[[int, VerdictCounts], int]


def next_reputation(reputation: int, counts: VerdictCounts) -> int:
    """The reputation (0..255) after a round with these verdicts. Raises ValueError for one out of range."""
    if not BLACKLISTED <= reputation <= BEST:
        raise ValueError(f"reputation {reputation} is not within {BLACKLISTED}..{BEST}")
    if reputation == BLACKLISTED or counts.is_convicted:
        return BLACKLISTED
    if counts.withheld:
        return max(NEWCOMER, reputation // 2)
    for _ in range(min(counts.honest + counts.given, MAX_STEPS)):
        reputation = min(BEST, reputation + max(1, (BEST - reputation) // STEP_SHARE))
    return reputation
