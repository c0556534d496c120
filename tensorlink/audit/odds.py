"""How soon audits find a cheat, and what stake makes cheating not pay: closed forms over the draw as it is made.

Per commitment, `smartnodes_core.audit.select` draws one auditor among the assigned, then the whole step with the step
rate, else each unit with the unit rate. Which of these see what a cheat bent is said by `unit.py`, `step.py` and
`interval.py`; `ATTACKS` puts it in words. Pure, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from smartnodes_core.audit import NUM_ASSIGNED
from smartnodes_core.audit_proofs import MIN_WITNESSES, majority
from smartnodes_core.audit_silence import MAX_STRIKES
from smartnodes_core.errors import ConfigError
from smartnodes_core.rounds import MIN_VALIDATORS_TO_SLASH, quorum

Attack = Literal[
    "wrong-output", "wrong-gradient", "wrong-update", "changed-state", "wrong-data", "refused", "wrong-link"
]
#: What colluding validators do for the worker: call its work honest, or keep back preimages until they are shut out.
Collusion = Literal["approve", "withhold"]

ATTACKS: Mapping[Attack, str] = {
    "wrong-output": "bends y, gx or the loss of units; seen by an audit of such a unit, and of its whole step",
    "wrong-gradient": "right y and gx, bent or skipped weight gradient; seen by an audit of the whole step",
    "wrong-update": "bends the last update of an interval; seen by an audit of the whole step that ends it",
    "changed-state": "changes the state between two intervals; seen by any audit of the interval that follows",
    "wrong-data": "other inputs or targets than the author ordered, at the ends of the model; seen by any audit there",
    "refused": "opens nothing that it bent: not paid, and shut out at the third silence; keeps its stake",
    "wrong-link": "uses other inputs than came, or sends other results than it commits to; seen at once in every step",
}
#: What is seen at once but leads to no verdict, since it cannot be told which end of the link lies: neither is paid.
UNDECIDED: frozenset[Attack] = frozenset({"wrong-link"})
#: Attacks whose penalty leaves the stake alone: that of the third silence is the worker's place and its held-back pay.
KEEPS_STAKE: frozenset[Attack] = frozenset({"refused"})


@dataclass(frozen=True)
class Settings:
    """What the odds depend on. Rates are shares (0..1) of units and of stage-steps.

    `num_units` is how many units a commitment names (micro-batches of a step), `interval_steps` how often the state is
    committed to. `cheat_rate` is the share of units that are bent, for "wrong-update" and "changed-state" of intervals.
    `gain` is what one bent unit saves or brings; where a state is bent, each unit of its interval counts. Raises
    ConfigError.
    """

    unit_rate: float
    step_rate: float
    num_units: int
    interval_steps: int
    num_validators: int
    num_colluding: int
    cheat_rate: float = 1.0
    gain: float = 1.0
    collusion: Collusion = "approve"

    def __post_init__(self) -> None:
        for name in ("unit_rate", "step_rate", "cheat_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"found {name} {getattr(self, name)}, needed a share from 0 to 1")
        for name in ("num_units", "interval_steps", "num_validators"):
            if getattr(self, name) < 1:
                raise ConfigError(f"found {name} {getattr(self, name)}, needed at least 1")
        if not 0 <= self.num_colluding <= self.num_validators:
            raise ConfigError(f"found {self.num_colluding} colluding of {self.num_validators} validators")
        if not 0 <= self.gain < math.inf:
            raise ConfigError(f"found gain {self.gain}, needed 0 or more")

    @property
    def num_assigned(self) -> int:
        """Validators that draw and audit for a job."""
        return min(NUM_ASSIGNED, self.num_validators)

    def shares_of_jobs(self) -> dict[int, float]:
        """By how many of a job's assigned validators collude, the share of jobs that are so: drawn without putting
        back. An author that is in league too tries nonces, and is in whichever of these it likes."""
        bad, good, drawn = self.num_colluding, self.num_validators - self.num_colluding, self.num_assigned
        ways = math.comb(self.num_validators, drawn)
        found = {count: math.comb(bad, count) * math.comb(good, drawn - count) / ways for count in range(drawn + 1)}
        return {count: share for count, share in found.items() if share}

    @property
    def can_shut_out(self) -> bool:
        """Whether the honest are more than half of the validators beside one that withholds its part in a draw."""
        return self.num_validators - self.num_colluding >= majority(self.num_validators - 1)

    @property
    def can_prove_silence(self) -> bool:
        """Whether the honest are more than half of the validators, and enough for a silence to count as a strike."""
        honest = self.num_validators - self.num_colluding
        return honest >= majority(self.num_validators) and self.num_validators >= MIN_WITNESSES

    def honest_share(self, num_colluding_assigned: int) -> float:
        """The chance that a draw is made and its auditor says what it finds. Who withholds its preimage is shut out of
        the job's draws, which are made anew without it, unless the honest are too few for that."""
        if self.collusion == "withhold":
            return float(num_colluding_assigned == 0 or self.can_shut_out)
        return 1 - num_colluding_assigned / self.num_assigned


@dataclass(frozen=True)
class Odds:
    """Of one attack in a job. It goes on in periods of `len(chances)` steps; a period is bent with `rate`, and the
    chance of being seen in its step k, if not before, is then `chances[k]`. It counts when it was seen `times` times,
    in periods apart."""

    chances: tuple[float, ...]
    rate: float
    gain: float  # a period's
    times: int = 1

    @property
    def in_period(self) -> float:
        """The chance to be seen in one period."""
        return self._within(len(self.chances))

    def _within(self, num_steps: int) -> float:
        return self.rate * (1 - math.prod(1 - chance for chance in self.chances[:num_steps]))

    def detection(self, num_steps: int) -> float:
        """The chance to be seen often enough within so many stage-steps."""
        periods, rest = divmod(num_steps, len(self.chances))
        p, last = self.in_period, self._within(rest)
        missed = 0.0
        for seen in range(self.times):  # in whole periods; the rest may add one
            chance = math.comb(periods, seen) * p**seen * (1 - p) ** (periods - seen)
            missed += chance * (1 - last if seen == self.times - 1 else 1.0)
        return 1 - missed

    @property
    def expected_steps(self) -> float:
        """Stage-steps until it is seen often enough, the last one included, in the mean; infinite where nothing sees
        it."""
        if not self.in_period:
            return math.inf
        # a sum over the steps' chances not to be seen before, of one period, and as many periods as it lasts
        once = sum(1 - self._within(step) for step in range(len(self.chances))) / self.in_period
        return once + (self.times - 1) * len(self.chances) / self.in_period

    @property
    def stake(self) -> float:
        """The stake from which on cheating brings less than it costs, in the unit of `gain`: what all periods before
        the one that is seen bring in the mean. A run's length does not matter, since gain and loss end together. Where
        only some units are bent, a little more than is needed."""
        if not self.gain:
            return 0.0
        return self.gain * (1 - self.in_period) / self.in_period if self.in_period else math.inf


def odds(settings: Settings, attack: Attack, num_colluding_assigned: int) -> Odds:
    """The odds in a job of whose assigned validators so many collude."""
    s, honest = settings, settings.honest_share(num_colluding_assigned)
    some_bent = 1 - (1 - s.cheat_rate) ** s.num_units
    one_drawn = 1 - (1 - s.unit_rate) ** s.num_units
    bent_drawn = 1 - (1 - s.unit_rate * s.cheat_rate) ** s.num_units
    rate, seen = 1.0, [0.0]
    if attack == "wrong-output":
        seen = [s.step_rate * some_bent + (1 - s.step_rate) * bent_drawn]
    elif attack == "wrong-data":
        rate, seen = some_bent, [s.step_rate + (1 - s.step_rate) * one_drawn]
    elif attack == "refused":
        seen = [(s.step_rate * some_bent + (1 - s.step_rate) * bent_drawn) * s.can_prove_silence]
    elif attack == "wrong-gradient":
        seen = [s.step_rate * some_bent]
    elif attack == "wrong-update":
        rate, seen = s.cheat_rate, [0.0] * (s.interval_steps - 1) + [s.step_rate]
    elif attack == "changed-state":
        rate, seen = s.cheat_rate, [s.step_rate + (1 - s.step_rate) * one_drawn] * s.interval_steps
    gain = s.gain * s.num_units * s.cheat_rate * len(seen)
    times = MAX_STRIKES if attack == "refused" else 1
    return Odds(tuple(honest * chance for chance in seen), rate, gain, times)


def can_slash(settings: Settings) -> bool:
    """Whether the network is large enough that a fraud costs its worker the stake."""
    return settings.num_validators >= MIN_VALIDATORS_TO_SLASH


def honest_carry_rounds(settings: Settings) -> bool:
    """Whether the honest are enough to sign a round with a fraud in it; else the others can stop every such round."""
    return settings.num_validators - settings.num_colluding >= quorum(settings.num_validators)
