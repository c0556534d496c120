from __future__ import annotations

import pytest

from smartnodes_core.errors import ConnectionLostError, DeadlineError
from tensorlink.recovery import heartbeat
from tensorlink.recovery.heartbeat import Heartbeat

A, B = b"a" * 32, b"b" * 32


class Call:
    """A call that ends as it is told, after so many seconds."""

    def __init__(self, began_s, took_s=0.0, error=None):
        self.ended_s, self._error = began_s + took_s, error

    def result(self):
        if self._error is not None:
            raise self._error


@pytest.fixture
def beats(monkeypatch):
    """A heartbeat whose clock stands still, what it asked, and whom it gave up."""
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: 100.0)
    answers, asked, silent = {}, [], []

    def ask(worker, timeout_s):
        asked.append((worker, timeout_s))
        answer = answers.get(worker, Call(100.0))
        if isinstance(answer, Exception):
            raise answer
        return answer

    made = Heartbeat(lambda: [A, B, A], ask, lambda worker, reason: silent.append((worker, reason)), 0.1, 1.0)
    made.answers, made.asked, made.silent = answers, asked, silent
    return made


def test_each_worker_is_asked_once_whatever_number_of_stages_it_has(beats):
    beats.beat()
    assert [worker for worker, _ in beats.asked] == [A, B]
    assert beats.silent == []


def test_a_worker_that_does_not_answer_in_time_is_given_up(beats):
    beats.answers[B] = Call(100.0, error=DeadlineError("late"))
    beats.beat()
    assert beats.silent == [(B, "it has not answered for 5.0 s")]


def test_patience_grows_with_the_longest_answer(beats):
    beats.answers[A] = Call(100.0, took_s=2.0)
    beats.beat()
    assert beats.patience_s(A) == 20.0
    assert beats.patience_s(B) == heartbeat.LEAST_S


def test_a_worker_that_cannot_be_asked_is_left_to_the_end_of_its_connection(beats):
    beats.answers[A] = ConnectionLostError("gone")
    beats.answers[B] = Call(100.0, error=ConnectionLostError("gone"))
    beats.beat()
    assert beats.silent == []
