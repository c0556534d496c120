"""The rules of the four contracts in plain Python: what `memory.MemoryChain` runs on, and what tests compare the
contracts with.

One `ChainModel` is one deployment, shared by the views of all accounts. Not for money: there is no gas and no proof of
anything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from smartnodes_core.chain.base import EscrowAccount, ExecutedRound, Member, NoFundsError, RefusedError, RoundState
from smartnodes_core.chain.emission import round_emission_wei
from smartnodes_core.chain.merkle import reward_leaf, verify
from smartnodes_core.chain.packing import unpack_reputations
from smartnodes_core.chain.proposal import NO_HASH, Domain, RoundProposal, Settlement
from smartnodes_core.chain.settings import ChainSettings
from smartnodes_core.chain.signing import checksum
from smartnodes_core.chain.votes import signers_of
from smartnodes_core.records import Role

CHAIN_ID = 31337
REGISTRY, ESCROW, ROUNDS = bytes([1] * 20), bytes([2] * 20), bytes([3] * 20)
KEPT_ROOTS = 64
MAX_JOINERS = 16


@dataclass
class NetworkModel:
    """One network's members, epoch, rounds and rewards."""

    share_bps: int
    executed_at_s: int
    emitted_until_s: int
    number: int = 0
    previous_hash: bytes = NO_HASH
    members: list[Member] = field(default_factory=list)
    away: set[int] = field(default_factory=set)
    epoch: set[bytes] = field(default_factory=set)
    joining: list[bytes] = field(default_factory=list)
    roots: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    claimed: dict[bytes, int] = field(default_factory=dict)
    allotted_wei: int = 0
    executed: dict[int, ExecutedRound] = field(default_factory=dict)

    def find(self, account: bytes) -> Member | None:
        return next((member for member in self.members if member.account == account), None)

    def update(self, index: int, **changes: object) -> None:
        self.members[index] = replace(self.members[index], **changes)  # type: ignore[arg-type]


class ChainModel:
    """`clock` gives seconds; `shift_s` moves time on."""

    def __init__(self, settings: ChainSettings, clock: Callable[[], float] = time.time):
        self.settings = settings
        self.lock = threading.RLock()
        self.domain = Domain(CHAIN_ID, ROUNDS)
        self.shift_s = 0
        self._clock = clock
        self.genesis_s = self.now_s()
        self.tokens: dict[bytes, int] = dict(settings.genesis)
        self.burned_wei = 0
        self.credits: dict[bytes, int] = {}
        self.escrows: dict[bytes, EscrowAccount] = {}
        self._networks = {
            number: NetworkModel(share, self.genesis_s, self.genesis_s) for number, share in settings.networks.items()
        }

    def now_s(self) -> int:
        return int(self._clock()) + self.shift_s

    def network(self, action: str, network_id: int) -> NetworkModel:
        if network_id not in self._networks:
            raise RefusedError(action, "UnknownNetwork", {"networkId": network_id})
        return self._networks[network_id]

    def peek(self, network_id: int) -> NetworkModel:
        """The network, or an empty one for views."""
        return self._networks.get(network_id) or NetworkModel(0, 0, 0)

    def move(self, action: str, source: bytes, target: bytes, amount_wei: int) -> None:
        have = self.tokens.get(source, 0)
        if have < amount_wei:
            raise NoFundsError(f"{action}: {checksum(source)} has {have} wei of SNO, needed are {amount_wei}")
        self.tokens[source] = have - amount_wei
        self.tokens[target] = self.tokens.get(target, 0) + amount_wei

    def burn(self, source: bytes, amount_wei: int) -> None:
        self.tokens[source] -= amount_wei
        self.burned_wei += amount_wei

    def stake_wei(self, role: Role) -> int:
        stakes = {
            "user": self.settings.user_stake_wei,
            "worker": self.settings.worker_stake_wei,
            "validator": self.settings.validator_stake_wei,
        }
        return stakes[role]

    # -- members -----------------------------------------------------------------------------------------------------

    def register(self, account: bytes, role: Role, key_hash: bytes, network_id: int) -> int:
        network = self.network("register", network_id)
        if key_hash == NO_HASH:
            raise RefusedError("register", "ZeroKey")
        holder = next((m for m in network.members if m.key_hash == key_hash), None)
        if holder is not None and holder.account != account:
            raise RefusedError("register", "KeyTaken", {"keyHash": key_hash.hex(), "owner": checksum(holder.account)})
        known = network.find(account)
        if known is not None and known.index not in network.away:
            raise RefusedError("register", "AlreadyRegistered", {"account": checksum(account)})
        if known is not None and known.reputation == 0:
            raise RefusedError("register", "Blacklisted", {"account": checksum(account)})
        stake = self.stake_wei(role)
        self.move("register", account, REGISTRY, stake)
        index = known.index if known else len(network.members)
        member = Member(account, role, key_hash, known.reputation if known else 1, stake, False, index, NO_HASH, 0)
        if known is None:
            network.members.append(member)
        else:
            network.away.discard(index)
            network.members[index] = member
        if role == "validator":
            if network.number:
                network.joining.append(account)
            else:
                network.epoch.add(account)
        return index

    def live(self, network: NetworkModel, member: Member) -> bool:
        if member.role == "validator":
            return member.account in network.epoch
        return self.in_good_standing(network, member)

    def in_good_standing(self, network: NetworkModel, member: Member) -> bool:
        enough = member.stake_wei >= self.stake_wei(member.role)
        return enough and member.exit_at_s == 0 and member.reputation > 0 and member.index not in network.away

    # -- rounds ------------------------------------------------------------------------------------------------------

    def execute(self, proposal: RoundProposal, signatures: Sequence[bytes]) -> None:
        network = self.network("execute", proposal.network_id)
        self._check_turn(network, proposal)
        digest = self.domain.digest(proposal)
        signers = [account for account in signers_of(digest, signatures) if account in network.epoch]
        needed = 2 * len(network.epoch) // 3 + 1
        if len(signers) < needed:
            raise RefusedError("execute", "QuorumMissing", {"counted": len(signers), "needed": needed})
        scores = self._check_scores(network, proposal.reputations)
        self._allot(network, proposal)
        network.number, network.executed_at_s = proposal.round, self.now_s()
        network.emitted_until_s, network.previous_hash = proposal.until_s, digest
        executed = ExecutedRound(proposal.round, proposal.view, digest, proposal.evidence_root, tuple(signers))
        network.executed[proposal.round] = executed
        for index, score in scores.items():
            network.update(index, reputation=score)
            if score == 0:
                network.epoch.discard(network.members[index].account)
        for slash in proposal.slashes:
            if slash.index < len(network.members):
                self._slash(network, slash.index, slash.amount_wei)
        for settlement in proposal.settlements:
            self._settle(proposal.network_id, settlement)
        for account in [network.joining.pop() for _ in network.joining[-MAX_JOINERS:]]:
            member = network.find(account)
            if member and member.role == "validator" and self.in_good_standing(network, member):
                network.epoch.add(account)

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

    def _check_scores(self, network: NetworkModel, packed: bytes) -> dict[int, int]:
        try:
            scores = unpack_reputations(packed)
        except ValueError:
            raise RefusedError("execute", "BadReputationUpdate", {}) from None
        if any(index >= len(network.members) for index in scores):
            raise RefusedError("execute", "BadReputationUpdate", {})
        return scores

    def emission_wei(self, network: NetworkModel, until_s: int) -> int:
        start = network.emitted_until_s - self.genesis_s
        return round_emission_wei(self.settings, network.share_bps, start, until_s - self.genesis_s)

    def _allot(self, network: NetworkModel, proposal: RoundProposal) -> None:
        if proposal.allotment_wei:
            if proposal.rewards_root == NO_HASH:
                raise RefusedError("execute", "AllotmentWithoutRoot")
            allowed = self.emission_wei(network, proposal.until_s)
            if proposal.allotment_wei > allowed:
                values = {"allotment": proposal.allotment_wei, "emission": allowed}
                raise RefusedError("execute", "AllotmentTooLarge", values)
            network.allotted_wei += proposal.allotment_wei
            self.tokens[ROUNDS] = self.tokens.get(ROUNDS, 0) + proposal.allotment_wei
        if proposal.rewards_root != NO_HASH:
            network.roots.pop(proposal.round - KEPT_ROOTS, None)
            network.roots[proposal.round] = (self.now_s(), proposal.rewards_root)

    def _slash(self, network: NetworkModel, index: int, amount_wei: int) -> None:
        member = network.members[index]
        lost = min(amount_wei, member.stake_wei)
        network.update(index, stake_wei=member.stake_wei - lost)
        self.burn(REGISTRY, lost)
        if member.stake_wei - lost < self.stake_wei(member.role):
            network.epoch.discard(member.account)

    def _settle(self, network_id: int, settlement: Settlement) -> None:
        escrow = self.escrows.get(settlement.escrow_id)
        paid = sum(payment.amount_wei for payment in settlement.payments)
        wanted = paid + settlement.fee_wei + settlement.refund_wei
        if escrow is None or escrow.network_id != network_id or wanted > escrow.remaining_wei:
            return
        self.escrows[settlement.escrow_id] = replace(escrow, remaining_wei=escrow.remaining_wei - wanted)
        for payment in settlement.payments:
            self.credits[payment.to] = self.credits.get(payment.to, 0) + payment.amount_wei
        self.credits[escrow.payer] = self.credits.get(escrow.payer, 0) + settlement.refund_wei
        self.burn(ESCROW, settlement.fee_wei)

    def state(self, network_id: int) -> RoundState:
        network = self.network("state", network_id)
        now, delay = self.now_s(), self.settings.claim_delay_s
        latest = max(network.roots, default=0)
        final = max((n for n, (set_at, _) in network.roots.items() if now >= set_at + delay), default=0)
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
            latest_root=network.roots[latest][1] if latest else NO_HASH,
            final_root_round=final,
            final_root=network.roots[final][1] if final else NO_HASH,
            allotted_wei=network.allotted_wei,
            claimed_wei=sum(network.claimed.values()),
        )

    def claim(self, network_id: int, number: int, account: bytes, total_wei: int, proof: Sequence[bytes]) -> int:
        network = self.peek(network_id)
        if number not in network.roots:
            raise RefusedError("claim", "NoRoot", {"round": number})
        set_at, root = network.roots[number]
        until = set_at + self.settings.claim_delay_s
        if self.now_s() < until:
            raise RefusedError("claim", "ClaimTooEarly", {"until": until})
        if not verify(root, reward_leaf(CHAIN_ID, ROUNDS, network_id, account, total_wei), proof):
            raise RefusedError("claim", "BadProof")
        amount = max(0, total_wei - network.claimed.get(account, 0))
        left = network.allotted_wei - sum(network.claimed.values())
        if amount > left:
            raise RefusedError("claim", "AllotmentTooLarge", {"allotment": amount, "emission": left})
        network.claimed[account] = network.claimed.get(account, 0) + amount
        self.move("claim", ROUNDS, account, amount)
        return amount
