"""The real chain: `base.Chain` over web3 and the four contracts. Its in-memory twin is `memory.py`; both pass the same
tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smartnodes_core.chain.base import (
    ROLES,
    Balances,
    EscrowAccount,
    ExecutedRound,
    Member,
    NoFundsError,
    RoundState,
)
from smartnodes_core.chain.gateway import Gateway
from smartnodes_core.chain.proposal import Domain, Equivocation, Parameters, RoundProposal
from smartnodes_core.chain.settings import Addresses
from smartnodes_core.chain.signing import checksum, keccak, word
from smartnodes_core.chain.votes import in_order
from smartnodes_core.errors import WrongChainError
from smartnodes_core.records import Role

MEMBERS_PER_CALL = 500


class ChainClient:
    """Connects when made; imports web3 then (about a second). Thread-safe. `key` None can only read.

    Raises ChainUnreachableError, WrongChainError (another chain id, no contracts there) or ConfigError (a devnet key
    elsewhere).
    """

    def __init__(self, url: str, addresses: Addresses, key: bytes | None = None, chain_id: int | None = None):
        if chain_id is not None and chain_id != addresses.chain_id:
            raise WrongChainError(
                f"the addresses file is of chain {addresses.chain_id}, the settings ask for {chain_id}"
            )
        self.addresses = addresses
        self._gateway = gateway = Gateway(url, key, addresses.chain_id)
        self._sno = gateway.contract("SNO", addresses.sno).functions
        self._registry = gateway.contract("Registry", addresses.registry).functions
        self._escrow = gateway.contract("Escrow", addresses.escrow).functions
        self._rounds = gateway.contract("Rounds", addresses.rounds)
        self.domain = Domain(gateway.chain_id, addresses.rounds)
        self.registry_address = addresses.registry
        self._dispute_window_s: int | None = None
        self._shares_bps: dict[int, int] = {}
        self._members: dict[int, tuple[bytes, list[Member]]] = {}  # by network: as of which block, and who

    def __repr__(self) -> str:
        return f"<ChainClient of {self._gateway!r}>"

    @property
    def account(self) -> bytes:
        return self._gateway.account

    @property
    def chain_id(self) -> int:
        return self._gateway.chain_id

    # -- members -----------------------------------------------------------------------------------------------------

    def register(self, role: Role, node_key_hash: bytes, network_id: int) -> int:
        self._approve(self.addresses.registry, self.stake_wei(role))
        self._gateway.transact(self._registry.register(_role_number(role), node_key_hash, network_id))
        entry = self._read(self._registry.memberOf(network_id, checksum(self.account)))
        return _member(entry).index

    def rotate_key(self, node_key_hash: bytes, network_id: int) -> None:
        self._gateway.transact(self._registry.rotateKey(node_key_hash, network_id))

    def request_exit(self, network_id: int) -> None:
        self._gateway.transact(self._registry.requestExit(network_id))

    def withdraw_stake(self, network_id: int) -> None:
        self._gateway.transact(self._registry.withdraw(network_id))

    def post_tip(self, network_id: int, tip: bytes) -> None:
        self._gateway.transact(self._registry.postTip(network_id, tip))

    def members(self, network_id: int) -> list[Member]:
        newest = self._gateway.block_hash()  # asked for first: what is read may be newer, never older
        block, found = self._members.get(network_id, (b"", []))
        if block != newest:
            found = self._read_members(network_id)
            self._members[network_id] = newest, found
        return list(found)

    def _read_members(self, network_id: int) -> list[Member]:
        found: list[Member] = []
        while True:
            page, total = self._read(self._registry.members(network_id, len(found), MEMBERS_PER_CALL))
            found += [_member(entry) for entry in page]
            if len(found) >= total:
                return found

    def member(self, network_id: int, account: bytes) -> Member | None:
        entry = self._read(self._registry.memberOf(network_id, checksum(account)))
        return _member(entry) if entry[1] else None

    def account_of_key(self, network_id: int, node_key_hash: bytes) -> bytes | None:
        account = _account(self._read(self._registry.accountOf(network_id, node_key_hash)))
        return account if any(account) else None

    def validators(self, network_id: int) -> list[bytes]:
        return sorted(_account(text) for text in self._read(self._registry.validators(network_id)))

    def stake_wei(self, role: Role) -> int:
        return int(self._read(self._registry.stakeOf(_role_number(role))))

    # -- rounds ------------------------------------------------------------------------------------------------------

    def round_state(self, network_id: int) -> RoundState:
        return RoundState(*self._read(self._rounds.functions.state(network_id)))

    def executed_round(self, network_id: int, number: int) -> ExecutedRound | None:
        event = self._rounds.events.RoundExecuted()
        found = self._gateway.events(event, self.addresses.from_block, networkId=network_id, round=number)
        if not found:
            return None
        values = found[-1]["args"]
        late = self._gateway.events(
            self._rounds.events.RoundEndorsed(), self.addresses.from_block, networkId=network_id, round=number
        )
        signers = {account for event in [found[-1], *late] for account in _packed_accounts(event["args"]["signers"])}
        fields = (values["viewNumber"], values["digest"], values["evidenceRoot"])
        return ExecutedRound(number, *fields, tuple(sorted(signers)))

    def emission_wei(self, network_id: int, until_s: int) -> int:
        return int(self._read(self._rounds.functions.emission(network_id, until_s)))

    def emission_between_wei(self, network_id: int, from_s: int, until_s: int) -> int:
        if network_id not in self._shares_bps:
            opened = self._gateway.events(
                self._rounds.events.NetworkOpened(), self.addresses.from_block, networkId=network_id
            )
            self._shares_bps[network_id] = int(opened[0]["args"]["shareBps"]) if opened else 0
        start = max(from_s, until_s - 2 * self.round_state(network_id).interval_s)
        if until_s <= start:
            return 0
        return int(self._read(self._sno.mintableBetween(start, until_s))) * self._shares_bps[network_id] // 10_000

    def proposal_digest(self, proposal: RoundProposal) -> bytes:
        return self.domain.digest(proposal)

    def execute_round(self, proposal: RoundProposal, signatures: Sequence[bytes]) -> None:
        packed = b"".join(in_order(self.proposal_digest(proposal), signatures))
        self._gateway.transact(self._rounds.functions.execute(proposal.as_abi(), packed))

    def endorse_round(self, network_id: int, signatures: Sequence[bytes]) -> None:
        packed = b"".join(in_order(self.round_state(network_id).previous_hash, signatures))
        self._gateway.transact(self._rounds.functions.endorse(network_id, packed))

    def prove_equivocation(self, proof: Equivocation) -> None:
        place = (proof.place.network_id, proof.place.round, proof.place.view, proof.place.previous_hash)
        function = self._rounds.functions.proveEquivocation(place, list(proof.contents), b"".join(proof.signatures))
        self._gateway.transact(function)

    def freeze_root(self, network_id: int, round_number: int) -> None:
        self._approve(self.addresses.rounds, int(self._read(self._rounds.functions.freezeBond())))
        self._gateway.transact(self._rounds.functions.freeze(network_id, round_number))

    def parameters(self, network_id: int) -> Parameters:
        return Parameters(*self._read(self._rounds.functions.parametersOf(network_id)))

    # -- rewards -----------------------------------------------------------------------------------------------------

    def claimed_wei(self, network_id: int, account: bytes) -> int:
        return int(self._read(self._rounds.functions.claimedBy(network_id, checksum(account))))

    def claimable_wei(self, network_id: int, account: bytes, total_wei: int) -> int:
        return max(0, total_wei - self.claimed_wei(network_id, account))

    def claim(self, network_id: int, round_number: int, account: bytes, total_wei: int, proof: Sequence[bytes]) -> int:
        function = self._rounds.functions.claim(network_id, round_number, checksum(account), total_wei, list(proof))
        receipt = self._gateway.transact(function)
        from web3.logs import DISCARD

        claimed = self._rounds.events.Claimed().process_receipt(receipt, errors=DISCARD)
        return sum(int(event["args"]["amount"]) for event in claimed)

    # -- money -------------------------------------------------------------------------------------------------------

    def deposit(self, network_id: int, job: bytes, amount_wei: int, deadline_s: int) -> bytes:
        self._approve(self.addresses.escrow, amount_wei)
        self._gateway.transact(self._escrow.deposit(network_id, job, amount_wei, deadline_s))
        return self.escrow_id(network_id, self.account, job)

    def deposit_coin(self, network_id: int, job: bytes, amount_wei: int, deadline_s: int) -> bytes:
        self._gateway.transact(self._escrow.depositCoin(network_id, job, deadline_s), amount_wei)
        return self.escrow_id(network_id, self.account, job)

    def escrow_id(self, network_id: int, payer: bytes, job: bytes) -> bytes:
        return keccak(word(network_id) + word(payer) + word(job))

    @property
    def dispute_window_s(self) -> int:
        if self._dispute_window_s is None:
            self._dispute_window_s = int(self._read(self._escrow.disputeWindow()))
        return self._dispute_window_s

    def escrow(self, escrow_id: bytes) -> EscrowAccount | None:
        payer, *rest = self._read(self._escrow.accounts(escrow_id))
        found = EscrowAccount(_account(payer), *rest)
        return found if found.deposited_wei else None

    def refund(self, escrow_id: bytes) -> None:
        self._gateway.transact(self._escrow.refund(escrow_id))

    def withdraw_credit(self, account: bytes) -> None:
        self._gateway.transact(self._escrow.withdraw(checksum(account)))

    def withdraw_coin_credit(self, to: bytes) -> None:
        self._gateway.transact(self._escrow.withdrawCoin(checksum(to)))

    def balances(self, account: bytes) -> Balances:
        return Balances(
            coin_wei=self._gateway.coin_wei(account),
            sno_wei=int(self._read(self._sno.balanceOf(checksum(account)))),
            credit_wei=int(self._read(self._escrow.credits(checksum(account)))),
            coin_credit_wei=int(self._read(self._escrow.coinCredits(checksum(account)))),
        )

    def transfer(self, to: bytes, amount_wei: int) -> None:
        self._gateway.transact(self._sno.transfer(checksum(to), amount_wei))

    def transfer_coins(self, to: bytes, amount_wei: int) -> None:
        """Gives coins away, so that `to` can pay for gas."""
        self._gateway.send("transfer coins", checksum(to), "0x", amount_wei)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _approve(self, spender: bytes, amount_wei: int) -> None:
        if amount_wei == 0:
            return
        have = int(self._read(self._sno.balanceOf(checksum(self.account))))
        if have < amount_wei:
            raise NoFundsError(f"{checksum(self.account)} has {have} wei of SNO, needed are {amount_wei}")
        if int(self._read(self._sno.allowance(checksum(self.account), checksum(spender)))) < amount_wei:
            self._gateway.transact(self._sno.approve(checksum(spender), amount_wei))

    def _read(self, function: Any) -> Any:
        return self._gateway.read(function)


def _role_number(role: Role) -> int:
    return ROLES.index(role) + 1


def _account(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def _packed_accounts(packed: bytes) -> list[bytes]:
    return [bytes(packed[start : start + 20]) for start in range(0, len(packed), 20)]


def _member(entry: Any) -> Member:
    account, role, live, reputation, index, exit_at_s, stake, key_hash, tip, verified, capability = entry
    return Member(
        account=_account(account),
        role=ROLES[role - 1],
        key_hash=bytes(key_hash),
        reputation=reputation,
        stake_wei=stake,
        live=live,
        index=index,
        tip=bytes(tip),
        exit_at_s=exit_at_s,
        verified=verified,
        capability=capability,
    )
