"""The rewards' half of Rounds: what may be allotted, under which roots it is claimed, who stops one."""

from __future__ import annotations

from collections.abc import Sequence

from smartnodes_core.chain.base import NoFundsError, RefusedError
from smartnodes_core.chain.emission import most_allotted_wei, round_emission_wei
from smartnodes_core.chain.merkle import reward_leaf, verify
from smartnodes_core.chain.model.state import KEPT_ROOTS, ROUNDS, VAULTS, ModelState, NetworkModel, Root
from smartnodes_core.chain.proposal import (
    NO_HASH,
    NO_RULING,
    UPHOLD,
    RoundProposal,
)
from smartnodes_core.chain.signing import checksum


class RewardRules(ModelState):
    """Emission, roots, freezing and claims."""

    def emission_wei(self, network: NetworkModel, until_s: int) -> int:
        start = network.emitted_until_s - self.genesis_s
        return round_emission_wei(self.settings, network.share_bps, start, until_s - self.genesis_s)

    def rule(self, network: NetworkModel, proposal: RoundProposal) -> int:
        """What a correction leaves to be allotted anew."""
        frozen = network.frozen_from
        if not frozen or proposal.ruled_round != frozen or proposal.ruling == NO_RULING:
            return 0
        network.frozen_from = 0
        if proposal.ruling == UPHOLD:
            self.burn(ROUNDS, self.settings.freeze_bond_wei)
            return 0
        void = [network.roots.pop(number) for number in sorted(network.roots) if number >= frozen]
        released_wei = sum(root.allotment_wei for root in void)
        network.unclaimed_wei -= released_wei
        self.burn(VAULTS, released_wei)
        self.move("execute", ROUNDS, network.freezer, self.settings.freeze_bond_wei)
        return released_wei

    def allot(self, network: NetworkModel, proposal: RoundProposal, fees_wei: int, released_wei: int) -> None:
        amount_wei = proposal.allotment_wei
        if proposal.rewards_root == NO_HASH:
            if amount_wei:
                raise RefusedError("execute", "AllotmentWithoutRoot")
            return
        emission_wei = self.emission_wei(network, proposal.until_s)
        allowed_wei = released_wei + most_allotted_wei(emission_wei, network.parameters, fees_wei)
        if amount_wei > allowed_wei:
            raise RefusedError("execute", "AllotmentTooLarge", {"allotment": amount_wei, "emission": allowed_wei})
        network.unclaimed_wei += amount_wei
        self.minted_wei += amount_wei
        self.tokens[VAULTS] = self.tokens.get(VAULTS, 0) + amount_wei
        network.roots.pop(proposal.round - KEPT_ROOTS, None)
        network.roots[proposal.round] = Root(proposal.rewards_root, self.now_s(), amount_wei)

    def freeze(self, account: bytes, network_id: int, number: int) -> None:
        network = self.peek(network_id)
        root = network.roots.get(number)
        if root is None:
            raise RefusedError("freeze", "NoRoot", {"round": number})
        if self.now_s() >= root.set_at_s + self.settings.claim_delay_s:
            raise RefusedError("freeze", "RootIsFinal", {"round": number})
        if network.frozen_from:
            raise RefusedError("freeze", "RootFrozen", {"fromRound": network.frozen_from})
        if account not in network.epoch:
            raise RefusedError("freeze", "OnlyValidators", {"caller": checksum(account)})
        self.move("freeze", account, ROUNDS, self.settings.freeze_bond_wei)
        network.frozen_from, network.freezer = number, account

    def is_final(self, network: NetworkModel, number: int, root: Root) -> bool:
        frozen = 0 < network.frozen_from <= number
        return not frozen and self.now_s() >= root.set_at_s + self.settings.claim_delay_s

    def claim(self, network_id: int, number: int, account: bytes, total_wei: int, proof: Sequence[bytes]) -> int:
        network = self.peek(network_id)
        if number not in network.roots:
            raise RefusedError("claim", "NoRoot", {"round": number})
        root = network.roots[number]
        until = root.set_at_s + self.settings.claim_delay_s
        if self.now_s() < until:
            raise RefusedError("claim", "ClaimTooEarly", {"until": until})
        if not self.is_final(network, number, root):
            raise RefusedError("claim", "RootFrozen", {"fromRound": number})
        leaf = reward_leaf(self.domain.chain_id, self.domain.contract, network_id, account, total_wei)
        if not verify(root.root, leaf, proof):
            raise RefusedError("claim", "BadProof")
        amount_wei = max(0, total_wei - network.claimed.get(account, 0))
        if amount_wei > network.unclaimed_wei:
            raise NoFundsError(
                f"claim: network {network_id} was allotted {network.unclaimed_wei} wei, not {amount_wei}"
            )
        network.claimed[account] = network.claimed.get(account, 0) + amount_wei
        network.unclaimed_wei -= amount_wei
        self.move("claim", VAULTS, account, amount_wei)
        return amount_wei
