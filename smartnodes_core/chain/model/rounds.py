"""Rounds' rules: what a quorum signed is carried, all of it or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from smartnodes_core.chain.base import ExecutedRound, RefusedError, RoundState
from smartnodes_core.chain.emission import fee_on
from smartnodes_core.chain.model.members import MemberRules
from smartnodes_core.chain.model.rewards import RewardRules
from smartnodes_core.chain.model.state import ESCROW, NetworkModel
from smartnodes_core.chain.proposal import (
    NO_HASH,
    RoundProposal,
    Settlement,
)
from smartnodes_core.chain.votes import signers_of


class ChainModel(MemberRules, RewardRules):
    """One deployment of the four contracts. `clock` gives seconds; `shift_s` moves time on."""

    def execute(self, proposal: RoundProposal, signatures: Sequence[bytes]) -> None:
        network = self.network("execute", proposal.network_id)
        self._check_turn(network, proposal)
        digest = self.domain.digest(proposal)
        signers = [account for account in signers_of(digest, signatures) if account in network.epoch]
        needed = 2 * len(network.epoch) // 3 + 1
        if len(signers) < needed:
            raise RefusedError("execute", "QuorumMissing", {"counted": len(signers), "needed": needed})
        with self.all_or_nothing(network):
            self._carry(network, proposal, digest, tuple(signers))

    def _carry(self, network: NetworkModel, proposal: RoundProposal, digest: bytes, signers: tuple[bytes, ...]) -> None:
        if network.next_parameters is not None:
            network.parameters, network.next_parameters = network.next_parameters, None
        released_wei = self.rule(network, proposal)
        fees_wei = sum(self._settle(network, proposal.network_id, each) for each in proposal.settlements)
        self.allot(network, proposal, fees_wei, released_wei)
        network.number, network.executed_at_s = proposal.round, self.now_s()
        network.emitted_until_s, network.previous_hash = proposal.until_s, digest
        network.next_parameters = next(iter(proposal.parameters), None)
        executed = ExecutedRound(proposal.round, proposal.view, digest, proposal.evidence_root, signers)
        network.executed[proposal.round] = executed
        self.apply_to_members(network, proposal)

    def _check_turn(self, network: NetworkModel, proposal: RoundProposal) -> None:
        if proposal.round != network.number + 1:
            raise RefusedError("execute", "WrongRound", {"found": proposal.round, "expected": network.number + 1})
        if proposal.previous_hash != network.previous_hash:
            raise RefusedError("execute", "WrongPrevious", {"found": proposal.previous_hash.hex()})
        earliest = network.executed_at_s + self.settings.round_interval_s
        if self.now_s() < earliest:
            raise RefusedError("execute", "TooEarly", {"time": self.now_s(), "earliest": earliest})
        if not network.emitted_until_s <= proposal.until_s <= self.now_s():
            raise RefusedError("execute", "BadEmissionTime", {"until": proposal.until_s})

    def endorse(self, network_id: int, signatures: Sequence[bytes]) -> None:
        network = self.peek(network_id)
        if not network.number:
            raise RefusedError("endorse", "UnknownNetwork", {"networkId": network_id})
        until = network.executed_at_s + self.settings.round_interval_s
        if self.now_s() >= until:
            raise RefusedError("endorse", "EndorsementTooLate", {"until": until})
        late = {account for account in signers_of(network.previous_hash, signatures) if account in network.epoch}
        last = network.executed[network.number]
        network.executed[network.number] = replace(last, signers=tuple(sorted({*last.signers, *late})))

    def _settle(self, network: NetworkModel, network_id: int, settlement: Settlement) -> int:
        """The fee that was burned."""
        escrow = self.escrows.get(settlement.escrow_id)
        if escrow is None or escrow.network_id != network_id:
            return 0
        paid_wei = sum(payment.amount_wei for payment in settlement.payments)
        fee_wei = 0 if escrow.in_coin else fee_on(paid_wei, network.parameters)
        wanted_wei = paid_wei + fee_wei + settlement.refund_wei
        if wanted_wei > escrow.remaining_wei:
            return 0
        self.escrows[settlement.escrow_id] = replace(escrow, remaining_wei=escrow.remaining_wei - wanted_wei)
        for payment in settlement.payments:
            self.credit(payment.to, payment.amount_wei, escrow.in_coin)
        self.credit(escrow.payer, settlement.refund_wei, escrow.in_coin)
        self.burn(ESCROW, fee_wei)
        return fee_wei

    def state(self, network_id: int) -> RoundState:
        network = self.network("state", network_id)
        now, delay = self.now_s(), self.settings.claim_delay_s
        latest = max(network.roots, default=0)
        final = max((n for n, root in network.roots.items() if self.is_final(network, n, root)), default=0)
        return RoundState(
            number=network.number,
            previous_hash=network.previous_hash,
            executed_at_s=network.executed_at_s,
            earliest_at_s=network.executed_at_s + self.settings.round_interval_s,
            interval_s=self.settings.round_interval_s,
            emitted_until_s=network.emitted_until_s,
            chain_time_s=now,
            claim_delay_s=delay,
            latest_root_round=latest,
            latest_root=network.roots[latest].root if latest else NO_HASH,
            final_root_round=final,
            final_root=network.roots[final].root if final else NO_HASH,
            unclaimed_wei=network.unclaimed_wei,
            frozen_from=network.frozen_from,
        )
