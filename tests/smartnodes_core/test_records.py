"""Every record's bytes are frozen: a change of these golden bytes is a new version of the record, never an edit."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core import records
from smartnodes_core.errors import RecordError
from smartnodes_core.records import (
    Absence,
    Announcement,
    Assignment,
    AuditTerms,
    Binding,
    Challenge,
    Commitment,
    Departure,
    Evidence,
    JobNotice,
    JobRecord,
    Opening,
    OpeningItem,
    Plan,
    Proposal,
    Receipt,
    ReceivedList,
    Record,
    Reveal,
    Signed,
    SignedBinding,
    Silence,
    TwoVersions,
    Unanswered,
    Unit,
    Verdict,
    Vote,
    Withholding,
    canonical,
    digest_of,
)  # fmt: skip

GOLDEN = json.loads(Path(__file__).with_name("golden_records.json").read_text())


def d(byte, size=32):
    return bytes([byte]) * size


TERMS = AuditTerms(unit_rate_ppm=2000, step_rate_ppm=20000, window_steps=16, window_s=600, auditors=[d(1)])
SAMPLES = [
    Signed(record=b"record", signer=d(1), signature=d(2, 64)),
    Binding(
        node_key=d(1), account=d(2, 20), role="worker", chain_id=31337, registry=d(3, 20), network_id=1,
        expires_at_s=1_800_000_000,
    ),
    SignedBinding(binding=b"binding", node_signature=d(1, 64), account_signature=d(2, 65)),
    Announcement(
        node_key=d(1), role="worker", network_id=1, sequence=7, expires_at_s=1_800_000_000,
        endpoints=["tls://127.0.0.1:4000"], offers={"memory_bytes": 1 << 33, "class": "cpu"},
    ),
    TERMS,
    JobRecord(
        network_id=1, job_type="tensorlink/1", author=d(1), nonce=d(2), created_at_s=1_700_000_000, num_stages=2,
        num_replicas=1, specs=[d(3), d(4)], initial_roots=[d(5), d(6)], work_units=[1000, 2000], audit=TERMS,
        terms={"seed": 7, "dtype": "float32"},
    ),
    Assignment(stage=1, replica=0, worker=d(1), endpoint="tls://127.0.0.1:4001"),
    Plan(
        job=d(1), version=3, first_step=8, state_roots=[d(5)],
        assignments=[Assignment(stage=0, replica=0, worker=d(2), endpoint="e")], spares=[d(3)],
        validators=[d(4)], reason="first plan",
    ),
    JobNotice(
        job=d(1), keeper=d(2), network_id=1, plan_version=3, state="open", sequence=7, expires_at_s=1_800_000_000,
    ),
    Unit(call=0, backward_pass=-1, micro_batch=3, roots={"x": d(1), "y": d(2)}),
    Commitment(
        job=d(1), plan_version=0, replica=0, stage=1, step=42, worker=d(2), numeric_class="torch 2.13 cpu",
        previous=d(3), roots={"weights_before": d(4), "gradient": d(5)},
        units=[Unit(call=0, backward_pass=0, micro_batch=0, roots={"gx": d(6)})], shared_roots={}, order=d(7),
        squared_norm=(0.5).hex(), clip_coefficient=(1.0).hex(), work_units=12345,
    ),
    Receipt(job=d(1), plan_version=0, replica=0, step=1, sender=d(2), receiver=d(3), signer=d(2), items_root=d(4),
        num_items=8),
    ReceivedList(job=d(1), validator=d(2), reveal=1, commitments=[d(3), d(4)], excluded=[d(5)]),
    Reveal(job=d(1), validator=d(2), reveal=1, received_list=d(3), preimage=d(4)),
    Challenge(job=d(1), commitment=d(2), tier=2, unit=-1, seed=d(3), reveals=[d(4)], auditor=d(5)),
    OpeningItem(label="unit/0/x/0", meta=b"meta", num_bytes=64),
    Opening(challenge=d(1), commitment=d(2), items=[OpeningItem(label="a", meta=b"", num_bytes=0)]),
    Verdict(
        job=d(1), plan_version=0, replica=0, stage=1, step=2, challenge=d(2), commitment=d(3), tier=1, unit=5,
        worker=d(4), auditor=d(5), finding="fraudulent", reason="gx/0", evidence=d(6), work_units=10, decided_at_s=100,
    ),
    Evidence(
        job=b"j", plan=b"pl", spec=b"s", commitment=b"c", earlier=[b"p"], order=b"o", challenge=b"ch", lists=[b"l"],
        reveals=[b"r"], grounds=[b"g"], opening=b"op",
        body_digest=d(1), body_bytes=10,
    ),
    Unanswered(job=d(1), challenge=d(2), validator=d(3)),
    Silence(
        job=d(1), replica=0, stage=1, step=2, commitment=d(2), challenge=d(3), worker=d(4), auditor=d(5), forced_from=7,
        statements=[b"s"],
    ),
    TwoVersions(job=d(1), first=b"f", second=b"s"),
    Absence(job=d(1), absent=d(2), validator=d(3)),
    Withholding(job=d(1), absent=d(2), statements=[b"s"]),
    Departure(job=d(1), validator=d(2)),
    Proposal(
        network_id=1, round=2, view=0, previous=d(1), proposer=d(2, 20), content=b"abi", verdicts=[d(3)], settled=[d(4)]
    ),
    Vote(proposal=d(1), validator=d(2, 20), signature=d(3, 65), reasons=["so"]),
]  # fmt: skip


def every_record():
    return {
        value for value in vars(records).values()
        if isinstance(value, type) and issubclass(value, Record) and value is not Record
    }  # fmt: skip


def test_there_is_a_golden_sample_of_every_record():
    assert {type(sample) for sample in SAMPLES} == every_record()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_bytes_and_digest_are_frozen(sample):
    golden = GOLDEN[type(sample).__name__]
    assert sample.encode().hex() == golden["bytes"]
    assert sample.digest().hex() == golden["digest"]
    assert type(sample).decode(bytes.fromhex(golden["bytes"])) == sample


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_what_is_not_canonical_is_refused(sample):
    data = sample.encode()
    fields = msgspec.msgpack.decode(data)
    backwards = msgspec.msgpack.encode(dict(sorted(fields.items(), reverse=True)))
    for bad in (backwards, data + b"\x00", data[:-1], b"", msgspec.msgpack.encode({**fields, "extra": 1})):
        with pytest.raises(RecordError):
            type(sample).decode(bad)
    with pytest.raises(RecordError):
        type(sample).decode(msgspec.msgpack.encode({**fields, "kind": "Other/1"}))


@given(st.binary(max_size=200))
def test_noise_is_refused_and_never_crashes(data):
    with pytest.raises(RecordError):
        Commitment.decode(data)


def test_over_the_cap_nothing_is_read():
    with pytest.raises(RecordError, match="at most"):
        Signed.decode(bytes(Signed.max_bytes + 1))


def test_floats_have_no_place_in_a_record():
    with pytest.raises(RecordError, match=r"float\.hex"):
        canonical({"a": [1, {"b": 0.5}]})


def test_domains_keep_digests_apart():
    assert digest_of("a", b"x") != digest_of("b", b"x")
    assert digest_of("a", b"x").hex() == GOLDEN["digest_of a x"]


def test_a_field_with_a_default_has_to_be_on_the_wire_all_the_same():
    unit = msgspec.msgpack.decode(Unit(micro_batch=1, roots={}).encode())
    del unit["call"]
    with pytest.raises(RecordError, match="not in canonical form"):
        Unit.decode(canonical(unit))


def test_a_record_of_another_version_is_refused_with_both_named():
    plan = next(sample for sample in SAMPLES if isinstance(sample, Plan))
    newer = msgspec.msgpack.decode(plan.encode()) | {"kind": "Plan/37", "more": 1}
    with pytest.raises(RecordError, match=r"a Plan of version 37, here is \d+: update the older of the two"):
        Plan.decode(canonical(newer))
    for other in ("Plan/x", "Plant/37", "Plan", "Plan/٣"):
        with pytest.raises(RecordError, match="not a Plan"):
            Plan.decode(canonical(newer | {"kind": other}))
