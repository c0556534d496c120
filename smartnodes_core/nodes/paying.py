"""Escrows of jobs as validators see them: what a round may take from each, and which jobs are paid for at all.

The rules are pure and live in `smartnodes_core/payments.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from smartnodes_core.chain.base import Chain, EscrowAccount, RoundState
from smartnodes_core.errors import JobError
from smartnodes_core.jobs import Job
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.payments import JobWork, Price

#: Without a round for this long payers may take back what is left (`Escrow.SILENCE`).
SILENCE_S = 7 * 24 * 3600
#: Rounds before a payer may take back in which nothing is settled any more: what it takes back in between would make
#: the whole round fail.
MARGIN_ROUNDS = 2


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
