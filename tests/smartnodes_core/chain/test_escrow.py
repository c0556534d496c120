"""A job's money: every wei ends once, on the contracts and on their twin."""

from __future__ import annotations

from smartnodes_core.chain.proposal import Payment, Settlement

from .conftest import NETWORK, OTHER_NETWORK, SETTINGS, World
from .test_round_execution import refused

JOB = b"j" * 32


def opened(world: World, amount_wei: int) -> bytes:
    world.validators(3)
    deadline_s = world.chain().round_state(NETWORK).chain_time_s + 60
    escrow_id: bytes = world.chain(4).deposit(NETWORK, JOB, amount_wei, deadline_s)
    return escrow_id


def test_paid_and_fee_and_refund_are_what_was_deposited(world: World) -> None:
    escrow_id = opened(world, 1000)
    payer = world.account(4)
    settlement = Settlement(escrow_id, 250, (Payment(world.account(5), 614), Payment(world.account(6), 100)))
    world.execute(world.proposal(settlements=(settlement,)), 0, 1, 2)
    escrow = world.chain().escrow(escrow_id)
    assert escrow is not None
    assert (escrow.deposited_wei, escrow.remaining_wei, escrow.payer) == (1000, 0, payer)
    credits = [world.chain().balances(world.account(i)).credit_wei for i in (4, 5, 6)]
    assert credits == [250, 614, 100]
    before = world.chain().balances(world.account(5)).sno_wei
    world.chain(9).withdraw_credit(world.account(5))
    assert world.chain().balances(world.account(5)).sno_wei == before + 614
    with refused("NothingToWithdraw"):
        world.chain(9).withdraw_credit(world.account(5))


def test_a_settlement_that_cannot_be_covered_is_skipped_and_blocks_nothing(world: World) -> None:
    escrow_id = opened(world, 1000)
    too_much = Settlement(escrow_id, 0, (Payment(world.account(5), 1000),))
    unknown = Settlement(b"u" * 32, 0, (Payment(world.account(5), 1),))
    fine = Settlement(escrow_id, 0, (Payment(world.account(6), 400),))
    world.execute(world.proposal(settlements=(too_much, unknown, fine)), 0, 1, 2)
    assert world.chain().balances(world.account(5)).credit_wei == 0
    assert world.chain().balances(world.account(6)).credit_wei == 400
    escrow = world.chain().escrow(escrow_id)
    assert escrow is not None
    assert escrow.remaining_wei == 580


def test_a_refund_waits_for_the_deadline_and_the_dispute_window(world: World) -> None:
    escrow_id = opened(world, 1000)
    with refused("NotYetRefundable"):
        world.chain(4).refund(escrow_id)
    world.pass_time(60 + SETTINGS.dispute_window_s + 1)
    world.chain(9).refund(escrow_id)
    world.chain(9).refund(escrow_id)
    assert world.chain().balances(world.account(4)).credit_wei == 1000
    with refused("UnknownEscrow"):
        world.chain(4).refund(b"u" * 32)


def test_nobody_can_take_anothers_job_id(world: World) -> None:
    deadline_s = world.chain().round_state(NETWORK).chain_time_s + 60
    first = world.chain(4).deposit(NETWORK, JOB, 10, deadline_s)
    second = world.chain(5).deposit(NETWORK, JOB, 20, deadline_s)
    third = world.chain(4).deposit(OTHER_NETWORK, JOB, 30, deadline_s)
    assert len({first, second, third}) == 3
    assert world.chain(4).deposit(NETWORK, JOB, 5, deadline_s + 9) == first
    escrow = world.chain().escrow(first)
    assert escrow is not None
    assert (escrow.payer, escrow.deposited_wei, escrow.deadline_s) == (world.account(4), 15, deadline_s + 9)
    assert world.chain().escrow(b"u" * 32) is None


def test_an_empty_or_late_deposit_is_refused(world: World) -> None:
    now_s = world.chain().round_state(NETWORK).chain_time_s
    with refused("NothingDeposited"):
        world.chain(4).deposit(NETWORK, JOB, 0, now_s + 60)
    with refused("DeadlineTooEarly"):
        world.chain(4).deposit(NETWORK, JOB, 1, now_s - 1)
