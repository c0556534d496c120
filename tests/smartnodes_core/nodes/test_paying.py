"""Jobs that pay: escrows are settled as work is verified, and the rest goes back to the author."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from smartnodes_core.chain.base import RefusedError
from smartnodes_core.chain.proposal import Parameters
from smartnodes_core.chain.settings import SNO
from smartnodes_core.errors import JobError, RecordError
from smartnodes_core.nodes.paying import Offer, take_back, withdraw
from smartnodes_core.payments import Price

from .conftest import NETWORK

PRICE = Price(SNO, 10)  # 1 SNO for one micro-batch of a stage
TERMS = Offer(PRICE, 0, 0).terms()


def pay(net: Any, record: Any, amount_wei: int, in_coin: bool = False) -> bytes:
    return Offer(PRICE, amount_wei, 3600, in_coin).deposit(net.user.chain, NETWORK, record.digest())


def credits_of(net: Any, citizen: Any, in_coin: bool = False) -> int:
    balances = net.user.chain.balances(citizen.account)
    return balances.coin_credit_wei if in_coin else balances.credit_wei


@pytest.fixture
def capped(make_net: Any) -> Any:
    """Workers earn no more emission than the fees that their job burned."""
    net = make_net()
    network = net.model.peek(NETWORK)
    network.parameters = Parameters(500, 10_000)
    return net


def test_a_job_pays_for_each_step_as_it_is_verified_and_what_is_left_goes_back(capped: Any, eventually: Any) -> None:
    net = capped
    net.start(rounds=True)
    record = net.record(terms=TERMS)
    escrow_id = pay(net, record, 100 * SNO)
    job = net.open(record)
    net.work(job, range(4))  # two stages, two micro-batches: 2 SNO for each worker and step
    eventually(lambda: credits_of(net, net.workers[0]) == credits_of(net, net.workers[1]) == 4 * SNO)
    escrow = net.user.chain.escrow(escrow_id)
    assert escrow.remaining_wei == 100 * SNO - 8 * SNO * 105 // 100  # two steps are within the audit's window still
    net.user.role.close_job(job)
    eventually(lambda: credits_of(net, net.workers[0]) == credits_of(net, net.workers[1]) == 8 * SNO)
    number = net.user.chain.round_state(NETWORK).number
    eventually(lambda: net.user.chain.round_state(NETWORK).number >= number + 2)
    assert credits_of(net, net.workers[0]) == 8 * SNO
    books = net.validators[0].role.rounds.books
    eventually(lambda: books.rewards.totals_wei.get(net.workers[0].account, 0))
    fees_wei = 16 * SNO * 5 // 100
    assert sum(books.rewards.totals_wei.get(worker.account, 0) for worker in net.workers) <= fees_wei
    with pytest.raises(RefusedError, match="NotYetRefundable"):
        net.user.chain.refund(escrow_id)
    net.model.shift_s += 3600 + net.model.settings.dispute_window_s + 60
    tokens_wei = net.model.tokens[net.user.account]
    left_wei = take_back(net.user.chain, NETWORK, job.id)
    assert left_wei == 100 * SNO - 16 * SNO * 105 // 100
    assert net.model.tokens[net.user.account] == tokens_wei + left_wei
    assert take_back(net.user.chain, NETWORK, job.id) == 0
    with pytest.raises(JobError, match="has deposited nothing"):
        take_back(net.workers[0].chain, NETWORK, job.id)


def test_a_job_paid_in_coin_earns_no_emission_and_its_fee_is_the_signers(make_net: Any, eventually: Any) -> None:
    net = make_net()
    net.model.peek(NETWORK).parameters = replace(net.model.peek(NETWORK).parameters, fee_bps=500)
    net.start(rounds=True)
    eventually(lambda: net.user.chain.round_state(NETWORK).number >= 1)  # whose signers are there to be paid
    record = net.record(terms=TERMS)
    pay(net, record, 100 * SNO, in_coin=True)
    net.work(net.open(record), range(4))
    eventually(lambda: credits_of(net, net.workers[0], in_coin=True) == 4 * SNO)
    fee_wei = 8 * SNO * 5 // 100
    shares = [credits_of(net, validator, in_coin=True) for validator in net.validators]
    assert 0 < sum(shares) <= fee_wei
    assert sum(shares) > fee_wei - 4
    worker = net.workers[0]
    assert withdraw(net.user.chain, worker.account) == (0, 0)  # coin goes only to who asks for it
    assert withdraw(worker.chain, worker.account) == (0, 4 * SNO)
    assert withdraw(worker.chain, worker.account) == (0, 0)
    eventually(lambda: net.validators[0].role.rounds.books.rewards.totals_wei)
    assert all(worker.account not in net.validators[0].role.rounds.books.rewards.totals_wei for worker in net.workers)


def test_an_escrow_that_runs_dry_pays_what_it_has_in_proportion(capped: Any, eventually: Any) -> None:
    net = capped
    net.start(rounds=True)
    record = net.record(terms=TERMS)
    escrow_id = pay(net, record, SNO)
    net.work(net.open(record), range(4))
    eventually(lambda: credits_of(net, net.workers[0]) > 0)
    assert credits_of(net, net.workers[0]) == credits_of(net, net.workers[1])
    assert net.user.chain.escrow(escrow_id).remaining_wei < 4
    credited, tokens = credits_of(net, net.workers[0]), net.model.tokens.get(net.workers[0].account, 0)
    assert withdraw(net.user.chain, net.workers[0].account) == (credited, 0)  # anybody may ask, the owner is paid
    assert net.model.tokens[net.workers[0].account] == tokens + credited
    number = net.user.chain.round_state(NETWORK).number
    eventually(lambda: net.user.chain.round_state(NETWORK).number >= number + 1)  # and rounds go on


def test_nothing_is_settled_from_an_escrow_that_its_payer_may_empty_meanwhile(net: Any, eventually: Any) -> None:
    record = net.record(terms=TERMS)
    pay(net, record, 100 * SNO)
    job = net.open(record)
    books = net.validators[0].role.rounds.books
    state = net.user.chain.round_state(NETWORK)
    units = {net.workers[0].account: 20}
    assert books.escrows.work(job, units, state).available_wei == 100 * SNO
    refundable_s = net.model.escrows[net.user.chain.escrow_id(NETWORK, net.user.account, job.id)].deadline_s
    refundable_s += net.model.settings.dispute_window_s
    late = replace(state, chain_time_s=refundable_s - 1, executed_at_s=refundable_s - 10)
    assert books.escrows.work(job, units, late).available_wei == 0
    silent = replace(state, chain_time_s=state.executed_at_s + 7 * 24 * 3600)
    assert books.escrows.work(job, units, silent).available_wei == 0


def test_a_job_that_promises_pay_without_a_deposit_is_not_opened(net: Any) -> None:
    with pytest.raises(JobError, match="its escrow is empty: deposit"):
        net.open(net.record(terms=TERMS))
    with pytest.raises(RecordError, match="price_wei"):
        net.open(net.record(terms={"price_wei": "much"}))
