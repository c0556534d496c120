"""What a round may do, on the contracts and on their twin."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smartnodes_core.chain.base import NoFundsError, RefusedError
from smartnodes_core.chain.merkle import RewardTree
from smartnodes_core.chain.packing import pack_reputations
from smartnodes_core.chain.proposal import UPHOLD, Admission, Parameters, Payment, RoundProposal, Settlement, Slash
from smartnodes_core.chain.signing import sign_digest
from smartnodes_core.rounds import quorum

from .conftest import NETWORK, OTHER_NETWORK, SETTINGS, World


def refused(reason: str) -> pytest.RaisesExc[RefusedError]:
    return pytest.RaisesExc(RefusedError, check=lambda error: error.reason == reason)


def test_a_round_needs_signatures_of_more_than_two_thirds(world: World) -> None:
    world.validators(4)
    assert quorum(4) == 3
    proposal = world.proposal()
    with refused("QuorumMissing"):
        world.execute(proposal, 0, 1)
    world.execute(proposal, 0, 1, 3)
    executed = world.chain().executed_round(NETWORK, 1)
    assert executed is not None
    assert sorted(executed.signers) == sorted(world.account(i) for i in (0, 1, 3))
    assert (
        executed.digest == world.chain().round_state(NETWORK).previous_hash == world.chain().proposal_digest(proposal)
    )


def test_a_signature_repeated_counts_once(world: World) -> None:
    world.validators(3)
    proposal = world.proposal()
    with refused("QuorumMissing"):
        world.execute(proposal, 0, 0, 0, 1)


def test_signatures_of_outsiders_are_not_counted_and_do_not_block(world: World) -> None:
    world.validators(3)
    proposal = world.proposal()
    with refused("QuorumMissing"):
        world.execute(proposal, 0, 1, 8, 9)
    world.execute(proposal, 0, 1, 2, 8, 9)
    executed = world.chain().executed_round(NETWORK, 1)
    assert executed is not None
    assert len(executed.signers) == 3


def test_an_executed_round_cannot_be_replayed(world: World) -> None:
    world.validators(3)
    proposal = world.proposal()
    world.execute(proposal, 0, 1, 2)
    world.pass_time(SETTINGS.round_interval_s)
    with refused("WrongRound"):
        world.execute(proposal, 0, 1, 2)
    assert world.chain().round_state(NETWORK).number == 1


def test_a_round_must_name_the_one_before(world: World) -> None:
    world.validators(3)
    world.execute(world.proposal(), 0, 1, 2)
    with refused("WrongPrevious"):
        world.execute(world.proposal(previous_hash=b"p" * 32), 0, 1, 2)


def test_no_round_before_the_interval_has_passed(world: World) -> None:
    world.validators(3)
    world.execute(world.proposal(), 0, 1, 2)
    state = world.chain().round_state(NETWORK)
    early = RoundProposal(NETWORK, 2, 0, state.previous_hash, state.chain_time_s)
    with refused("TooEarly"):
        world.execute(early, 0, 1, 2)
    assert state.earliest_at_s == state.executed_at_s + SETTINGS.round_interval_s


def changed_fields() -> list[dict[str, object]]:
    return [
        {"network_id": OTHER_NETWORK},
        {"view": 1},
        {"until_s": -1},
        {"reputations": pack_reputations({0: 200})},
        {"rewards_root": b"r" * 32},
        {"allotment_wei": 1, "rewards_root": b"x" * 32},
        {"jobs_created": (b"j" * 32,)},
        {"jobs_completed": (b"j" * 32,)},
        {"slashes": (Slash(0, 1),)},
        {"settlements": (Settlement(b"e" * 32, 0, (Payment(bytes(20), 1),)),)},
        {"jobs_disputed": (b"j" * 32,)},
        {"admissions": (Admission(0),)},
        {"ruling": UPHOLD},
        {"ruled_round": 1},
        {"parameters": (Parameters(1, 1),)},
        {"evidence_root": b"e" * 32},
    ]


@pytest.mark.parametrize("changes", changed_fields(), ids=lambda changes: next(iter(changes)))
def test_changing_any_field_of_a_signed_proposal_is_refused(world: World, changes: dict[str, object]) -> None:
    world.validators(3)
    proposal = world.proposal()
    signatures = world.sign(proposal, 0, 1, 2)
    if changes.get("until_s") == -1:
        changes = {"until_s": proposal.until_s - 1}
    with refused("QuorumMissing"):
        world.chain().execute_round(replace(proposal, **changes), signatures)  # type: ignore[arg-type]


def test_a_view_is_part_of_what_is_signed(world: World) -> None:
    world.validators(3)
    proposal = world.proposal(view=5)
    world.execute(proposal, 0, 1, 2)
    executed = world.chain().executed_round(NETWORK, 1)
    assert executed is not None
    assert executed.view == 5


def test_signatures_for_another_contract_are_worthless(world: World) -> None:
    world.validators(3)
    proposal = world.proposal()
    elsewhere = replace(world.chain().domain, contract=b"c" * 20).digest(proposal)
    with refused("QuorumMissing"):
        world.chain().execute_round(proposal, [sign_digest(world.key(i), elsewhere) for i in range(3)])


def test_a_reputation_update_leaves_its_neighbours_alone(world: World) -> None:
    world.validators(3)
    for i in range(3, 7):
        world.chain(i).register("worker", world.key_hash(i), NETWORK)
    world.execute(world.proposal(reputations=pack_reputations({3: 77, 5: 0})), 0, 1, 2)
    members = world.chain().members(NETWORK)
    assert [member.reputation for member in members] == [1, 1, 1, 77, 1, 0, 1]
    assert [member.live for member in members] == [True] * 5 + [False, True]


def test_a_reputation_of_nobody_is_refused(world: World) -> None:
    world.validators(3)
    with refused("BadReputationUpdate"):
        world.execute(world.proposal(reputations=pack_reputations({3: 9})), 0, 1, 2)


def test_a_blacklisted_validator_no_longer_counts(world: World) -> None:
    world.validators(4)
    world.execute(world.proposal(reputations=pack_reputations({3: 0})), 0, 1, 2)
    assert world.account(3) not in world.chain().validators(NETWORK)
    with refused("QuorumMissing"):
        world.execute(world.proposal(), 0, 1, 3)


def test_a_slashed_validator_no_longer_counts_and_its_stake_is_burned(world: World) -> None:
    world.validators(4)
    world.execute(world.proposal(slashes=(Slash(3, 10**30), Slash(99, 1))), 0, 1, 2)
    member = world.chain().member(NETWORK, world.account(3))
    assert member is not None
    assert member.stake_wei == 0
    assert not member.live
    with refused("QuorumMissing"):
        world.execute(world.proposal(), 0, 1, 3)


def test_leaving_and_coming_back_adds_no_vote(world: World) -> None:
    world.validators(4)
    world.execute(world.proposal(), 0, 1, 2)
    world.chain(3).request_exit(NETWORK)
    assert len(world.chain().validators(NETWORK)) == 3
    world.pass_time(SETTINGS.exit_delay_s)
    world.chain(3).withdraw_stake(NETWORK)
    world.chain(3).register("validator", world.key_hash(3), NETWORK)
    assert len(world.chain().validators(NETWORK)) == 3
    world.admit(3)
    assert len(world.chain().validators(NETWORK)) == 4


def test_a_validator_that_joins_counts_from_the_round_that_admits_it_on(world: World) -> None:
    world.validators(3)
    world.execute(world.proposal(), 0, 1, 2)
    world.chain(3).register("validator", world.key_hash(3), NETWORK)
    world.execute(world.proposal(), 0, 1, 2)
    assert world.account(3) not in world.chain().validators(NETWORK)
    world.admit(3)
    assert world.account(3) in world.chain().validators(NETWORK)


def test_no_round_mints_beyond_the_emission(world: World) -> None:
    world.validators(3)
    proposal = world.proposal()
    emission = world.chain().emission_wei(NETWORK, proposal.until_s)
    # 80 % of 937.5 SNO per 600 s: the network's share
    elapsed = proposal.until_s - world.chain().round_state(NETWORK).emitted_until_s
    assert emission == min(elapsed, 2 * SETTINGS.round_interval_s) * SETTINGS.emission_wei // 600 * 8 // 10
    greedy = replace(proposal, allotment_wei=emission + 1, rewards_root=b"r" * 32)
    with refused("AllotmentTooLarge"):
        world.execute(greedy, 0, 1, 2)
    world.execute(replace(greedy, allotment_wei=emission), 0, 1, 2)
    assert world.chain().round_state(NETWORK).unclaimed_wei == emission
    assert world.chain().emission_wei(NETWORK, proposal.until_s) == 0


def test_silence_is_no_backlog_to_grab(world: World) -> None:
    world.validators(3)
    world.pass_time(100 * SETTINGS.round_interval_s)
    until = world.chain().round_state(NETWORK).chain_time_s
    two_intervals = 2 * SETTINGS.round_interval_s * SETTINGS.emission_wei // 600 * 8 // 10
    assert world.chain().emission_wei(NETWORK, until) == two_intervals


def test_emission_of_the_future_cannot_be_taken(world: World) -> None:
    world.validators(3)
    proposal = world.proposal()
    with refused("BadEmissionTime"):
        world.execute(replace(proposal, until_s=proposal.until_s + 3600), 0, 1, 2)


def test_an_allotment_without_a_root_is_refused(world: World) -> None:
    world.validators(3)
    with refused("AllotmentWithoutRoot"):
        world.execute(world.proposal(allotment_wei=1), 0, 1, 2)


def rewarded(world: World, wei: int) -> RewardTree:
    """A round that gives `wei` to account 5 and as much to account 6."""
    world.validators(3)
    tree = world.rewards({world.account(5): wei, world.account(6): wei})
    world.execute(world.proposal(rewards_root=tree.root, allotment_wei=2 * wei), 0, 1, 2)
    return tree


def test_a_reward_is_paid_once_however_often_it_is_claimed(world: World) -> None:
    tree = rewarded(world, 1000)
    account, proof = world.account(5), tree.proof(world.account(5))
    before = world.chain().balances(account).sno_wei
    world.pass_time(SETTINGS.claim_delay_s)
    assert world.chain().round_state(NETWORK).final_root == tree.root
    assert world.chain().claimable_wei(NETWORK, account, 1000) == 1000
    assert world.chain(7).claim(NETWORK, 1, account, 1000, proof) == 1000
    assert world.chain(7).claim(NETWORK, 1, account, 1000, proof) == 0
    assert world.chain().balances(account).sno_wei == before + 1000
    assert world.chain().claimed_wei(NETWORK, account) == 1000


def test_a_claim_before_the_delay_is_refused(world: World) -> None:
    tree = rewarded(world, 1000)
    assert world.chain().round_state(NETWORK).final_root_round == 0
    with refused("ClaimTooEarly"):
        world.chain().claim(NETWORK, 1, world.account(5), 1000, tree.proof(world.account(5)))


def test_a_claim_of_another_amount_or_network_or_round_is_refused(world: World) -> None:
    tree = rewarded(world, 1000)
    proof = tree.proof(world.account(5))
    world.pass_time(SETTINGS.claim_delay_s)
    with refused("BadProof"):
        world.chain().claim(NETWORK, 1, world.account(5), 1001, proof)
    with refused("BadProof"):
        world.chain().claim(NETWORK, 1, world.account(7), 1000, proof)
    with refused("NoRoot"):
        world.chain().claim(OTHER_NETWORK, 1, world.account(5), 1000, proof)
    with refused("NoRoot"):
        world.chain().claim(NETWORK, 65, world.account(5), 1000, proof)


def test_one_claim_covers_all_rounds_and_a_running_network_can_claim(world: World) -> None:
    rewarded(world, 1000)
    tree = world.rewards({world.account(5): 2500, world.account(6): 1000})
    world.execute(world.proposal(rewards_root=tree.root, allotment_wei=1500), 0, 1, 2)
    world.execute(world.proposal(), 0, 1, 2)
    world.pass_time(SETTINGS.claim_delay_s - SETTINGS.round_interval_s)
    state = world.chain().round_state(NETWORK)
    assert (state.final_root_round, state.final_root) == (2, tree.root)
    assert world.chain().claim(NETWORK, 2, world.account(5), 2500, tree.proof(world.account(5))) == 2500


def test_a_root_that_promises_more_than_was_allotted_cannot_be_emptied(world: World) -> None:
    world.validators(3)
    tree = world.rewards({world.account(5): 5000})
    world.execute(world.proposal(rewards_root=tree.root, allotment_wei=1000), 0, 1, 2)
    world.pass_time(SETTINGS.claim_delay_s)
    with pytest.raises(NoFundsError):
        world.chain().claim(NETWORK, 1, world.account(5), 5000, tree.proof(world.account(5)))
