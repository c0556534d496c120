"""Nobody gains by cheating at the default settings, and each attacker would where its defence is missing. The long
version is `benchmarks/benchmark_attacks.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from attacks import attackers
from attacks.attackers import SeedGrinder, as_drawn, by_the_last_digest

from smartnodes_core.chain.settings import SNO

ROUNDS = 20


@pytest.mark.parametrize("name", ["wash_trader", "key_squatter", "identity_splitter", "seed_grinder", "bond_griefer"])
def test_an_attacker_gains_nothing_and_would_without_the_defence(name: str) -> None:
    play = getattr(attackers, name)
    assert play(ROUNDS, defended=False) > SNO * ROUNDS
    assert play(ROUNDS) <= 0


def test_a_key_squatter_that_was_there_before_the_first_round_gains_nothing_after_it() -> None:
    assert attackers.key_squatter(ROUNDS, early=True) <= 0


@pytest.mark.parametrize("identities", [2, 3, 7])
def test_splitting_an_identity_loses_at_most_a_wei_a_round_for_each(identities: int) -> None:
    assert -ROUNDS * identities <= attackers.identity_splitter(ROUNDS, identities=identities) <= 0


def test_a_higher_kappa_grants_a_subsidy_of_that_many_fees_less_one() -> None:
    fees_wei = ROUNDS * 5 * SNO  # 5 % of 100 SNO a round
    assert attackers.wash_trader(ROUNDS, kappa_bps=30_000) == 2 * fees_wei
    assert attackers.wash_trader(ROUNDS, kappa_bps=5_000) == -fees_wei // 2


def test_a_proposer_cannot_choose_to_propose_again_however_many_variants_it_tries() -> None:
    proposed = {tries: played(SeedGrinder(60, as_drawn, tries)) for tries in (0, 600)}
    assert proposed[0] == proposed[600] <= 25
    assert played(SeedGrinder(60, by_the_last_digest, 600)) > 50


def played(grinder: SeedGrinder) -> int:
    grinder.play()
    return grinder.proposed


def test_a_griefer_burns_a_bond_for_each_freeze() -> None:
    bond_wei, emission_wei = 10_000 * SNO, 9375 * SNO // 10
    assert attackers.bond_griefer(ROUNDS) <= -ROUNDS * (bond_wei - emission_wei)
