"""A validator that was away takes up the jobs that it audits, with what was drawn in them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from smartnodes_core.errors import AuthorityError, ProtocolError, RecordError
from smartnodes_core.records import Absence, Withholding

from .conftest import NETWORK


def restart(net: Any, index: int) -> Any:
    """The validator's process dies; the same member begins anew, with its journal, what it keeps on
    disk, and nothing else."""
    old = net.validators[index]
    net.everybody.remove(old)
    old.stop()
    again = net.citizen(index + 1, "validator")
    again.journal, again.folder = old.journal, old.folder
    net.validators[index] = again
    net.meet()
    net.make_validator(again)
    again.role.audits.start()
    again.role.evidence.start()
    return again


def test_a_validator_that_restarts_justifies_rounds_of_jobs_that_were_open(net: Any, eventually: Any) -> None:
    job = net.open()
    net.work(job, range(3))
    eventually(lambda: net.everyone_has(12, job))
    again = restart(net, 1)
    assert again.role.audits.jobs == {}
    again.role.resume()
    eventually(lambda: net.everyone_has(12, job))
    other, chain = net.validators[0].role.rounds.books, net.user.chain
    books = again.role.rounds.books
    eventually(lambda: books.records.unsettled() == other.records.unsettled())
    assert len(books.records.unsettled()[0]) == 12
    eventually(lambda: chain.round_state(NETWORK).chain_time_s >= chain.round_state(NETWORK).earliest_at_s)
    state = chain.round_state(NETWORK)
    assert books.records.evidence(state, *books.records.unsettled()) == other.records.evidence(
        state, *other.records.unsettled()
    )
    net.work(job, range(3, 5))  # and goes on auditing
    eventually(lambda: net.everyone_has(20, job))
    assert all(not audited.void for audited in again.role.audits.jobs.values())


def test_a_fraud_can_be_re_run_when_its_auditor_and_who_is_to_sign_for_it_have_both_restarted(
    bare: Any, eventually: Any, tmp_path: Path
) -> None:
    net = bare
    for number, validator in enumerate(net.validators):
        validator.folder = tmp_path / str(number)
    net.start()
    net.workers[0].handler.wrong = {0}
    job = net.open(num_stages=1)
    net.work(job, range(1), num_units=1)
    eventually(lambda: net.everyone_has(1, job))
    [(digest, (verdict, _))] = net.audited(net.validators[0], job).verdicts.items()
    [auditor] = [each for each, validator in enumerate(net.validators) if validator.key == verdict.auditor]
    for index in (auditor, (auditor + 1) % 4):
        again = restart(net, index)
        again.role.resume()
        eventually(lambda again=again: digest in net.audited(again, job).confirmed)
    assert len(again.auditor.cases) == 1  # it has re-run it, from the file that its auditor kept


def test_a_job_that_only_a_faulty_validator_names_is_not_taken_up(net: Any, eventually: Any) -> None:
    job = net.open()
    again = restart(net, 1)
    for validator in (net.validators[0], net.validators[2]):
        validator.role.jobs.entries.clear()
    again.role.resume()
    assert again.role.jobs.entries == {}
    net.validators[2].role.jobs.take_up(job)
    again.role.resume()
    assert list(again.role.jobs.entries) == [job.id]
    again.role.resume()
    assert list(again.role.jobs.entries) == [job.id]


def test_records_are_told_page_by_page_to_validators_of_the_job(
    net: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = net.open()
    net.work(job, range(3))
    eventually(lambda: net.everyone_has(12, job))
    monkeypatch.setattr("smartnodes_core.nodes.resuming.MAX_RECORD_BYTES", 1500)  # one or two records a page
    again = restart(net, 2)
    again.role.resume()
    eventually(lambda: net.everyone_has(12, job))
    first = net.validators[0]
    with pytest.raises(RecordError, match="does not know"):
        again.node.call(first.key, "audit_records", {"job": bytes(32), "after": b""})
    with pytest.raises(ProtocolError):
        again.node.call(first.key, "audit_records", {"job": job.id, "after": bytes(65)})
    with pytest.raises(AuthorityError):
        net.workers[0].node.call(first.key, "audit_records", {"job": job.id, "after": b""})


def test_an_auditor_that_restarts_while_a_worker_opens_asks_again_and_nobody_is_silent(
    net: Any, eventually: Any
) -> None:
    asked, may_open = threading.Event(), threading.Event()
    opened = net.workers[0].handler.open

    def open_later(*args: Any) -> Any:
        asked.set()
        may_open.wait(60)
        return opened(*args)

    net.workers[0].handler.open = open_later
    job = net.open(num_stages=1)
    net.work(job, range(1), num_units=1)
    assert asked.wait(30)
    audited = net.audited(net.validators[0], job)
    eventually(lambda: audited.drawn)
    ((selection,),) = audited.drawn.values()
    index = next(index for index, validator in enumerate(net.validators) if validator.key == selection.auditor)
    again = restart(net, index)
    may_open.set()
    again.role.resume()
    eventually(lambda: net.everyone_has(1, job))
    assert {v.finding for validator in net.validators for v, _ in net.audited(validator, job).verdicts.values()} == {
        "honest"
    }


def test_proofs_are_taken_over_with_the_rest(net: Any, eventually: Any) -> None:
    net.workers[0].handler.refuses = True
    job = net.open(num_stages=1)
    net.work(job, range(1), num_units=1)
    eventually(lambda: net.everyone_has(1, job))
    absent, away = net.validators[3], net.validators[1]
    said = [
        validator.sign(Absence(job=job.id, absent=absent.key, validator=validator.key))
        for validator in net.validators[:2]
    ]
    net.validators[0].role.audits.proofs.take(Withholding(job=job.id, absent=absent.key, statements=said))
    again = restart(net, net.validators.index(away))
    again.role.resume()
    eventually(lambda: net.everyone_has(1, job))
    held, taken = net.audited(net.validators[0], job), net.audited(again, job)
    assert (taken.silences, taken.proofs.keys()) == (held.silences, held.proofs.keys())
    assert (taken.excluded, taken.assigned) == (held.excluded, held.assigned) == ((absent.key,), held.assigned)
