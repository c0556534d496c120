"""What an auditor makes of an opening before and after it re-executes: only the worker's own faults are fraud."""

from __future__ import annotations

import mmap
import sys
from types import SimpleNamespace

import pytest

from smartnodes_core.audit import Case
from smartnodes_core.identity import Identity
from smartnodes_core.records import NO_DIGEST, Opening, OpeningItem
from tensorlink.records import StepOrder
from tensorlink.validator import MAX_PAPERS_BYTES, ReplayAuditor

AUTHOR, OTHER = Identity.create(), Identity.create()


def order(step=0):
    return StepOrder(
        job=NO_DIGEST, plan_version=0, step=step, input_root=NO_DIGEST, target_root=NO_DIGEST, loss=NO_DIGEST,
        loss_weights=[], loss_scale="", clip_norm="", optimizer="SGD", options=[], replaced=[],
    )  # fmt: skip


def case(signer=AUTHOR, committed=None, num_bytes=4, step=0):
    opening = Opening(
        challenge=NO_DIGEST, commitment=NO_DIGEST, items=[OpeningItem(label="x", meta=b"", num_bytes=num_bytes)]
    )
    commitment = SimpleNamespace(
        job=NO_DIGEST,
        step=step,
        stage=0,
        order=order(committed or 0).digest(),
        numeric_class="any",
        encode=lambda: b"not a commitment",
    )
    job = SimpleNamespace(author=AUTHOR.node_key, terms={"seed": 0}, initial_roots=[NO_DIGEST])
    challenge = SimpleNamespace(encode=lambda: b"not a challenge")
    return Case(job, b"{}", commitment, challenge, signer.sign(order()).encode(), opening.encode())


@pytest.fixture
def auditor():
    made = ReplayAuditor(command=(sys.executable, "-c", "raise SystemExit(1)"))
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"signer": OTHER}, "not the author's"),
        ({"committed": 1}, "not the one committed to"),
        ({"step": 1}, "is for another step"),
        ({"num_bytes": 5}, "do not add up"),
    ],
)
def test_what_the_worker_opened_wrong_is_fraud(auditor, options, says):
    finding, reason = auditor.examine(case(**options), memoryview(b"1234"))
    assert finding == "fraudulent"
    assert says in reason


def test_papers_that_are_too_long_are_not_read(auditor):
    with mmap.mmap(-1, MAX_PAPERS_BYTES + 1) as body:  # takes no memory until it is read
        finding, reason = auditor.examine(case(num_bytes=len(body)), memoryview(body))
    assert finding == "fraudulent"
    assert "bytes of papers" in reason


def test_an_audit_that_could_not_be_run_accuses_nobody(auditor):
    for _ in range(2):  # and the next one starts a fresh process
        finding, reason = auditor.examine(case(), memoryview(b"1234"))
        assert finding == "inconclusive"
        assert "could not be run" in reason


def test_a_drift_over_several_honest_audits_leaves_the_next_one_undecided(auditor, monkeypatch):
    reply = {"finding": "honest", "reason": "", "residuals": {"gradient w": [0.9]}}
    monkeypatch.setattr(auditor, "_check", lambda case, body: None)
    monkeypatch.setattr(auditor, "_examine", lambda case, papers, body: reply)
    place = SimpleNamespace(worker=bytes(32), job=bytes(32), stage=0)
    findings = [auditor.examine(SimpleNamespace(commitment=place), memoryview(b"")) for _ in range(3)]
    assert [finding for finding, _ in findings] == ["honest", "honest", "inconclusive"]
    assert "gradient w is off the same way" in findings[-1][1]
    place.stage = 1
    assert auditor.examine(SimpleNamespace(commitment=place), memoryview(b""))[0] == "honest"
