"""The in-memory twin of `client.ChainClient`: same protocol, same refusals, no process and no web3. For tests and
simulations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from smartnodes_core.chain.base import Balances, EscrowAccount, ExecutedRound, Member, RefusedError, RoundState
from smartnodes_core.chain.emission import round_emission_wei
from smartnodes_core.chain.model import COINS_WEI, ESCROW, REGISTRY, SILENCE_S, ChainModel
from smartnodes_core.chain.proposal import Domain, Equivocation, Parameters, RoundProposal
from smartnodes_core.chain.signing import address_of, checksum, keccak, word
from smartnodes_core.errors import ConfigError
from smartnodes_core.records import Role


class MemoryChain:
    """One account's view of a `ChainModel`; `key` None can only read. Thread-safe."""

    def __init__(self, model: ChainModel, key: bytes | None = None):
        self.model = model
        self.registry_address = REGISTRY
        self._account = address_of(key) if key is not None else None

    def __repr__(self) -> str:
        return f"<MemoryChain {checksum(self._account) if self._account else 'read-only'}>"

    @property
    def account(self) -> bytes:
        if self._account is None:
            raise ConfigError("this needs an account's key: the chain was opened for reading only")
        return self._account

    @property
    def chain_id(self) -> int:
        return self.domain.chain_id

    @property
    def domain(self) -> Domain:
        return self.model.domain

    # -- members -----------------------------------------------------------------------------------------------------

    def register(self, role: Role, node_key_hash: bytes, network_id: int) -> int:
        with self.model.lock:
            return self.model.register(self.account, role, node_key_hash, network_id)

    def rotate_key(self, node_key_hash: bytes, network_id: int) -> None:
        with self.model.lock:
            self.model.rotate_key(self.account, node_key_hash, network_id)

    def request_exit(self, network_id: int) -> None:
        with self.model.lock:
            member = self._own("requestExit", network_id)
            network = self.model.peek(network_id)
            if member.index in network.away:
                raise RefusedError("requestExit", "NotRegistered", {"account": checksum(self.account)})
            network.update(member.index, exit_at_s=member.exit_at_s or self.model.now_s())
            network.epoch.discard(self.account)

    def withdraw_stake(self, network_id: int) -> None:
        with self.model.lock:
            member = self._own("withdraw", network_id)
            network = self.model.peek(network_id)
            if member.exit_at_s == 0 or member.index in network.away:
                raise RefusedError("withdraw", "ExitNotRequested", {"account": checksum(self.account)})
            until = member.exit_at_s + self.model.settings.exit_delay_s
            if self.model.now_s() < until:
                raise RefusedError("withdraw", "StakeLocked", {"until": until})
            if member.index in network.convicted and member.stake_wei:
                raise RefusedError("withdraw", "Convicted", {"account": checksum(self.account)})
            self.model.move("withdraw", REGISTRY, self.account, member.stake_wei)
            network.update(member.index, stake_wei=0)
            network.away.add(member.index)

    def post_tip(self, network_id: int, tip: bytes) -> None:
        with self.model.lock:
            member = self._own("postTip", network_id)
            if member.role != "validator" or member.exit_at_s:
                raise RefusedError("postTip", "NotAValidator", {"account": checksum(self.account)})
            self.model.peek(network_id).update(member.index, tip=tip)

    def members(self, network_id: int) -> list[Member]:
        with self.model.lock:
            network = self.model.peek(network_id)
            return [replace(member, live=self.model.live(network, member)) for member in network.members]

    def member(self, network_id: int, account: bytes) -> Member | None:
        return next((member for member in self.members(network_id) if member.account == account), None)

    def account_of_key(self, network_id: int, node_key_hash: bytes) -> bytes | None:
        with self.model.lock:
            network = self.model.peek(network_id)
            index = network.owners.get(node_key_hash)
            return None if index is None else network.members[index].account

    def validators(self, network_id: int) -> list[bytes]:
        with self.model.lock:
            return sorted(self.model.peek(network_id).epoch)

    def stake_wei(self, role: Role) -> int:
        return self.model.stake_wei(role)

    # -- rounds and rewards ------------------------------------------------------------------------------------------

    def round_state(self, network_id: int) -> RoundState:
        with self.model.lock:
            return self.model.state(network_id)

    def executed_round(self, network_id: int, number: int) -> ExecutedRound | None:
        with self.model.lock:
            return self.model.peek(network_id).executed.get(number)

    def emission_wei(self, network_id: int, until_s: int) -> int:
        with self.model.lock:
            return self.model.emission_wei(self.model.peek(network_id), until_s)

    def emission_between_wei(self, network_id: int, from_s: int, until_s: int) -> int:
        with self.model.lock:
            genesis_s, share_bps = self.model.genesis_s, self.model.peek(network_id).share_bps
            return round_emission_wei(self.model.settings, share_bps, from_s - genesis_s, until_s - genesis_s)

    def proposal_digest(self, proposal: RoundProposal) -> bytes:
        return self.domain.digest(proposal)

    def execute_round(self, proposal: RoundProposal, signatures: Sequence[bytes]) -> None:
        with self.model.lock:
            self.model.execute(proposal, signatures)

    def endorse_round(self, network_id: int, signatures: Sequence[bytes]) -> None:
        with self.model.lock:
            self.model.endorse(network_id, signatures)

    def prove_equivocation(self, proof: Equivocation) -> None:
        with self.model.lock:
            self.model.convict(proof)

    def freeze_root(self, network_id: int, round_number: int) -> None:
        with self.model.lock:
            self.model.freeze(self.account, network_id, round_number)

    def parameters(self, network_id: int) -> Parameters:
        with self.model.lock:
            network = self.model.peek(network_id)
            return network.next_parameters or network.parameters

    def claimed_wei(self, network_id: int, account: bytes) -> int:
        with self.model.lock:
            return self.model.peek(network_id).claimed.get(account, 0)

    def claimable_wei(self, network_id: int, account: bytes, total_wei: int) -> int:
        return max(0, total_wei - self.claimed_wei(network_id, account))

    def claim(self, network_id: int, round_number: int, account: bytes, total_wei: int, proof: Sequence[bytes]) -> int:
        with self.model.lock:
            return self.model.claim(network_id, round_number, account, total_wei, proof)

    # -- money -------------------------------------------------------------------------------------------------------

    def deposit(self, network_id: int, job: bytes, amount_wei: int, deadline_s: int) -> bytes:
        with self.model.lock:
            return self._deposit(network_id, job, amount_wei, deadline_s, in_coin=False)

    def deposit_coin(self, network_id: int, job: bytes, amount_wei: int, deadline_s: int) -> bytes:
        with self.model.lock:
            return self._deposit(network_id, job, amount_wei, deadline_s, in_coin=True)

    def _deposit(self, network_id: int, job: bytes, amount_wei: int, deadline_s: int, in_coin: bool) -> bytes:
        if amount_wei == 0:
            raise RefusedError("deposit", "NothingDeposited")
        if deadline_s <= self.model.now_s():
            values = {"deadline": deadline_s, "earliest": self.model.now_s() + 1}
            raise RefusedError("deposit", "DeadlineTooEarly", values)
        escrow_id = self.escrow_id(network_id, self.account, job)
        old = self.model.escrows.get(escrow_id, EscrowAccount(self.account, network_id, 0, in_coin, 0, 0))
        if old.in_coin != in_coin:
            raise RefusedError("deposit", "OtherCurrency", {"escrowId": escrow_id.hex()})
        move = self.model.move_coins if in_coin else self.model.move
        move("deposit", self.account, ESCROW, amount_wei)
        self.model.escrows[escrow_id] = replace(
            old,
            deadline_s=max(old.deadline_s, deadline_s),
            deposited_wei=old.deposited_wei + amount_wei,
            remaining_wei=old.remaining_wei + amount_wei,
        )
        return escrow_id

    def escrow_id(self, network_id: int, payer: bytes, job: bytes) -> bytes:
        return keccak(word(network_id) + word(payer) + word(job))

    @property
    def dispute_window_s(self) -> int:
        return self.model.settings.dispute_window_s

    def escrow(self, escrow_id: bytes) -> EscrowAccount | None:
        with self.model.lock:
            return self.model.escrows.get(escrow_id)

    def refund(self, escrow_id: bytes) -> None:
        with self.model.lock:
            escrow = self.model.escrows.get(escrow_id)
            if escrow is None:
                raise RefusedError("refund", "UnknownEscrow", {"escrowId": escrow_id.hex()})
            silent = self.model.peek(escrow.network_id).executed_at_s + SILENCE_S
            until = min(escrow.deadline_s + self.model.settings.dispute_window_s, silent)
            if self.model.now_s() <= until:
                raise RefusedError("refund", "NotYetRefundable", {"until": until})
            self.model.escrows[escrow_id] = replace(escrow, remaining_wei=0)
            self.model.credit(escrow.payer, escrow.remaining_wei, escrow.in_coin)

    def withdraw_credit(self, account: bytes) -> None:
        with self.model.lock:
            amount = self.model.credits.get(account, 0)
            if amount == 0:
                raise RefusedError("withdraw", "NothingToWithdraw", {"account": checksum(account)})
            self.model.credits[account] = 0
            self.model.move("withdraw", ESCROW, account, amount)

    def withdraw_coin_credit(self, to: bytes) -> None:
        with self.model.lock:
            amount = self.model.coin_credits.get(self.account, 0)
            if amount == 0:
                raise RefusedError("withdrawCoin", "NothingToWithdraw", {"account": checksum(self.account)})
            self.model.coin_credits[self.account] = 0
            self.model.move_coins("withdrawCoin", ESCROW, to, amount)

    def balances(self, account: bytes) -> Balances:
        with self.model.lock:
            model = self.model
            tables = (model.tokens, model.credits, model.coin_credits)
            return Balances(model.coins.get(account, COINS_WEI), *(table.get(account, 0) for table in tables))

    def transfer(self, to: bytes, amount_wei: int) -> None:
        with self.model.lock:
            self.model.move("transfer", self.account, to, amount_wei)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _own(self, action: str, network_id: int) -> Member:
        member = self.model.peek(network_id).find(self.account)
        if member is None:
            raise RefusedError(action, "NotRegistered", {"account": checksum(self.account)})
        return member
