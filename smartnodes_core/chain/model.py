"""The rules of the four contracts in plain Python: what `memory.MemoryChain` runs on, and what tests compare the
contracts with.

One `ChainModel` is one deployment, shared by the views of all accounts. Not for money: there is no gas and no proof of
anything.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from smartnodes_core.chain.base import EscrowAccount, ExecutedRound, Member, NoFundsError, RefusedError, RoundState
from smartnodes_core.chain.emission import fee_on, most_allotted_wei, round_emission_wei
from smartnodes_core.chain.merkle import reward_leaf, verify
from smartnodes_core.chain.packing import unpack_reputations
from smartnodes_core.chain.proposal import (
    NO_HASH,
    NO_RULING,
    UPHOLD,
    Admission,
    Domain,
    Equivocation,
    Parameters,
    RoundProposal,
    Settlement,
)
from smartnodes_core.chain.settings import ChainSettings
from smartnodes_core.chain.signing import checksum, recover
from smartnodes_core.chain.votes import signers_of
from smartnodes_core.errors import ChainError, SignatureError
from smartnodes_core.records import Role

CHAIN_ID = 31337
REGISTRY, ESCROW, ROUNDS, VAULTS = (bytes([number] * 20) for number in range(1, 5))
KEPT_ROOTS = 64
MAX_BURNS = 16
SILENCE_S = 7 * 24 * 3600
COINS_WEI = 10**24  # what every account has at first: nothing costs gas here


@dataclass(frozen=True)
class Root:
    """A rewards root, when it was set, and what its round allotted."""

    root: bytes
    set_at_s: int
    allotment_wei: int


@dataclass
class NetworkModel:
    """One network's members, epoch, rounds and rewards. `owners` are the members' indices by node key hash."""

    share_bps: int
    executed_at_s: int
    emitted_until_s: int
    number: int = 0
    previous_hash: bytes = NO_HASH
    members: list[Member] = field(default_factory=list)
    away: set[int] = field(default_factory=set)
    convicted: set[int] = field(default_factory=set)
    condemned: list[int] = field(default_factory=list)
    owners: dict[bytes, int] = field(default_factory=dict)
    epoch: set[bytes] = field(default_factory=set)
    parameters: Parameters = field(default=Parameters(0, 0))
    next_parameters: Parameters | None = None
    roots: dict[int, Root] = field(default_factory=dict)
    frozen_from: int = 0
    freezer: bytes = b""
    claimed: dict[bytes, int] = field(default_factory=dict)
    unclaimed_wei: int = 0
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
        self.minted_wei = 0
        self.coins: dict[bytes, int] = {}
        self.credits: dict[bytes, int] = {}
        self.coin_credits: dict[bytes, int] = {}
        self.escrows: dict[bytes, EscrowAccount] = {}
        self._networks = {
            number: NetworkModel(
                share, self.genesis_s, self.genesis_s, parameters=Parameters(settings.fee_bps, settings.kappa_bps)
            )
            for number, share in settings.networks.items()
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

    def move_coins(self, action: str, source: bytes, target: bytes, amount_wei: int) -> None:
        have = self.coins.get(source, COINS_WEI)
        if have < amount_wei:
            raise NoFundsError(f"{action}: {checksum(source)} has {have} wei of coins, needed are {amount_wei}")
        self.coins[source] = have - amount_wei
        self.coins[target] = self.coins.get(target, COINS_WEI) + amount_wei

    def burn(self, source: bytes, amount_wei: int) -> None:
        self.tokens[source] = self.tokens.get(source, 0) - amount_wei
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
        known = network.find(account)
        if known is not None and known.index not in network.away:
            raise RefusedError("register", "AlreadyRegistered", {"account": checksum(account)})
        if known is not None and known.reputation == 0:
            raise RefusedError("register", "Blacklisted", {"account": checksum(account)})
        holder = network.owners.get(key_hash)
        if known is not None and holder == known.index:
            holder = None
        if holder is not None and network.members[holder].verified:
            owner = checksum(network.members[holder].account)
            raise RefusedError("register", "KeyTaken", {"keyHash": key_hash.hex(), "owner": owner})
        stake = self.stake_wei(role)
        self.move("register", account, REGISTRY, stake)
        index = known.index if known else len(network.members)
        member = Member(account, role, key_hash, known.reputation if known else 1, stake, False, index, NO_HASH, 0)
        if known is None:
            network.members.append(member)
        else:
            network.away.discard(index)
            network.members[index] = member
            if network.owners.get(known.key_hash) == index:
                del network.owners[known.key_hash]
        if not network.number and key_hash not in network.owners:
            network.owners[key_hash] = index
            if role == "validator":
                network.epoch.add(account)
        return index

    def live(self, network: NetworkModel, member: Member) -> bool:
        if member.role == "validator":
            return member.account in network.epoch
        return network.owners.get(member.key_hash) == member.index and self.is_upright(network, member)

    def is_upright(self, network: NetworkModel, member: Member) -> bool:
        enough = member.stake_wei >= self.stake_wei(member.role)
        here = member.exit_at_s == 0 and member.index not in network.away | network.convicted
        return enough and here and member.reputation > 0

    # -- rounds ------------------------------------------------------------------------------------------------------

    def execute(self, proposal: RoundProposal, signatures: Sequence[bytes]) -> None:
        network = self.network("execute", proposal.network_id)
        self._check_turn(network, proposal)
        digest = self.domain.digest(proposal)
        signers = [account for account in signers_of(digest, signatures) if account in network.epoch]
        needed = 2 * len(network.epoch) // 3 + 1
        if len(signers) < needed:
            raise RefusedError("execute", "QuorumMissing", {"counted": len(signers), "needed": needed})
        with self._all_or_nothing(network):
            self._carry(network, proposal, digest, tuple(signers))

    @contextlib.contextmanager
    def _all_or_nothing(self, network: NetworkModel) -> Iterator[None]:
        """As a transaction: what is refused on the way leaves no trace. Everything kept is a value or a flat table."""
        tables = ("tokens", "credits", "coin_credits", "escrows", "burned_wei", "minted_wei")
        kept = {name: copy.copy(getattr(self, name)) for name in tables}
        kept_of_network = {name: copy.copy(value) for name, value in vars(network).items()}
        try:
            yield
        except ChainError:
            vars(self).update(kept)
            vars(network).update(kept_of_network)
            raise

    def _carry(self, network: NetworkModel, proposal: RoundProposal, digest: bytes, signers: tuple[bytes, ...]) -> None:
        if network.next_parameters is not None:
            network.parameters, network.next_parameters = network.next_parameters, None
        released_wei = self._rule(network, proposal)
        fees_wei = sum(self._settle(network, proposal.network_id, each) for each in proposal.settlements)
        self._allot(network, proposal, fees_wei, released_wei)
        network.number, network.executed_at_s = proposal.round, self.now_s()
        network.emitted_until_s, network.previous_hash = proposal.until_s, digest
        network.next_parameters = next(iter(proposal.parameters), None)
        executed = ExecutedRound(proposal.round, proposal.view, digest, proposal.evidence_root, signers)
        network.executed[proposal.round] = executed
        self._apply_to_members(network, proposal)

    def _apply_to_members(self, network: NetworkModel, proposal: RoundProposal) -> None:
        scores = self._check_scores(network, proposal.reputations)
        for index, score in scores.items():
            network.update(index, reputation=score)
            if score == 0:
                network.epoch.discard(network.members[index].account)
        for _ in range(min(MAX_BURNS, len(network.condemned))):
            index = network.condemned.pop()
            self._slash(network, index, network.members[index].stake_wei)
        for slash in proposal.slashes:
            if slash.index < len(network.members):
                self._slash(network, slash.index, slash.amount_wei)
        for admission in proposal.admissions:
            if admission.index < len(network.members):
                self._admit(network, admission)

    def _admit(self, network: NetworkModel, admission: Admission) -> None:
        member = network.members[admission.index]
        holder = network.owners.get(member.key_hash, member.index)
        if not self.is_upright(network, member):
            return
        if holder != member.index:
            if network.members[holder].verified:
                return
            network.epoch.discard(network.members[holder].account)
        network.owners[member.key_hash] = member.index
        network.update(member.index, verified=True, capability=admission.capability)
        if member.role == "validator":
            network.epoch.add(member.account)

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

    def convict(self, proof: Equivocation) -> None:
        """Takes out of the epoch who signed both contents."""
        action, network_id = "proveEquivocation", proof.place.network_id
        digests = [self.domain.digest_of(proof.place, content) for content in proof.contents]
        try:
            first, second = (recover(d, s) for d, s in zip(digests, proof.signatures, strict=True))
        except SignatureError:
            raise RefusedError(action, "BadSignature") from None
        if digests[0] == digests[1] or first != second:
            raise RefusedError(action, "NoEquivocation")
        network = self.peek(network_id)
        member = network.find(first)
        if member is None:
            raise RefusedError(action, "NotRegistered", {"account": checksum(first)})
        if member.role != "validator" or member.index in network.away:
            raise RefusedError(action, "NotAValidator", {"account": checksum(first)})
        if member.index in network.convicted:
            raise RefusedError(action, "Convicted", {"account": checksum(first)})
        network.convicted.add(member.index)
        network.condemned.append(member.index)
        network.update(member.index, reputation=0)
        network.epoch.discard(first)

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

    def _rule(self, network: NetworkModel, proposal: RoundProposal) -> int:
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

    def _allot(self, network: NetworkModel, proposal: RoundProposal, fees_wei: int, released_wei: int) -> None:
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

    def _slash(self, network: NetworkModel, index: int, amount_wei: int) -> None:
        member = network.members[index]
        lost = min(amount_wei, member.stake_wei)
        network.update(index, stake_wei=member.stake_wei - lost)
        self.burn(REGISTRY, lost)
        if member.stake_wei - lost < self.stake_wei(member.role):
            network.epoch.discard(member.account)

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

    def credit(self, account: bytes, amount_wei: int, in_coin: bool) -> None:
        credits = self.coin_credits if in_coin else self.credits
        credits[account] = credits.get(account, 0) + amount_wei

    def state(self, network_id: int) -> RoundState:
        network = self.network("state", network_id)
        now, delay = self.now_s(), self.settings.claim_delay_s
        latest = max(network.roots, default=0)
        final = max((n for n, root in network.roots.items() if self._is_final(network, n, root)), default=0)
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

    def _is_final(self, network: NetworkModel, number: int, root: Root) -> bool:
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
        if not self._is_final(network, number, root):
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
