"""The signed records on which all parts of the network agree.

A record is an immutable value with one canonical encoding: msgpack with sorted keys and no floats (a float travels as
the text of `float.hex()`). Each carries its kind and version in the field `kind`; decoding checks types, caps and
that the bytes are the canonical ones, so that one record never has two digests. The encodings are frozen by golden
bytes in
`tests/smartnodes_core/test_records.py`: a change of shape is a new version, never an edit.

Neighbours: `identity.py` signs them, `jobs.py`, `audit.py` and `rounds.py` give them meaning. Nothing here knows
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import msgspec
from blake3 import blake3
from msgspec import Meta

from smartnodes_core.errors import RecordError

MAX_RECORD_BYTES = 4 << 20

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
NodeKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
NodeSignature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Address = Annotated[bytes, Meta(min_length=20, max_length=20)]
AccountSignature = Annotated[bytes, Meta(min_length=65, max_length=65)]
Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
Name = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
Role = Literal["user", "worker", "validator"]
Finding = Literal["honest", "fraudulent", "inconclusive", "silent"]
Roots = Annotated[dict[Name, Digest], Meta(max_length=4096)]

NO_DIGEST = bytes(32)

_encoder = msgspec.msgpack.Encoder(order="sorted")


def canonical(value: object) -> bytes:
    """The canonical msgpack of plain data (dicts, lists, str, int, bytes, bool, None): sorted keys, no floats."""
    _refuse_floats(value)
    return _encoder.encode(value)


def _refuse_floats(value: object) -> None:
    if isinstance(value, float):
        raise RecordError(f"a record holds no floats, found {value!r}: encode it as float.hex() text")
    if isinstance(value, Mapping):
        for item in value.values():
            _refuse_floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_floats(item)


def digest_of(domain: str, data: bytes) -> bytes:
    """BLAKE3 of `data` under a key derived from `domain`, so that no two kinds of record share digests."""
    return blake3(data, derive_key_context=f"smartnodes 1 {domain}").digest()


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """Base of all records: canonical bytes, digest, strict decoding."""

    max_bytes: ClassVar[int] = MAX_RECORD_BYTES

    def encode(self) -> bytes:
        """The canonical bytes."""
        return _encoder.encode(self)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Self:
        """The record in `data`. Raises RecordError unless the bytes are canonical, of this kind and within the cap."""
        if len(data) > cls.max_bytes:
            raise RecordError(f"{cls.__name__} of {len(data)} bytes: at most {cls.max_bytes} are read")
        try:
            record = msgspec.msgpack.decode(data, type=cls)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise RecordError(
                _other_version(data, str(cls.__struct_config__.tag)) or f"not a {cls.__name__}: {error}"
            ) from None
        if _encoder.encode(record) != bytes(data):
            raise RecordError(f"{cls.__name__} is not in canonical form: keys must be sorted, integers minimal")
        return record

    def digest(self) -> bytes:
        """32 bytes that name this record, domain-separated by kind and version."""
        return digest_of(str(self.__struct_config__.tag), self.encode())


class _Kind(msgspec.Struct):
    kind: Name


def _other_version(data: bytes | memoryview, tag: str) -> str:
    """What to say of bytes that are this record in another version; nothing of others."""
    try:
        found = msgspec.msgpack.decode(data, type=_Kind).kind
    except (msgspec.DecodeError, RecursionError, ValueError):
        return ""
    (name, _, here), (other, _, version) = tag.partition("/"), found.partition("/")
    if other != name or version == here or not version.isascii() or not version.isdigit():
        return ""
    return f"a {name} of version {version[:9]}, here is {here}: update the older of the two"


class Signed(Record, frozen=True, kw_only=True, tag="Signed/1"):
    """A record's canonical bytes with the Ed25519 signature of one node; made and checked in `identity.py`."""

    record: bytes
    signer: NodeKey
    signature: NodeSignature


# -- who a peer is, and what it offers --------------------------------------------------------------------------------


class Binding(Record, frozen=True, kw_only=True, tag="Binding/1"):
    """Ties a node key to an account and a role on one chain; valid only with both signatures (`SignedBinding`)."""

    node_key: NodeKey
    account: Address
    role: Role
    chain_id: Count
    registry: Address
    network_id: Count
    expires_at_s: Count


class SignedBinding(Record, frozen=True, kw_only=True, tag="SignedBinding/1"):
    """A `Binding` signed by the node key (Ed25519) and by the account (EIP-191 over the binding's digest)."""

    binding: bytes
    node_signature: NodeSignature
    account_signature: AccountSignature


class Announcement(Record, frozen=True, kw_only=True, tag="Announcement/1"):
    """What a node says of itself to be found: the newest sequence number wins, after `expires_at_s` it is gone.

    `offers` is read by the network built on this layer: a rig's memory in bytes, its measured speed, its price.
    """

    node_key: NodeKey
    role: Role
    network_id: Count
    sequence: Count
    expires_at_s: Count
    endpoints: Annotated[list[Name], Meta(max_length=16)]
    offers: Annotated[dict[Name, int | Name], Meta(max_length=64)]


# -- a job and who works on it ----------------------------------------------------------------------------------------


class AuditTerms(Record, frozen=True, kw_only=True, tag="AuditTerms/1"):
    """How a job is audited, agreed before any worker is chosen. Rates are parts per million of units or stage-steps."""

    unit_rate_ppm: Annotated[int, Meta(ge=0, le=1_000_000)]
    step_rate_ppm: Annotated[int, Meta(ge=0, le=1_000_000)]
    window_steps: Count
    window_s: Count
    auditors: Annotated[list[NodeKey], Meta(max_length=256)]  # who alone may be a plan's validators; empty: anyone


class JobRecord(Record, frozen=True, kw_only=True, tag="JobRecord/1"):
    """A job as its author signs it before placement: nothing in it is chosen by a worker. Its digest is the job's id.

    `specs` names what each stage runs (for Tensorlink: the digest of its program), `initial_roots` the state each
    starts from, `work_units` what one micro-batch of each stage is worth. `terms` holds what the network built on
    this layer agrees (bytes as hex).
    """

    network_id: Count
    job_type: Name
    author: NodeKey
    nonce: Digest
    created_at_s: Count
    num_stages: Annotated[int, Meta(ge=1, le=1024)]
    num_replicas: Annotated[int, Meta(ge=1, le=1024)]
    specs: Annotated[list[Digest], Meta(max_length=1024)]
    initial_roots: Annotated[list[Digest], Meta(max_length=1024)]
    work_units: Annotated[list[Count], Meta(max_length=1024)]
    audit: AuditTerms
    terms: Annotated[dict[Name, int | Text], Meta(max_length=256)]


class Assignment(Record, frozen=True, kw_only=True, tag="Assignment/1"):
    """One stage of one replica on one worker."""

    stage: Count
    replica: Count
    worker: NodeKey
    endpoint: Name


class Plan(Record, frozen=True, kw_only=True, tag="Plan/2"):
    """Who runs what. Every rollback, take-over and resume raises `version`; what comes in under an older version counts
    for nothing.

    A plan after the first says where its stages begin: with step `first_step`, in the states of which `state_roots`
    holds the roots, one for each stage of the first replica, then of the next (none for stages that have no state).
    """

    job: Digest
    version: Count
    first_step: Count = 0
    state_roots: Annotated[list[Digest], Meta(max_length=4096)] = []
    assignments: Annotated[list[Assignment], Meta(max_length=4096)]
    spares: Annotated[list[NodeKey], Meta(max_length=256)]
    validators: Annotated[list[NodeKey], Meta(max_length=256)]
    reason: Text


class JobNotice(Record, frozen=True, kw_only=True, tag="JobNotice/1"):
    """A validator says that it keeps the record of a job (or, with the state "gone", that it does so no more): whoever
    knows the job's id finds it so. The newest sequence number of a keeper wins, after `expires_at_s` it is gone."""

    job: Digest
    keeper: NodeKey
    network_id: Count
    plan_version: Count
    state: Literal["open", "closed", "gone"]
    sequence: Count
    expires_at_s: Count


# -- what a worker did, and whether it is so --------------------------------------------------------------------------


class Unit(Record, frozen=True, kw_only=True, tag="Unit/1"):
    """What one micro-batch of a step took in and gave out. `call` counts forwards since the last step,
    `backward_pass` backwards through that forward (-1: the forward alone, which is not paid). A network that does not
    train numbers its units by `micro_batch` alone."""

    call: Count = 0
    backward_pass: Annotated[int, Meta(ge=-1, lt=1 << 31)] = 0
    micro_batch: Count
    roots: Roots


class Commitment(Record, frozen=True, kw_only=True, tag="Commitment/1"):
    """A worker's claim about one step of its stage, signed before anybody can know what will be audited.

    `previous` chains it to the commitment before (for step 0: the job's digest). `roots` binds state before and after
    and the accumulated result, `units` each micro-batch. Floats are `float.hex()` text. What has a default is for
    networks that train; a record on the wire holds every field.
    """

    job: Digest
    plan_version: Count
    replica: Count
    stage: Count
    step: Count
    worker: NodeKey
    numeric_class: Name = ""
    previous: Digest
    roots: Roots = {}
    units: Annotated[list[Unit], Meta(max_length=65536)]
    shared_roots: Roots = {}
    order: Digest = NO_DIGEST  # the author's signed order for this step: inputs, settings of the update
    squared_norm: Name = (0.0).hex()
    clip_coefficient: Name = (1.0).hex()
    work_units: Count


class Receipt(Record, frozen=True, kw_only=True, tag="Receipt/1"):
    """One end of a link says what crossed it in one step: the root over the identities and digests of `num_items`
    deliveries.
    """

    job: Digest
    plan_version: Count
    replica: Count
    step: Count
    sender: NodeKey
    receiver: NodeKey
    signer: NodeKey
    items_root: Digest
    num_items: Count


class ReceivedList(Record, frozen=True, kw_only=True, tag="ReceivedList/2"):
    """The commitments a validator received since its last reveal, signed before it reveals preimage number `reveal`.

    `excluded` are the validators that were shut out of the job's draws when it was signed (`Withholding`), sorted: with
    other ones, another draw is made.
    """

    job: Digest
    validator: NodeKey
    reveal: Count
    commitments: Annotated[list[Digest], Meta(max_length=4096)]
    excluded: Annotated[list[NodeKey], Meta(max_length=256)] = []


class Reveal(Record, frozen=True, kw_only=True, tag="Reveal/1"):
    """A validator's next hash-chain preimage, spent on one `ReceivedList`."""

    job: Digest
    validator: NodeKey
    reveal: Count
    received_list: Digest
    preimage: Digest


class Challenge(Record, frozen=True, kw_only=True, tag="Challenge/2"):
    """Asks a worker to open one committed unit (tier 1) or a whole step (tier 2: `unit` is -1) that the seed
    selects. It follows from the draw: nothing in it is the auditor's to choose.
    """

    job: Digest
    commitment: Digest
    tier: Literal[1, 2]
    unit: Annotated[int, Meta(ge=-1, lt=65536)]
    seed: Digest
    reveals: Annotated[list[Digest], Meta(max_length=16)]
    auditor: NodeKey


class OpeningItem(Record, frozen=True, kw_only=True, tag="OpeningItem/1"):
    """One piece of an opening's body: `label` and `meta` are read by the network built on this layer."""

    label: Name
    meta: Annotated[bytes, Meta(max_length=4096)]
    num_bytes: Count


class Opening(Record, frozen=True, kw_only=True, tag="Opening/1"):
    """The data behind a commitment; the items lie one after the other in the frame's body."""

    challenge: Digest
    commitment: Digest
    items: Annotated[list[OpeningItem], Meta(max_length=65536)]


class Verdict(Record, frozen=True, kw_only=True, tag="Verdict/2"):
    """What an auditor found. A `fraudulent` one names `Evidence` that anyone re-runs, a `silent` one the `Silence` that
    most of the job's validators bear out.
    """

    job: Digest
    plan_version: Count
    replica: Count
    stage: Count
    step: Count
    challenge: Digest
    commitment: Digest
    tier: Literal[1, 2]
    unit: Annotated[int, Meta(ge=-1, lt=65536)]
    worker: NodeKey
    auditor: NodeKey
    finding: Finding
    reason: Text
    evidence: Digest
    work_units: Count
    decided_at_s: Count


class Unanswered(Record, frozen=True, kw_only=True, tag="Unanswered/1"):
    """A validator asked the worker for what an auditor's challenge names, and got nothing that answers it either."""

    job: Digest
    challenge: Digest
    validator: NodeKey


class Silence(Record, frozen=True, kw_only=True, tag="Silence/1"):
    """An auditor's proof that a worker opens a challenged unit to nobody: `statements` are `Unanswered`, signed by
    other validators of the job. From step `forced_from` on, the stage's next steps are audited whatever the seed says.
    """

    job: Digest
    replica: Count
    stage: Count
    step: Count
    commitment: Digest
    challenge: Digest
    worker: NodeKey
    auditor: NodeKey
    forced_from: Count
    statements: Annotated[list[bytes], Meta(max_length=256)]


class TwoVersions(Record, frozen=True, kw_only=True, tag="TwoVersions/1"):
    """Two commitments that one worker signed for one step, each in its `Signed`: a proof by itself."""

    max_bytes: ClassVar[int] = 2 * MAX_RECORD_BYTES + 1024

    job: Digest
    first: bytes
    second: bytes


class Absence(Record, frozen=True, kw_only=True, tag="Absence/1"):
    """A validator waited for a list or a preimage of another one, asked for it, and did not get it."""

    job: Digest
    absent: NodeKey
    validator: NodeKey


class Withholding(Record, frozen=True, kw_only=True, tag="Withholding/1"):
    """Most of the job's other validators say (`statements` are signed `Absence`s) that one keeps a draw from being
    made: it takes no part in the job's draws any more.
    """

    job: Digest
    absent: NodeKey
    statements: Annotated[list[bytes], Meta(max_length=256)]


class Departure(Record, frozen=True, kw_only=True, tag="Departure/1"):
    """A validator leaves: it takes no part in the job's draws any more, having revealed what it owed."""

    job: Digest
    validator: NodeKey


class Evidence(Record, frozen=True, kw_only=True, tag="Evidence/4"):
    """Everything with which a stranger re-runs a verdict: signed records, and the digest of the opening's body.

    `job` and `plan` are signed by the author, `order` is what the worker showed as signed by the author, `lists` and
    `reveals` are those from which the challenge was drawn, `grounds` what it stands on beside the seed
    (`audit_grounds.py`); `smartnodes_core/evidence.py` checks all of it.
    """

    max_bytes: ClassVar[int] = 128 << 20  # a spec may be 64 MiB

    job: bytes
    plan: bytes
    spec: bytes
    commitment: bytes
    earlier: Annotated[list[bytes], Meta(max_length=64)]  # signed commitments, oldest first
    order: bytes
    challenge: bytes
    lists: Annotated[list[bytes], Meta(max_length=16)]
    reveals: Annotated[list[bytes], Meta(max_length=16)]
    grounds: Annotated[list[bytes], Meta(max_length=16)]
    opening: bytes
    body_digest: Digest
    body_bytes: Count


# -- rounds -----------------------------------------------------------------------------------------------------------


class Proposal(Record, frozen=True, kw_only=True, tag="Proposal/1"):
    """What a proposer wants executed in one round: `content` is the contract's struct, ABI-encoded; `verdicts` and
    `settled` name the evidence behind it (proofs among the verdicts), from which every validator recomputes it."""

    network_id: Count
    round: Count
    view: Count
    previous: Digest
    proposer: Address
    content: Annotated[bytes, Meta(max_length=1 << 20)]
    verdicts: Annotated[list[Digest], Meta(max_length=65536)]
    settled: Annotated[list[Digest], Meta(max_length=65536)]


class Vote(Record, frozen=True, kw_only=True, tag="Vote/1"):
    """A validator's EIP-712 signature of a proposal (65 bytes), or none and the reasons why not."""

    proposal: Digest
    validator: Address
    signature: Annotated[bytes, Meta(max_length=65)]
    reasons: Annotated[list[Text], Meta(max_length=64)]
