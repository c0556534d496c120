"""From verdicts to a score: one byte per member, pure and the same for every validator that computes it.

0 is blacklisted and stays so; 1 is a newcomer; 255 the best. Honest verdicts raise it by steps that shrink towards the
top and are capped per round, so that a good name takes many rounds to earn; an inconclusive verdict leaves it; one
fraudulent verdict takes all of it. `rounds.py` puts the results on chain. A network may have a rule of its own
(`ReputationRule`): all its validators must run the same one, or they sign no round together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BLACKLISTED = 0
NEWCOMER = 1
BEST = 255
#: A step is this share of the way to the top, at least one point: 180 honest verdicts lead from 1 to 255.
STEP_SHARE = 64
#: Honest verdicts that count in one round: more audits in a round do not make a name faster.
MAX_STEPS = 4


@dataclass(frozen=True)
class VerdictCounts:
    """What the validators found about one worker in one round."""

    honest: int = 0
    inconclusive: int = 0
    fraudulent: int = 0


#: From the reputation (0..255) before a round and the round's verdicts to the one after it; pure.
ReputationRule = Callable[[int, VerdictCounts], int]


def next_reputation(reputation: int, counts: VerdictCounts) -> int:
    """The reputation (0..255) after a round with these verdicts. Raises ValueError for one out of range."""
    if not BLACKLISTED <= reputation <= BEST:
        raise ValueError(f"reputation {reputation} is not within {BLACKLISTED}..{BEST}")
    if reputation == BLACKLISTED or counts.fraudulent > 0:
        return BLACKLISTED
    for _ in range(min(counts.honest, MAX_STEPS)):
        reputation = min(BEST, reputation + max(1, (BEST - reputation) // STEP_SHARE))
    return reputation
