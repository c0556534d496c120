"""Escrows of jobs: filled by their authors, and as validators see them: what a round may take from each, and which jobs
are paid for at all.

The rules are pure and live in `smartnodes_core/payments.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smartnodes_core.chain.base import Chain, EscrowAccount, RoundState
from smartnodes_core.errors import JobError
from smartnodes_core.jobs import Job
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.payments import PRICE, UNITS, JobWork, Price

#: Without a round for this long payers may take back what is left (`Escrow.SILENCE`).
SILENCE_S = 7 * 24 * 3600
#: Rounds before a payer may take back in which nothing is settled any more: what it takes back in between would make
#: the whole round fail.
MARGIN_ROUNDS = 2


@dataclass(frozen=True)
class Offer:
    """What an author pays for a job: the price in its terms, and the deposit (wei of SNO, or of the chain's coin) from
    which it is paid. What is left can be taken back when `lasts_s` and then the dispute window have passed.
    """

    price: Price
    deposit_wei: int
    lasts_s: int
    in_coin: bool = False

    def terms(self) -> dict[str, int | str]:
        """What the job record's terms say of it."""
        return {PRICE: str(self.price.wei), UNITS: self.price.per_units}

    def deposit(self, chain: Chain, network_id: int, job_id: bytes) -> bytes:
        """Fill the job's escrow, before it is opened; returns its id. Raises NoFundsError, ChainError."""
        deposit = chain.deposit_coin if self.in_coin else chain.deposit
        deadline_s = chain.round_state(network_id).chain_time_s + self.lasts_s
        return deposit(network_id, job_id, self.deposit_wei, deadline_s)


def take_back(chain: Chain, network_id: int, job_id: bytes) -> int:
    """What is left of this account's deposit for a job, paid out to it; returns the wei. Raises JobError where nothing
    was deposited, RefusedError (NotYetRefundable, with the time) before the deadline and the dispute window are over.
    """
    escrow_id = chain.escrow_id(network_id, chain.account, job_id)
    escrow = chain.escrow(escrow_id)
    if escrow is None:
        raise JobError(f"account 0x{chain.account.hex()} has deposited nothing for job {job_id.hex()}")
    if escrow.remaining_wei:
        chain.refund(escrow_id)
        if escrow.in_coin:
            chain.withdraw_coin_credit(chain.account)
        else:
            chain.withdraw_credit(chain.account)
    return escrow.remaining_wei


def withdraw(chain: Chain, account: bytes) -> tuple[int, int]:
    """What escrows have credited an account, paid out to it: wei of SNO, which anybody may ask for, and of coin, which
    only the account itself may. Raises ChainError; what was paid out stays so."""
    credited = chain.balances(account)
    coin_wei = credited.coin_credit_wei if account == chain.account else 0
    if credited.credit_wei:
        chain.withdraw_credit(account)
    if coin_wei:
        chain.withdraw_coin_credit(account)
    return credited.credit_wei, coin_wei


class Escrows:
    """Reads escrows of jobs in one network."""

    def __init__(self, chain: Chain, network_id: int, membership: Membership):
        self._chain, self._network_id, self._membership = chain, network_id, membership

    def work(self, job: Job, units: Mapping[bytes, int], state: RoundState) -> JobWork:
        """The work of a job in the next round. Asks the chain once for a job that names a price; raises ChainError."""
        price = Price.of(job.record.terms)
        if price is None:
            return JobWork(job.id, units)
        escrow_id = self._id(job)
        escrow = self._chain.escrow(escrow_id) if escrow_id else None
        if escrow is None or escrow_id is None:
            return JobWork(job.id, units, price)
        available_wei = escrow.remaining_wei if self._is_settleable(escrow, state) else 0
        return JobWork(job.id, units, price, escrow_id, escrow.in_coin, available_wei)

    def check(self, job: Job) -> None:
        """Raises JobError for a job that names a price and has nothing in escrow, RecordError for bad terms."""
        price = Price.of(job.record.terms)
        if price is None or price.wei == 0:
            return
        escrow_id = self._id(job)
        escrow = self._chain.escrow(escrow_id) if escrow_id else None
        if escrow is None or not escrow.remaining_wei:
            raise JobError(
                f"the job pays {price.wei} wei for {price.per_units} units of work, and its escrow is empty: deposit "
                f"for job {job.id.hex()} from the author's account, then open it"
            )

    def _id(self, job: Job) -> bytes | None:
        payer = self._membership.account_of(job.record.author)
        return self._chain.escrow_id(self._network_id, payer, job.id) if payer else None

    def _is_settleable(self, escrow: EscrowAccount, state: RoundState) -> bool:
        refundable_s = min(escrow.deadline_s + self._chain.dispute_window_s, state.executed_at_s + SILENCE_S)
        return state.chain_time_s + MARGIN_ROUNDS * state.interval_s < refundable_s
