from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.reputation import BEST, BLACKLISTED, MAX_STEPS, NEWCOMER, VerdictCounts, next_reputation

scores = st.integers(NEWCOMER, BEST)
counts = st.integers(0, 1000)


@given(scores, counts, counts)
def test_honest_work_never_lowers_and_inconclusive_changes_nothing(score: int, honest: int, inconclusive: int) -> None:
    after = next_reputation(score, VerdictCounts(honest=honest, inconclusive=inconclusive))
    assert score <= after <= BEST
    assert after == next_reputation(score, VerdictCounts(honest=honest))
    assert next_reputation(score, VerdictCounts(inconclusive=inconclusive)) == score


@given(scores, counts)
def test_one_fraud_blacklists_whatever_else_was_found(score: int, honest: int) -> None:
    assert next_reputation(score, VerdictCounts(honest=honest, fraudulent=1)) == BLACKLISTED
    assert next_reputation(BLACKLISTED, VerdictCounts(honest=honest)) == BLACKLISTED


@given(scores, counts)
def test_more_audits_in_a_round_do_not_make_a_name_faster(score: int, honest: int) -> None:
    capped = next_reputation(score, VerdictCounts(honest=MAX_STEPS))
    assert next_reputation(score, VerdictCounts(honest=honest)) <= capped


@given(scores, counts)
def test_two_silences_change_nothing_the_third_blacklists(score: int, silent: int) -> None:
    assert next_reputation(score, VerdictCounts(silent=silent, strikes=2)) == score
    assert next_reputation(score, VerdictCounts(silent=silent, strikes=3)) == BLACKLISTED


@given(scores, counts)
def test_withholding_a_draw_takes_half_and_leaves_a_newcomer(score: int, given_verdicts: int) -> None:
    after = next_reputation(score, VerdictCounts(withheld=1, given=given_verdicts))
    assert NEWCOMER <= after <= max(NEWCOMER, score // 2)


def test_steps_shrink_towards_the_top_and_the_top_is_reached() -> None:
    score, steps = NEWCOMER, []
    while score < BEST:
        after = next_reputation(score, VerdictCounts(honest=1))
        steps.append(after - score)
        score = after
    assert steps == sorted(steps, reverse=True)
    assert 100 < len(steps) < 400


def test_a_score_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError):
        next_reputation(256, VerdictCounts())
