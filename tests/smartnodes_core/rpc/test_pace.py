"""Deadlines that follow from what peers took before."""

from __future__ import annotations

from smartnodes_core.rpc.pace import MAX_DEADLINE_S, MAX_KNOWN, MIN_DEADLINE_S, Pace

A, B = b"a" * 32, b"b" * 32


def test_a_first_call_has_the_longest_deadline() -> None:
    assert Pace().deadline_s(A, "x") == MAX_DEADLINE_S


def test_a_quick_and_steady_peer_gets_the_shortest_deadline() -> None:
    pace = Pace()
    for _ in range(20):
        pace.answered(A, "x", 0.01)
    assert pace.deadline_s(A, "x") == MIN_DEADLINE_S
    assert pace.deadline_s(A, "y") == pace.deadline_s(B, "x") == MAX_DEADLINE_S


def test_a_peer_that_takes_longer_now_and_then_is_waited_for() -> None:
    pace = Pace()
    for took_s in (1.0, 4.0, 1.0, 4.0, 1.0, 4.0):
        pace.answered(A, "x", took_s)
    assert 10 < pace.deadline_s(A, "x") <= MAX_DEADLINE_S


def test_after_a_deadline_was_missed_the_next_is_later_until_an_answer_comes() -> None:
    pace = Pace()
    pace.answered(A, "x", 0.1)
    deadlines = []
    for _ in range(5):
        deadlines.append(pace.deadline_s(A, "x"))
        pace.missed(A, "x")
    assert deadlines == [MIN_DEADLINE_S, 2 * MIN_DEADLINE_S, 4 * MIN_DEADLINE_S, MAX_DEADLINE_S, MAX_DEADLINE_S]
    pace.answered(A, "x", 0.1)
    assert pace.deadline_s(A, "x") == MIN_DEADLINE_S


def test_large_bodies_get_the_time_that_the_measured_rate_needs() -> None:
    pace = Pace()
    pace.answered(A, "x", 0.1)
    body = 64 << 20
    unmeasured_s = pace.deadline_s(A, "x", body)
    pace.answered(A, "x", 1.0, body)
    assert unmeasured_s == MIN_DEADLINE_S + 4 * 64
    assert pace.deadline_s(A, "x", body) == MIN_DEADLINE_S + 4
    assert pace.deadline_s(A, "x") == MIN_DEADLINE_S


def test_what_is_remembered_is_bounded() -> None:
    pace = Pace()
    for number in range(MAX_KNOWN + 10):
        pace.answered(A, str(number), 0.1)
    assert pace.deadline_s(A, "0") == MAX_DEADLINE_S
    assert len(pace._measured) == MAX_KNOWN
