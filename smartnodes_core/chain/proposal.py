"""A round's proposal exactly as `contracts/interfaces/IRounds.sol` defines it, its ABI encoding and the hash that is
signed.

`eth_abi` is imported on first use (0.2 s). Neighbours: `smartnodes_core/rounds.py` fills proposals in, `signing.py`
signs them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from smartnodes_core.chain.signing import checksum, domain_separator, keccak, recover, typed_digest, word
from smartnodes_core.errors import RecordError

NO_HASH = bytes(32)
_NAME, _VERSION = "Smartnodes Rounds", "1"
_ROUND_KIND = b"Round(uint32 networkId,uint64 round,uint32 viewNumber,bytes32 previousHash,bytes32 content)"
_ADMISSION_ABI = "(uint32,uint32)"
_SLASH_ABI = "(uint32,uint256)"
_SETTLEMENT_ABI = "(bytes32,uint256,(address,uint256)[])"
_PARAMETERS_ABI = "(uint16,uint32)"
PROPOSAL_ABI = (
    "(uint32,uint64,uint32,bytes32,uint64,bytes,bytes32,uint256,bytes32[],bytes32[],bytes32[],"
    f"{_ADMISSION_ABI}[],{_SLASH_ABI}[],{_SETTLEMENT_ABI}[],uint8,uint64,{_PARAMETERS_ABI}[],bytes32)"
)
NO_RULING, UPHOLD, CORRECT = range(3)
#: `Parameters.kappa_bps` that leaves workers the whole emission, whatever fees were burned.
UNCAPPED = (1 << 32) - 1

_PROOF = struct.Struct(">IQI32s32s32s65s65s")

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
class Admission:
    """The member at `index`, whose node key was verified to be its own, and its class of capability (0: none)."""

    index: int
    capability: int = 0


@dataclass(frozen=True)
class Parameters:
    """What rounds may change of a network: the part of payments in SNO that is burned, and how many times what is
    burned the workers may share at most. Both in 1/10,000.
    """

    fee_bps: int
    kappa_bps: int


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
    """One escrow's part in a round: what is paid leaves it, and in SNO the fee on top of it, which is burned;
    `refund_wei` goes back to the payer.
    """

    escrow_id: bytes
    refund_wei: int
    payments: tuple[Payment, ...]


@dataclass(frozen=True)
class RoundProposal:
    """Everything one round executes, in the order of the contract's struct. Hashes are 32 bytes.

    `reputations` are packed (`packing.py`); `rewards_root` zero leaves the last root in force; `view` is `viewNumber`
    there; `ruling` is one of NO_RULING, UPHOLD, CORRECT on the root frozen from `ruled_round` on; `parameters` holds
    one at most.
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
    jobs_disputed: tuple[bytes, ...] = ()
    admissions: tuple[Admission, ...] = ()
    slashes: tuple[Slash, ...] = ()
    settlements: tuple[Settlement, ...] = ()
    ruling: int = NO_RULING
    ruled_round: int = 0
    parameters: tuple[Parameters, ...] = ()
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
            list(self.jobs_disputed),
            [(admission.index, admission.capability) for admission in self.admissions],
            [(slash.index, slash.amount_wei) for slash in self.slashes],
            [
                (s.escrow_id, s.refund_wei, [(checksum(p.to), p.amount_wei) for p in s.payments])
                for s in self.settlements
            ],
            self.ruling,
            self.ruled_round,
            [(each.fee_bps, each.kappa_bps) for each in self.parameters],
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
            created, completed, disputed, admissions, slashes, settlements, *rest = values[8:]
            ruling, ruled_round, parameters, evidence_root = rest
            head: dict[str, Any] = dict(zip(_HEAD_FIELDS, values[:8], strict=True))
            proposal = cls(
                **head,
                jobs_created=tuple(created),
                jobs_completed=tuple(completed),
                jobs_disputed=tuple(disputed),
                admissions=tuple(Admission(*admission) for admission in admissions),
                slashes=tuple(Slash(*slash) for slash in slashes),
                settlements=tuple(
                    Settlement(escrow, back, tuple(Payment(bytes.fromhex(to[2:]), wei) for to, wei in payments))
                    for escrow, back, payments in settlements
                ),
                ruling=ruling,
                ruled_round=ruled_round,
                parameters=tuple(Parameters(*each) for each in parameters),
                evidence_root=evidence_root,
            )
        except Exception as error:  # eth_abi raises errors of many unrelated classes on hostile bytes
            raise RecordError(f"not a round proposal: {type(error).__name__}: {error}") from None
        if proposal.encode() != data:
            raise RecordError("a round proposal that is not in canonical ABI encoding")
        return proposal


@dataclass(frozen=True)
class Place:
    """What a signature is for: two contents signed for one place are a slashable proof."""

    network_id: int
    round: int
    view: int
    previous_hash: bytes

    @classmethod
    def of(cls, proposal: RoundProposal) -> Place:
        return cls(proposal.network_id, proposal.round, proposal.view, proposal.previous_hash)


@dataclass(frozen=True)
class Equivocation:
    """One signer's signatures over two contents of one place; `contents` are the hashes of the encodings."""

    place: Place
    contents: tuple[bytes, bytes]
    signatures: tuple[bytes, bytes]

    def encode(self) -> bytes:
        """242 bytes, as validators keep it and pass it on."""
        place = self.place
        numbers = (place.network_id, place.round, place.view)
        return _PROOF.pack(*numbers, place.previous_hash, *self.contents, *self.signatures)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Equivocation:
        """Raises RecordError for other than 242 bytes. Whether it proves anything is `Domain.equivocator` to say."""
        if len(data) != _PROOF.size:
            raise RecordError(f"a proof of two signatures has {_PROOF.size} bytes, found {len(data)}")
        network_id, number, view, previous_hash, *rest = _PROOF.unpack(data)
        return cls(Place(network_id, number, view, previous_hash), (rest[0], rest[1]), (rest[2], rest[3]))


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
        return self.digest_of(Place.of(proposal), keccak(proposal.encode()))

    def digest_of(self, place: Place, content: bytes) -> bytes:
        """The digest of a proposal in `place` of which only the hash of the encoding is known."""
        fields = (keccak(_ROUND_KIND), place.network_id, place.round, place.view, place.previous_hash, content)
        return typed_digest(self.separator, keccak(b"".join(word(field) for field in fields)))

    def equivocator(self, proof: Equivocation) -> bytes:
        """The account that signed both contents. Raises RecordError or SignatureError where there is none."""
        signers = {
            recover(self.digest_of(proof.place, content), signature)
            for content, signature in zip(proof.contents, proof.signatures, strict=True)
        }
        if proof.contents[0] == proof.contents[1] or len(signers) != 1:
            raise RecordError("no equivocation: one signer's signatures over two contents are needed")
        return signers.pop()
