"""A stranger checks an accusation from its file alone: frauds are confirmed, honest work and forgeries are not."""

from __future__ import annotations

import sys

import pytest
from msgspec.structs import replace

from smartnodes_core.errors import PeerFault
from smartnodes_core.evidence import HEAD, case_of, check_draw, split
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.evidence_shelf import EvidenceShelf
from smartnodes_core.records import MAX_RECORD_BYTES, Evidence, Signed
from tensorlink.cli import verify as command_line
from tensorlink.cli.main import main
from tensorlink.validator import ReplayAuditor

from ..audit.accusation import Accusation, file_of
from ..audit.test_examine import Training, cheating

STRANGER = Identity.create()


def accusation(rig, cheat=None, name="mlp", **options):
    stage_class = {} if cheat is None else {"stage_class": cheating.CHEATS[cheat], "at": 1}
    training = Training(rig, name, **stage_class, **options)
    for step in range(2):
        training.step(step)
    return Accusation(training, step=1)


@pytest.fixture
def verify(tmp_path, capsys):
    """Exit code, standard output and standard error of the command, for a file of these bytes."""

    def run(data):
        path = tmp_path / "a.evidence"
        path.write_bytes(data)
        code = main(["verify", str(path)])
        told = capsys.readouterr()
        assert code != 2 or told.err.count("\n") == 1
        return code, told.out, told.err

    return run


@pytest.fixture
def made(rig):
    return accusation(rig, "noise")


def test_a_fraud_is_confirmed_from_a_validators_file_with_the_tensor_that_shows_it(rig, tmp_path, capsys):
    made = accusation(rig, "noise", "gpt", interval=2)  # needs the commitment and the order before
    shelf, verdict = EvidenceShelf(tmp_path), made.auditor.sign(made.verdict()).encode()
    digest = shelf.put(made.evidence(), memoryview(made.body))
    shelf.add_verdict(digest, verdict)
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == file_of(made.evidence(), made.body, verdict)
    assert main(["verify", str(path)]) == 0
    out = capsys.readouterr().out
    assert "executed again: fraudulent: gradient " in out
    assert "distance" in out
    assert "allowed" in out
    assert "draw: the seed of 3 validators' preimages selects this" in out
    assert f"signed by auditor {made.auditor.node_key.hex()}: so it was found" in out
    assert "the fraud is confirmed" in out


def test_who_accuses_an_honest_worker_is_not_confirmed(rig, verify):
    made = accusation(rig)
    code, out, err = verify(file_of(replace(made.evidence(), lists=[], reveals=[]), made.body))
    assert code == 1, out + err
    assert "executed again: honest" in out
    assert "who accuses is not checked" in out
    assert "whether the seed selects this is not checked" in out
    assert "the fraud is not confirmed" in out


def test_another_models_body_is_the_auditors_lie_unless_the_worker_signed_it(rig, verify):
    honest, other = accusation(rig), accusation(rig, name="dropout")
    evidence = honest.evidence()
    forged = replace(evidence, body_digest=other.evidence().body_digest, body_bytes=len(other.body))
    code, _, err = verify(file_of(forged, other.body))
    assert code == 2
    assert "opening in the evidence: the opening's body is not the one that the worker signed" in err
    honest.body, honest.items = other.body, other.items
    code, out, err = verify(file_of(honest.evidence(), honest.body))
    assert code == 0, out + err
    assert "opened other data" in out


def test_work_under_the_order_for_another_step_is_fraud(rig, verify):
    made = accusation(rig)
    made.orders[-1] = made.orders[0]
    made.commitments[-1] = replace(made.commitments[-1], order=made.commitments[0].order)
    made.draw()
    code, out, _ = verify(file_of(made.evidence(), made.body))
    assert code == 0
    assert "the order that was committed to is for another step" in out


@pytest.mark.parametrize("name", Evidence.__struct_fields__)
def test_each_part_that_is_altered_is_refused_by_its_name(made, verify, name):
    evidence, value = made.evidence(), getattr(made.evidence(), name)
    file = file_of(evidence, made.body, made.auditor.sign(made.verdict(evidence)).encode())
    assert split(memoryview(file)).evidence == evidence
    for altered in alterations(value):
        code, out, err = verify(file_of(replace(evidence, **{name: altered}), made.body))
        assert code == 2, out
        assert name in err, err


def alterations(value):
    """A bit at the beginning, in the middle and at the end, and none or one too much of it."""
    if isinstance(value, int):
        return [value - 1, value + 1, 1 << 61]
    if value == []:
        return [[b""], [b"a paper"]]
    if isinstance(value, list):
        first = [[other, *value[1:]] for other in alterations(value[0])]
        return [*first, value[1:], [*value, value[0]]] if len(value) > 1 else first
    flipped = [value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :] for at in (0, len(value) // 2, len(value) - 1)]
    return flipped if len(value) == 32 else [*flipped, value[:-1], value + b"\0"]


@pytest.mark.parametrize("name", ["job", "plan", "commitment", "opening"])
def test_a_part_that_a_stranger_signed_is_refused_by_its_name(made, verify, name):
    record = Signed.decode(getattr(made.evidence(), name)).record
    signature = STRANGER.sign_bytes("signed record", record)
    forged = Signed(record=record, signer=STRANGER.node_key, signature=signature).encode()
    code, _, err = verify(file_of(replace(made.evidence(), **{name: forged}), made.body))
    assert code == 2
    assert f"{name} in the evidence" in err


def test_each_statement_of_the_verdict_is_held_against_the_evidence(made, verify):
    evidence, verdict = made.evidence(), made.verdict()
    others = {"tier": 1, "finding": "inconclusive", "evidence": bytes(32), "worker": bytes(32), "unit": 0}
    for name in verdict.__struct_fields__:
        if name in ("reason", "decided_at_s"):  # the auditor's own
            continue
        known = getattr(verdict, name)
        other = others.get(name, bytes(32) if isinstance(known, bytes) else 9)
        signed = made.auditor.sign(replace(verdict, **{name: other})).encode()
        code, _, err = verify(file_of(evidence, made.body, signed))
        assert code == 2
        assert "verdict" in err
        assert name in err
    code, _, err = verify(file_of(evidence, made.body, STRANGER.sign(verdict).encode()))
    assert code == 2
    assert "verdict in the evidence: it is not signed by the auditor" in err


def test_a_challenge_that_the_seed_does_not_select_is_refused(made, verify):
    others = [one for one in made.validators if one is not made.auditor]
    made.challenge = replace(made.challenge, auditor=others[0].node_key)
    code, _, err = verify(file_of(made.evidence(), made.body))
    assert code == 2
    assert "draw (plan, challenge, lists, reveals) in the evidence: the seed does not select" in err


def test_preimages_of_other_validators_than_the_jobs_are_refused(made):
    made.plan = replace(made.plan, validators=[STRANGER.node_key, *made.plan.validators[1:]])
    data = memoryview(file_of(made.evidence(), made.body))
    with pytest.raises(PeerFault, match="plan, challenge, lists, reveals"):
        judged(data)


def test_a_file_that_is_cut_short_or_lies_about_its_lengths_is_refused(made, verify):
    data = file_of(made.evidence(), made.body)
    whole = len(data) - len(made.body)
    for length in (0, 1, HEAD.size - 1, HEAD.size, HEAD.size + 1, whole - 1, whole, len(data) - 1):
        code, _, err = verify(data[:length])
        assert code == 2
        assert "the file ends after" in err
    lies = [1 << 63, Evidence.max_bytes + 1, len(data), whole - HEAD.size - 1]
    for length in lies:
        assert verify(HEAD.pack(length) + data[HEAD.size :])[0] == 2
    assert "a verdict has at most" in verify(data + bytes(MAX_RECORD_BYTES + 1))[2]
    assert "verdict in the evidence: not a Signed" in verify(data + b"\0")[2]


def test_what_cannot_be_judged_here_is_told(made, verify, tmp_path, capsys):
    other = Accusation(made.training, job_type="primes/1")
    code, _, err = verify(file_of(other.evidence(), other.body))
    assert code == 2
    assert "the job is of type 'primes/1'" in err
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_an_audit_that_cannot_be_run_is_no_answer(made, verify, monkeypatch):
    command = (sys.executable, "-c", "raise SystemExit(1)")
    monkeypatch.setattr(command_line, "ReplayAuditor", lambda memory: ReplayAuditor(memory, command=command))
    code, out, err = verify(file_of(made.evidence(), made.body))
    assert code == 2
    assert "executed again: inconclusive: the audit could not be run" in out
    assert "cannot be judged here" in err


def test_what_strangers_wrote_cannot_steer_the_terminal(made, verify):
    verdict = replace(made.verdict(), reason="fine\x1b[2J\nthe fraud is confirmed")
    signed = made.auditor.sign(verdict).encode()
    other = Accusation(made.training, job_type="primes/1\x1b[2J")
    for file in (file_of(made.evidence(), made.body, signed), file_of(other.evidence(), other.body)):
        _, out, err = verify(file)
        assert "\x1b" not in out + err
        assert out.count("\nthe fraud is confirmed") <= 1


def test_no_byte_of_the_record_can_be_changed(made):
    data = file_of(made.evidence(), made.body)
    for at in range(HEAD.size, len(data) - len(made.body), 997):
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises(PeerFault):
            judged(memoryview(changed))


def judged(data):
    file = split(data)
    case = case_of(file.evidence, file.body)
    check_draw(file.evidence, case)
    return case
