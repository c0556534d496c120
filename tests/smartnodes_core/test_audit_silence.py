from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.audit_silence import FORCED_STEPS, SPAN_STEPS, is_forced, is_unpaid, strikes

steps = st.integers(0, 3000)
sets_of_steps = st.sets(steps, max_size=20)


def test_ten_steps_are_forced() -> None:
    assert [step for step in range(40) if is_forced(step, 7)] == list(range(7, 7 + FORCED_STEPS))


@given(steps, sets_of_steps, sets_of_steps)
def test_work_is_paid_only_where_an_audit_passed_between_it_and_each_silence(
    step: int, silent: set[int], passed: set[int]
) -> None:
    before = max((each for each in silent if each < step), default=None)
    after = min((each for each in silent if each >= step), default=None)
    vouched = after is None or any(step <= each < after for each in passed)
    resumed = before is None or before < max(silent) or any(each > before for each in passed)
    assert is_unpaid(step, silent, passed) == (not (vouched and resumed))


@given(steps, sets_of_steps)
def test_nothing_is_unpaid_without_a_silence_and_a_silent_step_always_is(step: int, passed: set[int]) -> None:
    assert not is_unpaid(step, [], passed)
    assert is_unpaid(step, [step], passed)


@given(steps, sets_of_steps, st.integers(0, 50))
def test_strikes_lie_a_window_apart_within_a_thousand_steps(step: int, silent: set[int], window_steps: int) -> None:
    counted = strikes(step, silent, window_steps)
    near = [each for each in silent if step - SPAN_STEPS < each <= step]
    assert counted <= len(near)
    assert (counted > 0) == bool(near)
    if near:
        assert counted <= 1 + (max(near) - min(near)) // max(1, window_steps)
    assert counted <= strikes(step, {*silent, step}, window_steps)


def test_silences_of_one_window_are_one_and_old_ones_are_forgotten() -> None:
    assert strikes(12, [3, 5, 12], 16) == 1
    assert strikes(40, [3, 19, 40], 16) == 3
    assert strikes(1200, [3, 19, 1200], 16) == 1
