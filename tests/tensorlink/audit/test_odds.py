"""The odds are those of the draw as it is made: against simulations of the real `select`, closed forms, and audits."""

from __future__ import annotations

import math
import random
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.audit import assigned_validators, seed_of, select
from smartnodes_core.audit_silence import MAX_STRIKES
from smartnodes_core.errors import ConfigError
from smartnodes_core.records import AuditTerms
from tensorlink.audit.odds import ATTACKS, KEEPS_STAKE, UNDECIDED, Settings, can_slash, honest_carry_rounds, odds

from .test_examine import Training

P, Q, UNITS, INTERVAL = 0.05, 0.08, 4, 3
NUM_STEPS = 15_000
#: Standard deviations: a right formula fails one comparison in 1.7 million, and seeds are fixed.
BOUND = 5
VALIDATORS = [bytes([number] * 32) for number in range(1, 10)]
SEEN = sorted(set(ATTACKS) - UNDECIDED)


def of(**changes):
    values = {"unit_rate": P, "step_rate": Q, "num_units": UNITS, "interval_steps": INTERVAL}
    return Settings(**{**values, "num_validators": 9, "num_colluding": 3, **changes})


@cache
def draws():
    """What the real draw selects for each of many commitments."""
    terms = AuditTerms(
        unit_rate_ppm=round(P * 1e6), step_rate_ppm=round(Q * 1e6), window_steps=1, window_s=1, auditors=[]
    )
    return [select(seed_of({}, n.to_bytes(32)), terms, UNITS, VALIDATORS[:3]) for n in range(NUM_STEPS)]


def steps_until_seen(attack, rate, colluding):
    """Many runs, one after the other, each from the beginning of a period until its cheat was seen: their lengths."""
    chance, bad = random.Random(f"{attack}{rate}{colluding}"), VALIDATORS[:colluding]
    length = INTERVAL if attack in ("wrong-update", "changed-state") else 1
    lengths, begun, at, times = [], 0, 0, 0
    while at + length <= NUM_STEPS:
        bent_period = chance.random() < rate
        for step in range(length):
            bent = {unit for unit in range(UNITS) if chance.random() < rate}
            whole = {"wrong-output": bent, "wrong-gradient": bent, "wrong-update": bent_period and step == length - 1}
            whole |= {"changed-state": bent_period, "wrong-data": bent, "refused": bent}
            units = {
                "wrong-output": bent,
                "refused": bent,
                "changed-state": range(UNITS) if bent_period else (),
                "wrong-data": range(UNITS) if bent else (),
            }
            seen = any(
                one.auditor not in bad and (whole[attack] if one.tier == 2 else one.unit in units.get(attack, ()))
                for one in draws()[at + step]
            )
            times += seen
            if seen and times == (MAX_STRIKES if attack == "refused" else 1):
                lengths.append(at + step + 1 - begun)
                begun, times = at + length, 0
                break
        at += length
    return lengths


@pytest.mark.parametrize("colluding", [0, 1, 2])
@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("attack", SEEN)
def test_a_simulation_of_the_real_draw_agrees(attack, rate, colluding):
    lengths = steps_until_seen(attack, rate, colluding)
    here = odds(of(cheat_rate=rate), attack, colluding)
    num = len(lengths)
    assert num > 40
    mean = sum(lengths) / num
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / num)
    assert abs(mean - here.expected_steps) < BOUND * spread / math.sqrt(num)
    for within in (1, INTERVAL, 2 * INTERVAL + 1, round(here.expected_steps)):
        expected = here.detection(within)
        seen = sum(length <= within for length in lengths)
        assert abs(seen - num * expected) <= BOUND * math.sqrt(num * expected * (1 - expected)) + 1e-9


def test_the_share_of_jobs_is_that_of_the_real_assignment():
    num = 4000
    counts = dict.fromkeys(range(4), 0)
    for job in range(num):
        counts[len({*VALIDATORS[:3]}.intersection(assigned_validators(job.to_bytes(32), VALIDATORS)))] += 1
    shares = of().shares_of_jobs()
    assert sum(shares.values()) == pytest.approx(1)
    for colluding, share in shares.items():
        assert abs(counts[colluding] - num * share) < BOUND * math.sqrt(num * share * (1 - share))


def test_closed_forms_at_the_default_rates():
    s = of(unit_rate=0.002, step_rate=0.02, num_units=8, interval_steps=4)
    one = 1 - 0.98 * 0.998**8
    assert odds(s, "wrong-output", 0).expected_steps == pytest.approx(1 / one)
    assert odds(s, "wrong-output", 1).expected_steps == pytest.approx(1.5 / one)
    assert odds(s, "wrong-gradient", 0).stake == pytest.approx(8 * 0.98 / 0.02)  # g (1 - q) / q for a step's gain
    assert odds(s, "wrong-gradient", 2).expected_steps == pytest.approx(150)
    assert odds(s, "wrong-update", 0).expected_steps == pytest.approx(200)
    assert odds(s, "changed-state", 0).expected_steps == pytest.approx(1 / one)
    rare = of(unit_rate=0.002, step_rate=0.02, num_units=8, cheat_rate=0.005)
    assert odds(rare, "wrong-output", 0).in_period == pytest.approx(
        0.02 * (1 - 0.995**8) + 0.98 * (1 - (1 - 0.002 * 0.005) ** 8)
    )


rates = st.floats(0.001, 0.999)


@given(
    p=rates,
    q=rates,
    rate=rates,
    units=st.integers(1, 64),
    interval=st.integers(1, 8),
    attack=st.sampled_from(sorted(ATTACKS)),
    colluding=st.integers(0, 3),
)
def test_the_mean_is_the_sum_over_the_chances_not_to_be_seen_and_more_audits_find_sooner(
    p, q, rate, units, interval, attack, colluding
):
    s = of(unit_rate=p, step_rate=q, num_units=units, interval_steps=interval, cheat_rate=rate)
    here = odds(s, attack, colluding)
    detections = [here.detection(step) for step in range(200)]
    assert detections[0] == 0
    assert all(0 <= before <= after + 1e-12 <= 1 + 2e-12 for before, after in pairwise(detections))
    assert sum(1 - detection for detection in detections) <= here.expected_steps * (1 + 1e-9)
    if colluding:
        assert here.expected_steps >= odds(s, attack, colluding - 1).expected_steps
        assert here.stake >= odds(s, attack, colluding - 1).stake
    more = odds(of(**{**vars(s), "step_rate": q + (1 - q) / 2}), attack, colluding)
    assert more.expected_steps <= here.expected_steps * (1 + 1e-9)


@pytest.mark.parametrize("attack", sorted(set(SEEN) - KEEPS_STAKE))
def test_at_the_stake_a_cheat_gains_nothing_however_long_it_goes_on(attack):
    here = odds(of(gain=2.0), attack, 1)
    for periods in (1, 3, 40):
        gained = here.gain * sum((1 - here.in_period) ** k for k in range(1, periods + 1))
        assert here.stake * here.detection(periods * len(here.chances)) == pytest.approx(gained)


def test_three_that_collude_and_what_no_audit_sees_are_never_found():
    for attack in ATTACKS:
        assert odds(of(), attack, 3).expected_steps == odds(of(), attack, 3).stake == math.inf
    for attack in UNDECIDED:
        assert odds(of(unit_rate=1.0, step_rate=1.0), attack, 0).detection(10**9) == 0


def test_withholding_preimages_hides_nothing_while_the_honest_can_shut_out_who_does():
    few = {"num_validators": 4, "num_colluding": 3}
    for attack in sorted(set(SEEN) - {"refused"}):
        assert odds(of(collusion="withhold"), attack, 2) == odds(of(), attack, 0)
        assert odds(of(collusion="withhold", **few), attack, 1).detection(10**9) == 0


def test_refusing_to_open_counts_only_where_the_honest_can_prove_it():
    for few in ({"num_validators": 2, "num_colluding": 0}, {"num_validators": 9, "num_colluding": 5}):
        assert odds(of(**few), "refused", 0).detection(10**9) == 0
    assert odds(of(), "refused", 0).expected_steps == pytest.approx(3 * odds(of(), "wrong-output", 0).expected_steps)


def test_a_third_that_colludes_can_stop_rounds_and_fewer_cannot():
    assert not honest_carry_rounds(of(num_colluding=3))
    assert honest_carry_rounds(of(num_colluding=2))


def test_fewer_than_three_validators_all_audit_and_take_no_stake():
    assert of(num_validators=2, num_colluding=1).shares_of_jobs() == {1: 1.0}
    assert not can_slash(of(num_validators=2, num_colluding=1))
    assert can_slash(of(num_validators=3, num_colluding=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit_rate": 1.5}, "unit_rate 1.5"),
        ({"step_rate": math.nan}, "step_rate nan"),
        ({"num_units": 0}, "num_units 0"),
        ({"num_colluding": 10}, "10 colluding of 9"),
        ({"gain": -1.0}, "gain -1.0"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        of(**changes)


def test_only_the_audit_of_the_step_that_ends_an_interval_sees_its_last_update_bent(rig):
    training = Training(rig, "mlp", interval=INTERVAL, window=2 * INTERVAL)
    stage = training.pipe.stages[1]
    update = stage.optimizer.step
    for step in range(2 * INTERVAL):
        if step == INTERVAL - 1:
            stage.optimizer.step = lambda gradients, groups=None: update(
                {name: gradient * 1.01 for name, gradient in gradients.items()}, groups
            )
        training.step(step)
        stage.optimizer.step = update
    audits = [(step, tier) for step in range(2 * INTERVAL) for tier in (1, 2)]
    seen = [
        (step, tier)
        for step, tier in audits
        if training.examine(1, step, tier, 0 if tier == 1 else -1)["finding"] == "fraudulent"
    ]
    assert seen == [(INTERVAL - 1, 2)]
