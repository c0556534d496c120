"""What a node needs of a chain, and the values it deals in: `client.py` and `memory.py` both provide it.

Accounts and hashes are bytes (20 and 32), amounts integers in wei, times integers in seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from smartnodes_core.chain.proposal import Domain, Equivocation, Parameters, RoundProposal
from smartnodes_core.errors import ChainError
from smartnodes_core.records import Role

ROLES: tuple[Role, ...] = ("user", "worker", "validator")


class RefusedError(ChainError):
    """A contract refused: `reason` is its error's name (`TooEarly`), `values` what the error carries."""

    code = "chain-refused"

    def __init__(self, action: str, reason: str, values: dict[str, Any] | None = None):
        self.reason = reason
        self.values = values or {}
        shown = ", ".join(f"{name}={value}" for name, value in self.values.items())
        super().__init__(f"the chain refused to {action}: {reason}({shown})")


class NoFundsError(ChainError):
    """The account cannot pay for the transaction, or has not the tokens it is to give."""

    code = "chain-funds"


@dataclass(frozen=True)
class Member:
    """One registered account. `live`: it counts now (a validator: it is in the epoch). `exit_at_s` 0: no exit asked
    for. `verified`: a round has verified that key and account belong together; `capability` is a worker's class.
    """

    account: bytes
    role: Role
    key_hash: bytes
    reputation: int
    stake_wei: int
    live: bool
    index: int
    tip: bytes
    exit_at_s: int
    verified: bool = False
    capability: int = 0


@dataclass(frozen=True)
class RoundState:
    """What the chain says about rounds now. `number` is the last executed one; the next is due at `earliest_at_s`.

    `final_root` (of round `final_root_round`, 0 if none) is the newest one that rewards can be claimed under; the roots
    of rounds from `frozen_from` on (0: none) cannot. `unclaimed_wei` lie ready for claims.
    """

    number: int
    previous_hash: bytes
    executed_at_s: int
    earliest_at_s: int
    interval_s: int
    emitted_until_s: int
    chain_time_s: int
    claim_delay_s: int
    latest_root_round: int
    latest_root: bytes
    final_root_round: int
    final_root: bytes
    unclaimed_wei: int
    frozen_from: int


@dataclass(frozen=True)
class ExecutedRound:
    """An executed round as its event tells it. `signers` carried it or endorsed it later, in ascending order."""

    number: int
    view: int
    digest: bytes
    evidence_root: bytes
    signers: tuple[bytes, ...]


@dataclass(frozen=True)
class EscrowAccount:
    payer: bytes
    network_id: int
    deadline_s: int
    in_coin: bool
    deposited_wei: int
    remaining_wei: int


@dataclass(frozen=True)
class Balances:
    """Of one account: the chain's coin (pays for gas), SNO, and what escrows credited it in both, to be withdrawn."""

    coin_wei: int
    sno_wei: int
    credit_wei: int
    coin_credit_wei: int = 0


class Chain(Protocol):
    """One account's view of the contracts. Every method raises ChainUnreachableError, WrongChainError, NoFundsError or,
    where a contract says no, RefusedError. A method that changes something returns when the change is in a block.
    """

    @property
    def account(self) -> bytes:
        """The account that acts. Raises ConfigError where there is no key."""

    @property
    def chain_id(self) -> int: ...

    @property
    def domain(self) -> Domain:
        """What proposals are signed for."""

    @property
    def registry_address(self) -> bytes:
        """The contract that bindings name."""

    def register(self, role: Role, node_key_hash: bytes, network_id: int) -> int:
        """Joins a network under the SHA-256 of the node key, approving and paying the role's stake; returns the member
        index. The member is live when a round admits it; before the network's first round, at once.
        """

    def rotate_key(self, node_key_hash: bytes, network_id: int) -> None:
        """Revokes the account's node key at once, for ever, and asks for another; stake and reputation stay. A round
        admits the new key as it does at registration.
        """

    def request_exit(self, network_id: int) -> None:
        """Stops taking part; the stake is paid back by `withdraw_stake` after the exit delay."""

    def withdraw_stake(self, network_id: int) -> None: ...

    def post_tip(self, network_id: int, tip: bytes) -> None:
        """A validator's hash-chain tip."""

    def members(self, network_id: int) -> list[Member]:
        """All members ever registered, in the order of their index."""

    def member(self, network_id: int, account: bytes) -> Member | None: ...

    def account_of_key(self, network_id: int, node_key_hash: bytes) -> bytes | None:
        """Who answers for what a node key signed: the account that it is bound to, or that has revoked it."""

    def validators(self, network_id: int) -> list[bytes]:
        """The validators of the epoch, in ascending order."""

    def stake_wei(self, role: Role) -> int:
        """What `role` has to stake."""

    def round_state(self, network_id: int) -> RoundState: ...

    def executed_round(self, network_id: int, number: int) -> ExecutedRound | None:
        """The event of an executed round; None where there is none."""

    def emission_wei(self, network_id: int, until_s: int) -> int:
        """The most that the next round may allot if it accounts emission up to `until_s`."""

    def emission_between_wei(self, network_id: int, from_s: int, until_s: int) -> int:
        """What a round might allot that accounted emission from `from_s` to `until_s`, whenever that was."""

    def proposal_digest(self, proposal: RoundProposal) -> bytes:
        """The hash to sign, computed here."""

    def execute_round(self, proposal: RoundProposal, signatures: Sequence[bytes]) -> None:
        """Carries a round; signatures (65 bytes) may come in any order, and those that no account can have made are
        left out.
        """

    def endorse_round(self, network_id: int, signatures: Sequence[bytes]) -> None:
        """Adds late signatures to the last round, until the next one is due."""

    def prove_equivocation(self, proof: Equivocation) -> None:
        """Takes the signer out of the epoch at once; its stake is burned with the next round."""

    def freeze_root(self, network_id: int, round_number: int) -> None:
        """Stops claims under a round's root and later ones, for a bond, until a round rules on it."""

    def parameters(self, network_id: int) -> Parameters:
        """What is in force in the next round."""

    def claimed_wei(self, network_id: int, account: bytes) -> int: ...

    def claimable_wei(self, network_id: int, account: bytes, total_wei: int) -> int:
        """What a claim of this cumulative total would still pay."""

    def claim(self, network_id: int, round_number: int, account: bytes, total_wei: int, proof: Sequence[bytes]) -> int:
        """Claims `account`'s cumulative total under the root of a round, and returns the wei paid: 0 if all was claimed
        before.
        """

    def deposit(self, network_id: int, job: bytes, amount_wei: int, deadline_s: int) -> bytes:
        """Pays SNO for a job into escrow, and returns the escrow's id."""

    def deposit_coin(self, network_id: int, job: bytes, amount_wei: int, deadline_s: int) -> bytes:
        """The same in the chain's coin."""

    def escrow_id(self, network_id: int, payer: bytes, job: bytes) -> bytes:
        """Under which a payer's deposit for a job lies, computed here."""

    @property
    def dispute_window_s(self) -> int:
        """After an escrow's deadline: rounds can still settle, the payer cannot take back."""

    def escrow(self, escrow_id: bytes) -> EscrowAccount | None: ...

    def refund(self, escrow_id: bytes) -> None:
        """Credits what is left to the payer, after the deadline and the dispute window, or seven days without a
        round."""

    def withdraw_credit(self, account: bytes) -> None:
        """Pays out what escrows credited `account` in SNO."""

    def withdraw_coin_credit(self, to: bytes) -> None:
        """Pays out to `to` what escrows credited this account in coin."""

    def balances(self, account: bytes) -> Balances: ...

    def transfer(self, to: bytes, amount_wei: int) -> None:
        """Gives SNO away."""
