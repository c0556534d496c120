"""A rig offers what its owner gave, and its process may map its runtime besides."""

from __future__ import annotations

from tensorlink.footprint import RUNTIME_BYTES, limit_of
from tensorlink.measure import memory_bytes


def test_what_a_process_measures_under_its_limit_is_what_was_given():
    assert memory_bytes(limit_of(5 << 20)) == 5 << 20


def test_no_bound_stays_none():
    assert limit_of(0) == 0
    assert memory_bytes(0) > RUNTIME_BYTES // 4
