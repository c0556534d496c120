"""How long a cheat goes unseen, with the network's own drawing: a seed for each commitment, and what `select` takes."""

from __future__ import annotations

import random
from dataclasses import dataclass

from audit.bounds import kolmogorov_smirnov
from smartnodes_core.audit import assigned_validators, seed_of, select
from smartnodes_core.records import AuditTerms
from tensorlink.audit.odds import Settings, odds
from tensorlink.network import DEFAULT_AUDIT_TERMS

NUM_UNITS = 8
NUM_VALIDATORS = 9


@dataclass(frozen=True)
class Detection:
    """Of `runs`: the mean of steps until it is seen, what the closed form says, and the distance between the two
    distributions."""

    runs: int
    mean: float
    expected: float
    distance: float


def simulate(kind: str, num_runs: int, bent_rate: float = 1.0, num_colluding: int = 0, first: int = 0) -> Detection:
    """Runs of a worker that bends `bent_rate` of its units ("wrong-output") or steps ("wrong-gradient": only audits of
    whole steps see it), with `num_colluding` of the three assigned, until an auditor that says so sees it."""
    terms = DEFAULT_AUDIT_TERMS
    steps = [_run(kind, terms, bent_rate, num_colluding, random.Random(first + run)) for run in range(num_runs)]
    settings = Settings(
        unit_rate=terms.unit_rate_ppm / 1e6, step_rate=terms.step_rate_ppm / 1e6, num_units=NUM_UNITS,
        interval_steps=1, num_validators=NUM_VALIDATORS, num_colluding=3, cheat_rate=bent_rate,
    )  # fmt: skip
    of = odds(settings, kind, num_colluding)  # type: ignore[arg-type]
    mean = sum(steps) / len(steps)
    return Detection(num_runs, mean, of.expected_steps, kolmogorov_smirnov(steps, of.in_period))


def _run(kind: str, terms: AuditTerms, bent_rate: float, num_colluding: int, draw: random.Random) -> int:
    assigned = assigned_validators(draw.randbytes(32), [draw.randbytes(32) for _ in range(NUM_VALIDATORS)])
    honest = set(assigned[num_colluding:])
    step = 0
    while True:
        step += 1
        seed = seed_of({key: draw.randbytes(32) for key in assigned}, draw.randbytes(32))
        drawn = select(seed, terms, NUM_UNITS, assigned)
        if not drawn or drawn[0].auditor not in honest:
            continue
        bent = {unit for unit in range(NUM_UNITS) if draw.random() < bent_rate}
        seen = bent if drawn[0].tier == 2 else bent & {one.unit for one in drawn}
        if seen and (drawn[0].tier == 2 or kind == "wrong-output"):
            return step


def expected_steps(kind: str, hit_rate: float) -> tuple[float, float]:
    """Stage-steps until an attack is found, at the default rates, in the mean over jobs with three of nine validators
    in league, of those jobs in which an honest one is assigned; and the share of jobs in which none is."""
    terms = DEFAULT_AUDIT_TERMS
    settings = Settings(
        unit_rate=terms.unit_rate_ppm / 1e6 * hit_rate, step_rate=terms.step_rate_ppm / 1e6 * hit_rate,
        num_units=NUM_UNITS, interval_steps=4, num_validators=NUM_VALIDATORS, num_colluding=3,
    )  # fmt: skip
    shares = settings.shares_of_jobs()
    never = shares.get(settings.num_assigned, 0.0)
    seen = {count: share for count, share in shares.items() if count < settings.num_assigned}
    mean = sum(share * odds(settings, kind, count).expected_steps for count, share in seen.items())  # type: ignore[arg-type]
    return mean / (1 - never), never
