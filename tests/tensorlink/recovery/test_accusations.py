from __future__ import annotations

import queue
import threading

import pytest

from smartnodes_core.errors import PeerUnreachableError
from smartnodes_core.records import NO_DIGEST, Verdict
from tensorlink.recovery.accusations import Accusations


def verdict(step, finding="fraudulent", worker=1, auditor=0):
    return Verdict(
        job=NO_DIGEST, plan_version=0, replica=0, stage=0, step=step, challenge=NO_DIGEST, commitment=NO_DIGEST, tier=2,
        unit=-1, worker=bytes([worker]) * 32, auditor=bytes([auditor]) * 32, finding=finding, reason="",
        evidence=NO_DIGEST, work_units=0, decided_at_s=0,
    )  # fmt: skip


@pytest.fixture
def court():
    """Accusations whose judge answers with what the test puts into `judgements`; `asked` and `convicted` are heard."""
    judgements, asked, convicted = queue.Queue(), queue.Queue(), queue.Queue()

    def judge(found):
        asked.put(found.step)
        judgement = judgements.get(timeout=10)
        if isinstance(judgement, Exception):
            raise judgement
        return judgement

    made = Accusations(judge, lambda found: convicted.put(found.step))
    made.judgements, made.asked, made.convicted = judgements, asked, convicted
    made.start()
    yield made
    made.stop()


def test_a_fraud_that_is_one_here_too_convicts(court):
    court.hear(verdict(3))
    court.judgements.put(True)
    assert court.convicted.get(timeout=10) == 3


def test_an_auditor_that_lies_convicts_nobody_and_is_not_heard_again(court):
    court.hear(verdict(3))
    court.judgements.put(False)
    court.wait()
    court.hear(verdict(4))
    court.hear(verdict(5, worker=2, auditor=9))
    court.judgements.put(True)
    assert court.convicted.get(timeout=10) == 5
    assert court.convicted.empty()
    assert list(court.asked.queue) == [3, 5]


def test_waiting_lasts_until_what_was_heard_is_judged(court):
    court.hear(verdict(3))
    assert court.asked.get(timeout=10) == 3
    threading.Timer(0.1, court.judgements.put, (True,)).start()
    court.wait()
    assert court.convicted.get_nowait() == 3
    court.wait()


def test_what_cannot_be_judged_convicts_nobody_and_the_next_is_judged(court):
    court.hear(verdict(3))
    court.hear(verdict(4, worker=2))
    court.judgements.put(PeerUnreachableError("the auditor is gone"))
    court.judgements.put(True)
    assert court.convicted.get(timeout=10) == 4


def test_an_auditor_whose_evidence_does_not_come_holds_a_run_up_twice_at_most(court):
    for step in range(3):
        court.hear(verdict(step))
        court.judgements.put(PeerUnreachableError("the auditor is slow"))
        court.wait()
    assert list(court.asked.queue) == [0, 1]


def test_other_findings_and_later_frauds_of_a_convict_are_not_judged(court):
    court.hear(verdict(3, "honest"))
    court.hear(verdict(5))
    court.judgements.put(True)
    assert court.convicted.get(timeout=10) == 5
    court.hear(verdict(6))
    court.hear(verdict(2))
    court.judgements.put(True)
    assert court.convicted.get(timeout=10) == 2
    assert list(court.asked.queue) == [5, 2]
