"""What was found and reproduced in the original Smartnodes contracts must not be possible in these."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smartnodes_core.chain.base import NoFundsError
from smartnodes_core.chain.packing import pack_reputations
from smartnodes_core.chain.proposal import (
    CORRECT,
    UPHOLD,
    Admission,
    Equivocation,
    Parameters,
    Payment,
    Place,
    Settlement,
    Slash,
)
from smartnodes_core.chain.settings import SNO
from smartnodes_core.chain.signing import keccak, sign_digest

from .conftest import NETWORK, OTHER_NETWORK, SETTINGS, World
from .test_round_execution import refused, rewarded

JOB = b"j" * 32


def escrow_of(world: World, amount_wei: int) -> bytes:
    deadline_s = world.chain().round_state(NETWORK).chain_time_s + 60
    escrow_id: bytes = world.chain(4).deposit(NETWORK, JOB, amount_wei, deadline_s)
    return escrow_id


def test_a_claim_repeated_is_paid_once(world: World) -> None:
    tree = rewarded(world, 1000)
    world.pass_time(SETTINGS.claim_delay_s)
    proof = tree.proof(world.account(5))
    paid = [world.chain(7).claim(NETWORK, 1, world.account(5), 1000, proof) for _ in range(10)]
    assert sum(paid) == 1000


def test_the_executor_chooses_nothing_that_was_not_signed(world: World) -> None:
    world.validators(3)
    tree = world.rewards({world.account(5): 1000})
    proposal = world.proposal(rewards_root=tree.root, allotment_wei=1000)
    signatures = world.sign(proposal, 0, 1, 2)
    with refused("QuorumMissing"):
        world.chain(9).execute_round(replace(proposal, allotment_wei=100), signatures)
    world.chain(9).execute_round(proposal, signatures)


def test_who_votes_leaves_and_rejoins_has_one_vote(world: World) -> None:
    world.validators(4)
    proposal = world.proposal()
    signatures = world.sign(proposal, 3)
    world.chain(3).request_exit(NETWORK)
    with refused("AlreadyRegistered"):  # not before its stake has been withdrawn, after the delay
        world.chain(3).register("validator", world.key_hash(3), NETWORK)
    with refused("QuorumMissing"):
        world.chain().execute_round(proposal, [*signatures, *world.sign(proposal, 0, 1)])


def test_a_stake_can_be_withdrawn_without_any_round(world: World) -> None:
    world.validators(3)
    for i in range(3):
        world.chain(i).request_exit(NETWORK)
    world.pass_time(SETTINGS.exit_delay_s)
    for i in range(3):
        before = world.chain().balances(world.account(i)).sno_wei
        world.chain(i).withdraw_stake(NETWORK)
        assert world.chain().balances(world.account(i)).sno_wei == before + 1_000_000 * SNO


def test_a_payment_is_never_truncated(world: World) -> None:
    world.validators(3)
    amount = (1 << 80) + 12345  # 1.2 million SNO: does not fit into 80 bits
    escrow_id = escrow_of(world, amount)
    paid = amount * 10_000 // 10_500 - 1
    world.execute(world.proposal(settlements=(Settlement(escrow_id, 0, (Payment(world.account(5), paid),)),)), 0, 1, 2)
    assert world.chain().balances(world.account(5)).credit_wei == paid


def test_what_a_settled_job_leaves_goes_back_to_its_payer(world: World) -> None:
    world.validators(3)
    escrow_id = escrow_of(world, 10_000)
    world.execute(world.proposal(settlements=(Settlement(escrow_id, 0, (Payment(world.account(5), 1000),)),)), 0, 1, 2)
    world.pass_time(60 + SETTINGS.dispute_window_s + 1)
    world.chain(9).refund(escrow_id)
    assert world.chain().balances(world.account(4)).credit_wei == 10_000 - 1000 - 50
    assert world.chain().escrow(escrow_id).remaining_wei == 0


def test_a_validator_slashed_to_nothing_no_longer_votes(world: World) -> None:
    world.validators(4)
    world.execute(world.proposal(slashes=(Slash(3, 10**30),)), 0, 1, 2)
    with refused("QuorumMissing"):
        world.execute(world.proposal(), 0, 1, 3)


def test_intervals_and_delays_are_all_seconds(world: World) -> None:
    state = world.chain().round_state(NETWORK)
    assert state.earliest_at_s - state.executed_at_s == SETTINGS.round_interval_s == state.interval_s
    assert state.claim_delay_s == SETTINGS.claim_delay_s


def test_a_proposal_after_its_time_wipes_nothing_that_was_approved(world: World) -> None:
    world.validators(3)
    approved = world.proposal()
    late = replace(approved, view=1, jobs_created=(JOB,))
    world.execute(approved, 0, 1, 2)
    with refused("WrongRound"):
        world.execute(late, 0, 1, 2)
    assert world.chain().round_state(NETWORK).previous_hash == world.chain().proposal_digest(approved)


def test_a_receiver_that_cannot_be_paid_blocks_no_round(world: World) -> None:
    """Payments are pulled: a round only writes down what is owed, in SNO or coin."""
    world.validators(3)
    deadline_s = world.chain().round_state(NETWORK).chain_time_s + 60
    escrow_id = world.chain(4).deposit_coin(NETWORK, JOB, 1000, deadline_s)
    registry = world.chain().registry_address  # takes no coins
    world.execute(world.proposal(settlements=(Settlement(escrow_id, 100, (Payment(registry, 900),)),)), 0, 1, 2)
    assert world.chain().balances(registry).coin_credit_wei == 900
    before = world.chain().balances(world.account(9)).coin_wei
    world.chain(4).withdraw_coin_credit(world.account(9))
    assert world.chain().balances(world.account(9)).coin_wei == before + 100


# -- what is new here, and must not become a fault ---------------------------------------------------------------------


def test_one_job_is_paid_in_one_currency(world: World) -> None:
    escrow_of(world, 1000)
    deadline_s = world.chain().round_state(NETWORK).chain_time_s + 60
    with refused("OtherCurrency"):
        world.chain(4).deposit_coin(NETWORK, JOB, 1000, deadline_s)


def test_seven_days_without_a_round_free_every_escrow(world: World) -> None:
    now_s = world.chain().round_state(NETWORK).chain_time_s
    escrow_id = world.chain(4).deposit(NETWORK, JOB, 1000, now_s + 365 * 24 * 3600)
    with refused("NotYetRefundable"):
        world.chain(4).refund(escrow_id)
    world.pass_time(7 * 24 * 3600 + 60)
    world.chain(4).refund(escrow_id)
    assert world.chain().balances(world.account(4)).credit_wei == 1000


def test_two_signatures_for_one_place_end_a_validator_at_once(world: World) -> None:
    world.validators(4)
    place = Place(NETWORK, 1, 0, bytes(32))
    contents = (keccak(b"one"), keccak(b"other"))
    signatures = [sign_digest(world.key(3), world.chain().domain.digest_of(place, each)) for each in contents]
    proof = Equivocation(place, contents, (signatures[0], signatures[1]))
    with refused("NoEquivocation"):
        world.chain(9).prove_equivocation(replace(proof, contents=(contents[0],) * 2, signatures=(signatures[0],) * 2))
    other = sign_digest(world.key(2), world.chain().domain.digest_of(place, contents[1]))
    with refused("NoEquivocation"):
        world.chain(9).prove_equivocation(replace(proof, signatures=(signatures[0], other)))
    world.chain(9).prove_equivocation(proof)
    assert len(world.chain().validators(NETWORK)) == 3
    with refused("Convicted"):
        world.chain(9).prove_equivocation(proof)
    world.chain(3).request_exit(NETWORK)
    world.pass_time(SETTINGS.exit_delay_s)
    with refused("Convicted"):
        world.chain(3).withdraw_stake(NETWORK)
    world.execute(world.proposal(), 0, 1, 2)
    member = world.chain().member(NETWORK, world.account(3))
    assert (member.stake_wei, member.reputation, member.live) == (0, 0, False)


def test_late_signatures_share_until_the_next_round_is_due(world: World) -> None:
    world.validators(4)
    proposal = world.proposal()
    world.execute(proposal, 0, 1, 2)
    late = world.sign(proposal, 3, 9)
    world.chain(9).endorse_round(NETWORK, late)
    world.chain(9).endorse_round(NETWORK, late)
    executed = world.chain().executed_round(NETWORK, 1)
    assert executed.signers == tuple(sorted(world.account(i) for i in range(4)))
    world.pass_time(SETTINGS.round_interval_s)
    with refused("EndorsementTooLate"):
        world.chain(9).endorse_round(NETWORK, late)


def test_a_frozen_root_pays_nothing_until_a_quorum_upholds_it(world: World) -> None:
    tree = rewarded(world, 1000)
    with refused("OnlyValidators"):
        world.chain(4).freeze_root(NETWORK, 1)
    world.chain(0).freeze_root(NETWORK, 1)
    with refused("RootFrozen"):
        world.chain(1).freeze_root(NETWORK, 1)
    before = world.chain().balances(world.account(0)).sno_wei
    world.execute(world.proposal(), 0, 1, 2)
    world.pass_time(SETTINGS.claim_delay_s)
    with refused("RootFrozen"):
        world.chain(5).claim(NETWORK, 1, world.account(5), 1000, tree.proof(world.account(5)))
    world.execute(world.proposal(ruling=UPHOLD, ruled_round=1), 0, 1, 2)
    assert world.chain(5).claim(NETWORK, 1, world.account(5), 1000, tree.proof(world.account(5))) == 1000
    assert world.chain().balances(world.account(0)).sno_wei == before  # the bond is gone
    with refused("RootIsFinal"):
        world.chain(0).freeze_root(NETWORK, 1)


def test_a_corrected_root_is_void_and_the_bond_comes_back(world: World) -> None:
    wrong = rewarded(world, 1000)
    before = world.chain().balances(world.account(0)).sno_wei
    world.chain(0).freeze_root(NETWORK, 1)
    right = world.rewards({world.account(6): 500})
    world.execute(world.proposal(rewards_root=right.root, allotment_wei=500, ruling=CORRECT, ruled_round=1), 0, 1, 2)
    assert world.chain().balances(world.account(0)).sno_wei == before
    assert world.chain().round_state(NETWORK).unclaimed_wei == 500
    world.pass_time(SETTINGS.claim_delay_s)
    with refused("NoRoot"):
        world.chain(5).claim(NETWORK, 1, world.account(5), 1000, wrong.proof(world.account(5)))
    assert world.chain(5).claim(NETWORK, 2, world.account(6), 500, right.proof(world.account(6))) == 500


def test_workers_share_at_most_kappa_times_the_fees_burned(world: World) -> None:
    world.validators(3)
    world.execute(world.proposal(parameters=(Parameters(fee_bps=1000, kappa_bps=10_000),)), 0, 1, 2)
    assert world.chain().parameters(NETWORK) == Parameters(1000, 10_000)
    escrow_id = escrow_of(world, 11_000)
    settlement = Settlement(escrow_id, 0, (Payment(world.account(5), 10_000),))
    proposal = world.proposal(settlements=(settlement,), rewards_root=b"r" * 32)
    emission = world.chain().emission_wei(NETWORK, proposal.until_s)
    most = emission - emission * 85 // 100 + 1000
    with refused("AllotmentTooLarge"):
        world.execute(replace(proposal, allotment_wei=most + 1), 0, 1, 2)
    world.execute(replace(proposal, allotment_wei=most), 0, 1, 2)
    assert world.chain().escrow(escrow_id).remaining_wei == 0


def test_one_network_cannot_reach_what_another_was_allotted(world: World) -> None:
    rewarded(world, 1000)
    for i in range(3):
        world.chain(i).register("validator", world.key_hash(i), OTHER_NETWORK)
    domain = world.chain().domain
    greedy = type(world.rewards({}))(domain.chain_id, domain.contract, OTHER_NETWORK, {world.account(5): 500})
    state = world.chain().round_state(OTHER_NETWORK)
    world.pass_time(SETTINGS.round_interval_s)
    now_s = world.chain().round_state(OTHER_NETWORK).chain_time_s
    world.execute(
        replace(
            world.proposal(rewards_root=greedy.root),
            network_id=OTHER_NETWORK,
            round=1,
            previous_hash=state.previous_hash,
            until_s=now_s,
        ),
        0,
        1,
        2,
    )
    world.pass_time(SETTINGS.claim_delay_s)
    with pytest.raises(NoFundsError):
        world.chain(5).claim(OTHER_NETWORK, 1, world.account(5), 500, greedy.proof(world.account(5)))


def test_what_changed_since_it_was_signed_blocks_no_round(world: World) -> None:
    world.validators(3)
    world.chain(4).register("worker", world.key_hash(4), NETWORK)
    proposal = world.proposal(
        reputations=pack_reputations({3: 5}),
        slashes=(Slash(3, 10**30), Slash(77, 1)),
        admissions=(Admission(3), Admission(3), Admission(78)),
        settlements=(Settlement(b"u" * 32, 0, (Payment(world.account(5), 1 << 255),) * 2),),
        ruling=CORRECT,
        ruled_round=1,
    )
    world.chain(4).request_exit(NETWORK)
    world.execute(proposal, 0, 1, 2)
    assert world.chain().round_state(NETWORK).number == 1
