"""A round's proposal exactly as `contracts/interfaces/IRounds.sol` defines it, its ABI encoding and the hash that is
signed.

`eth_abi` is imported on first use (0.2 s). Neighbours: `smartnodes_core/rounds.py` fills proposals in, `signing.py`
signs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from smartnodes_core.chain.signing import checksum, domain_separator, keccak, typed_digest, word
from smartnodes_core.errors import RecordError

NO_HASH = bytes(32)
_NAME, _VERSION = "Smartnodes Rounds", "1"
_ROUND_KIND = b"Round(uint32 networkId,uint64 round,uint32 viewNumber,bytes32 previousHash,bytes32 content)"
_SLASH_ABI = "(uint32,uint256)"
_SETTLEMENT_ABI = "(bytes32,uint256,uint256,(address,uint256)[])"
PROPOSAL_ABI = (
    "(uint32,uint64,uint32,bytes32,uint64,bytes,bytes32,uint256,bytes32[],bytes32[],"
    f"{_SLASH_ABI}[],{_SETTLEMENT_ABI}[],bytes32)"
)

_HEAD_FIELDS = (
    "network_id",
    "round",
    "view",
    "previous_hash",
    "until_s",
    "reputations",
    "rewards_root",
    "allotment_wei",
)


@dataclass(frozen=True)
class Slash:
    """Stake that the member at `index` loses; what it no longer has, it does not lose."""

    index: int
    amount_wei: int


@dataclass(frozen=True)
class Payment:
    """Wei that leave an escrow for an account, which withdraws them itself."""

    to: bytes
    amount_wei: int


@dataclass(frozen=True)
class Settlement:
    """One escrow's part in a round: what is paid and burned as fee leaves it, `refund_wei` goes back to the payer."""

    escrow_id: bytes
    fee_wei: int
    refund_wei: int
    payments: tuple[Payment, ...]


@dataclass(frozen=True)
class RoundProposal:
    """Everything one round executes, in the order of the contract's struct. Hashes are 32 bytes.

    `reputations` are packed (`packing.py`); `rewards_root` zero leaves the last root in force; `view` is `viewNumber`
    there.
    """

    network_id: int
    round: int
    view: int
    previous_hash: bytes
    until_s: int
    reputations: bytes = b""
    rewards_root: bytes = NO_HASH
    allotment_wei: int = 0
    jobs_created: tuple[bytes, ...] = ()
    jobs_completed: tuple[bytes, ...] = ()
    slashes: tuple[Slash, ...] = ()
    settlements: tuple[Settlement, ...] = ()
    evidence_root: bytes = NO_HASH

    def as_abi(self) -> tuple[Any, ...]:
        """The struct as plain nested tuples, as web3 and eth_abi take it."""
        return (
            self.network_id,
            self.round,
            self.view,
            self.previous_hash,
            self.until_s,
            self.reputations,
            self.rewards_root,
            self.allotment_wei,
            list(self.jobs_created),
            list(self.jobs_completed),
            [(slash.index, slash.amount_wei) for slash in self.slashes],
            [
                (s.escrow_id, s.fee_wei, s.refund_wei, [(checksum(p.to), p.amount_wei) for p in s.payments])
                for s in self.settlements
            ],
            self.evidence_root,
        )

    def encode(self) -> bytes:
        """The canonical ABI encoding: what the contract hashes and the `Proposal` record carries as `content`."""
        from eth_abi.abi import encode

        return encode([PROPOSAL_ABI], [self.as_abi()])

    @classmethod
    def decode(cls, data: bytes) -> RoundProposal:
        """The proposal in `data`. Raises RecordError unless the bytes are its one canonical encoding."""
        from eth_abi.abi import decode

        try:
            values = decode([PROPOSAL_ABI], data)[0]
            created, completed, slashes, settlements, evidence_root = values[8:]
            head: dict[str, Any] = dict(zip(_HEAD_FIELDS, values[:8], strict=True))
            proposal = cls(
                **head,
                jobs_created=tuple(created),
                jobs_completed=tuple(completed),
                slashes=tuple(Slash(*slash) for slash in slashes),
                settlements=tuple(
                    Settlement(escrow, fee, back, tuple(Payment(bytes.fromhex(to[2:]), wei) for to, wei in payments))
                    for escrow, fee, back, payments in settlements
                ),
                evidence_root=evidence_root,
            )
        except Exception as error:  # eth_abi raises errors of many unrelated classes on hostile bytes
            raise RecordError(f"not a round proposal: {type(error).__name__}: {error}") from None
        if proposal.encode() != data:
            raise RecordError("a round proposal that is not in canonical ABI encoding")
        return proposal


@dataclass(frozen=True)
class Domain:
    """Where a proposal is valid: one Rounds contract on one chain."""

    chain_id: int
    contract: bytes

    @cached_property
    def separator(self) -> bytes:
        """The EIP-712 domain separator."""
        return domain_separator(_NAME, _VERSION, self.chain_id, self.contract)

    def digest(self, proposal: RoundProposal) -> bytes:
        """The 32 bytes that validators sign, and that the next round names as its previous hash."""
        fields = (
            keccak(_ROUND_KIND),
            proposal.network_id,
            proposal.round,
            proposal.view,
            proposal.previous_hash,
            keccak(proposal.encode()),
        )
        return typed_digest(self.separator, keccak(b"".join(word(field) for field in fields)))
