"""Who may be a member, on the contracts and on their twin."""

from __future__ import annotations

import dataclasses

import pytest

from smartnodes_core.chain.base import Member, NoFundsError
from smartnodes_core.chain.packing import pack_reputations
from smartnodes_core.chain.proposal import Admission
from smartnodes_core.chain.settings import SNO, Addresses

from .conftest import NETWORK, OTHER_NETWORK, SETTINGS, World
from .test_round_execution import refused


def test_a_member_is_listed_with_its_state(world: World) -> None:
    before = world.chain(4).balances(world.account(4)).sno_wei
    index = world.chain(4).register("worker", world.key_hash(4), NETWORK)
    [member] = world.chain().members(NETWORK)
    assert index == member.index == 0
    assert member == world.chain().member(NETWORK, world.account(4))
    assert (member.account, member.role, member.key_hash) == (world.account(4), "worker", world.key_hash(4))
    assert (member.reputation, member.live, member.stake_wei, member.exit_at_s) == (1, True, 100 * SNO, 0)
    assert world.chain().balances(world.account(4)).sno_wei == before - 100 * SNO
    assert world.chain().members(OTHER_NETWORK) == []
    assert world.chain().member(NETWORK, world.account(5)) is None


def test_node_keys_and_accounts_are_one_to_one(world: World) -> None:
    world.validators(3)
    world.chain(4).register("user", world.key_hash(4), NETWORK)
    world.admit(4)
    with refused("KeyTaken"):
        world.chain(5).register("user", world.key_hash(4), NETWORK)
    with refused("AlreadyRegistered"):
        world.chain(4).register("user", world.key_hash(5), NETWORK)
    world.chain(5).register("user", world.key_hash(5), NETWORK)
    world.chain(5).register("user", world.key_hash(4), OTHER_NETWORK)


def test_a_key_goes_to_whom_a_round_verified_it_for(world: World) -> None:
    world.validators(3)
    world.chain(4).register("worker", world.key_hash(5), NETWORK)  # a squatter, before the first round
    world.chain(5).register("worker", world.key_hash(5), NETWORK)
    assert [member.live for member in world.chain().members(NETWORK)[3:]] == [True, False]
    world.admit(5)
    assert [member.live for member in world.chain().members(NETWORK)[3:]] == [False, True]
    world.admit(4)  # a key that was verified before stays
    assert [member.verified for member in world.chain().members(NETWORK)[3:]] == [False, True]


def test_nobody_is_live_without_a_round_and_a_key_cannot_be_squatted(world: World) -> None:
    world.validators(3)
    world.execute(world.proposal(), 0, 1, 2)
    world.chain(4).register("worker", world.key_hash(5), NETWORK)
    world.chain(5).register("worker", world.key_hash(5), NETWORK)
    assert not any(member.live for member in world.chain().members(NETWORK)[3:])
    world.execute(world.proposal(admissions=(Admission(4, 7), Admission(99))), 0, 1, 2)
    member = world.chain().member(NETWORK, world.account(5))
    assert (member.live, member.verified, member.capability) == (True, True, 7)
    world.chain(4).request_exit(NETWORK)
    world.pass_time(SETTINGS.exit_delay_s)
    world.chain(4).withdraw_stake(NETWORK)
    assert world.chain().member(NETWORK, world.account(4)).stake_wei == 0


def test_a_rotated_key_keeps_place_stake_and_reputation_and_waits_for_the_next_round(world: World) -> None:
    world.validators(3)
    chain, account = world.chain(4), world.account(4)
    chain.register("worker", world.key_hash(4), NETWORK)
    world.execute(world.proposal(reputations=pack_reputations({3: 9})), 0, 1, 2)
    world.admit(4)
    before = chain.member(NETWORK, account)
    chain.rotate_key(world.key_hash(8), NETWORK)
    after = chain.member(NETWORK, account)
    assert before is not None
    assert after == dataclasses.replace(before, key_hash=world.key_hash(8), verified=False, live=False)
    assert after.reputation == 9
    world.admit(4)
    assert chain.member(NETWORK, account).live
    assert chain.account_of_key(NETWORK, world.key_hash(8)) == account


def test_a_revoked_key_is_never_registered_again_and_names_who_answers_for_it(world: World) -> None:
    world.validators(3)
    chain = world.chain(4)
    chain.register("worker", world.key_hash(4), NETWORK)
    world.chain(5).register("worker", world.key_hash(4), NETWORK)  # the thief asked for it before it was verified
    world.admit(4)
    chain.rotate_key(world.key_hash(8), NETWORK)
    world.admit(5)
    assert not world.chain().member(NETWORK, world.account(5)).verified
    assert chain.account_of_key(NETWORK, world.key_hash(4)) == world.account(4)
    with refused("KeyTaken"):
        world.chain(6).register("worker", world.key_hash(4), NETWORK)
    with refused("KeyTaken"):
        chain.rotate_key(world.key_hash(4), NETWORK)
    chain.request_exit(NETWORK)
    world.pass_time(SETTINGS.exit_delay_s)
    chain.withdraw_stake(NETWORK)
    with refused("NotRegistered"):
        chain.rotate_key(world.key_hash(9), NETWORK)
    with refused("KeyTaken"):
        chain.register("worker", world.key_hash(4), NETWORK)
    chain.register("worker", world.key_hash(8), NETWORK)


def test_a_key_that_is_anothers_or_none_is_not_rotated_to_and_an_unproven_one_blocks_nobody(world: World) -> None:
    world.validators(3)
    world.chain(4).register("worker", world.key_hash(4), NETWORK)
    world.admit(4)
    world.chain(5).register("worker", world.key_hash(9), NETWORK)  # of somebody who comes later
    with refused("KeyTaken"):
        world.chain(5).rotate_key(world.key_hash(4), NETWORK)
    with refused("ZeroKey"):
        world.chain(5).rotate_key(bytes(32), NETWORK)
    with refused("NotRegistered"):
        world.chain(6).rotate_key(world.key_hash(6), NETWORK)
    world.chain(5).rotate_key(world.key_hash(5), NETWORK)
    world.chain(9).register("worker", world.key_hash(9), NETWORK)
    world.admit(9)
    assert world.chain().member(NETWORK, world.account(9)).live


def test_a_validator_that_rotates_its_key_stays_in_the_epoch(world: World) -> None:
    world.validators(3)
    world.execute(world.proposal(), 0, 1, 2)
    world.chain(0).rotate_key(world.key_hash(8), NETWORK)
    assert world.account(0) in world.chain().validators(NETWORK)
    world.execute(world.proposal(admissions=(Admission(0),)), 0, 1, 2)
    member = world.chain().member(NETWORK, world.account(0))
    assert (member.live, member.verified, member.key_hash) == (True, True, world.key_hash(8))


def test_an_empty_key_and_an_unknown_network_are_refused(world: World) -> None:
    with refused("ZeroKey"):
        world.chain(1).register("user", bytes(32), NETWORK)
    with refused("UnknownNetwork"):
        world.chain(1).register("user", world.key_hash(1), 77)
    with refused("UnknownNetwork"):
        world.chain(1).round_state(77)


def test_a_stake_that_is_not_there_cannot_be_given(world: World) -> None:
    with pytest.raises(NoFundsError, match="has 0 wei of SNO"):
        world.chain(12).register("validator", world.key_hash(12), NETWORK)


def test_a_stake_comes_back_after_the_delay_and_not_before(world: World) -> None:
    chain = world.chain(4)
    before = chain.balances(world.account(4)).sno_wei
    chain.register("worker", world.key_hash(4), NETWORK)
    with refused("ExitNotRequested"):
        chain.withdraw_stake(NETWORK)
    chain.request_exit(NETWORK)
    assert not chain.members(NETWORK)[0].live
    with refused("StakeLocked"):
        chain.withdraw_stake(NETWORK)
    world.pass_time(SETTINGS.exit_delay_s)
    chain.withdraw_stake(NETWORK)
    assert chain.balances(world.account(4)).sno_wei == before
    with refused("ExitNotRequested"):
        chain.withdraw_stake(NETWORK)
    with refused("NotRegistered"):
        world.chain(5).request_exit(NETWORK)


def test_who_comes_back_keeps_its_place_and_its_reputation(world: World) -> None:
    world.validators(3)
    chain = world.chain(4)
    chain.register("worker", world.key_hash(4), NETWORK)
    world.execute(world.proposal(reputations=pack_reputations({3: 9})), 0, 1, 2)
    chain.request_exit(NETWORK)
    world.pass_time(SETTINGS.exit_delay_s)
    chain.withdraw_stake(NETWORK)
    assert chain.register("user", world.key_hash(5), NETWORK) == 3
    member = chain.member(NETWORK, world.account(4))
    assert member is not None
    assert (member.reputation, member.role, member.key_hash, member.live) == (9, "user", world.key_hash(5), False)
    world.admit(4)
    assert chain.member(NETWORK, world.account(4)).live
    world.chain(6).register("user", world.key_hash(4), NETWORK)


def test_a_blacklisted_account_stays_out(world: World) -> None:
    world.validators(3)
    chain = world.chain(4)
    chain.register("worker", world.key_hash(4), NETWORK)
    world.admit(4)
    world.execute(world.proposal(reputations=pack_reputations({3: 0})), 0, 1, 2)
    chain.request_exit(NETWORK)
    world.pass_time(SETTINGS.exit_delay_s)
    chain.withdraw_stake(NETWORK)
    with refused("Blacklisted"):
        chain.register("worker", world.key_hash(4), NETWORK)
    with refused("KeyTaken"):
        world.chain(5).register("worker", world.key_hash(4), NETWORK)


def test_tips_are_posted_by_validators_only(world: World) -> None:
    world.validators(1)
    world.chain(0).post_tip(NETWORK, b"t" * 32)
    assert world.chain().members(NETWORK)[0].tip == b"t" * 32
    world.chain(4).register("worker", world.key_hash(4), NETWORK)
    with refused("NotAValidator"):
        world.chain(4).post_tip(NETWORK, b"t" * 32)
    with refused("NotRegistered"):
        world.chain(5).post_tip(NETWORK, b"t" * 32)


def test_members_are_read_again_when_a_block_has_come_and_not_before(
    deployed: tuple[World, Addresses], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, _ = deployed
    world.validators(1)
    chain = world.chain(9)
    reads: list[int] = []
    read = chain._read_members

    def read_and_count(network_id: int) -> list[Member]:
        reads.append(network_id)
        return read(network_id)

    monkeypatch.setattr(chain, "_read_members", read_and_count)
    first = chain.members(NETWORK)
    assert [chain.members(NETWORK) for _ in range(3)] == [first] * 3
    assert len(reads) == 1
    world.chain(1).register("validator", world.key_hash(1), NETWORK)
    assert len(chain.members(NETWORK)) == len(first) + 1
    assert len(reads) == 2
