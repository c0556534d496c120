"""Patience follows the longest silence that ended well."""

from __future__ import annotations

import pytest

from tensorlink.pipeline.progress import MAX_WAIT_S, PATIENCE, SLOWEST_BYTES_PER_S, Progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_wait_begins_with_the_configured_patience(clock):
    progress = Progress(60.0, clock)
    clock.now = 100.0
    progress.begin()
    assert progress.left_s == 60.0
    clock.now = 150.0
    assert progress.left_s == 10.0


def test_whatever_arrives_begins_the_silence_anew(clock):
    progress = Progress(60.0, clock)
    progress.begin()
    for _ in range(5):
        clock.now += 2.0
        progress.moved()
    assert progress.left_s == 60.0


def test_patience_is_many_times_the_longest_silence_and_not_the_longest_wait(clock):
    progress = Progress(1.0, clock)
    progress.begin()
    for _ in range(100):
        clock.now += 3.0
        progress.moved()
    progress.end()
    assert progress.patience_s == PATIENCE * 3.0


def test_time_between_waits_is_the_users_own(clock):
    progress = Progress(1.0, clock)
    progress.begin()
    progress.end()
    clock.now += 1000.0
    progress.moved()
    assert progress.patience_s == 1.0


def test_patience_has_an_end_and_the_users_setting_has_none(clock):
    progress = Progress(1.0, clock)
    progress.begin()
    clock.now += 10 * MAX_WAIT_S
    progress.end()
    assert progress.patience_s == MAX_WAIT_S
    assert Progress(2 * MAX_WAIT_S, clock).patience_s == 2 * MAX_WAIT_S


def test_a_transfer_has_time_for_its_bytes(clock):
    assert Progress(60.0, clock).transfer_s(int(SLOWEST_BYTES_PER_S) * 100) == 160.0
