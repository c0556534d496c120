"""A drift is seen after a few audits, honest residuals never, whatever is between."""

from __future__ import annotations

import math
import random

import pytest

from tensorlink.audit import drift
from tensorlink.audit.drift import LIMIT, SLACK, Drift, Drifts

PLACE = (bytes(32), bytes(32), 0)


def direction(draw, size, dimensions=32):
    found = [draw.gauss(0, 1) for _ in range(dimensions)]
    return [size * value / math.hypot(*found) for value in found]


@pytest.mark.parametrize(("share", "audits"), [(0.9, 3), (0.5, 5), (0.2, 14), (0.1, 41)])
def test_what_points_the_same_way_every_time_is_accused_after_so_many_audits(share, audits):
    residual, one = direction(random.Random(0), share), Drift()
    lengths = [one.add(residual) for _ in range(audits)]
    assert lengths[-1] > LIMIT >= lengths[-2]


def test_what_points_anywhere_is_never_accused():
    draw, one = random.Random(1), Drift()
    assert max(one.add(direction(draw, 0.25)) for _ in range(5000)) < LIMIT


def test_less_than_the_slack_adds_up_to_nothing():
    residual, one = direction(random.Random(2), SLACK), Drift()
    assert [one.add(residual) for _ in range(100)] == [0.0] * 100


def test_audits_that_are_equal_to_the_last_bit_forget():
    residual, one = direction(random.Random(3), 0.45), Drift()
    assert one.add(residual) == pytest.approx(0.4)
    assert one.add([]) == pytest.approx(0.35)
    for _ in range(8):
        one.add([])
    assert one.length == 0.0


def test_sums_are_kept_by_worker_job_stage_and_tensor():
    residual, drifts = direction(random.Random(4), 0.5), Drifts()
    other = (bytes(32), bytes(32), 1)
    assert drifts.add(PLACE, {"a": residual}) == ("a", pytest.approx(0.45))
    assert drifts.add(other, {"a": residual, "b": []}) == ("a", pytest.approx(0.45))
    assert drifts.add(PLACE, {"a": residual, "b": residual}) == ("a", pytest.approx(0.9))
    assert drifts.add(PLACE, {"b": residual}) == ("b", pytest.approx(0.9))


def test_no_more_is_kept_than_the_caps_allow(monkeypatch):
    monkeypatch.setattr(drift, "MAX_PLACES", 2)
    monkeypatch.setattr(drift, "MAX_TENSORS", 2)
    drifts, residual = Drifts(), [0.5, 0.0]
    for stage in range(3):
        drifts.add((bytes(32), bytes(32), stage), {name: residual for name in "abc"})
    assert drifts.add((bytes(32), bytes(32), 2), {name: residual for name in "abc"})[1] == pytest.approx(0.9)
    assert drifts.add((bytes(32), bytes(32), 2), {"c": residual}) == ("", 0.0)
    assert drifts.add((bytes(32), bytes(32), 0), {"a": residual})[1] == pytest.approx(0.45)  # forgotten before


def test_a_sketch_of_another_size_is_refused():
    one = Drift()
    one.add([0.5, 0.5])
    with pytest.raises(ValueError, match="3 numbers"):
        one.add([1.0, 1.0, 1.0])
