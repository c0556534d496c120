"""What a job came to is counted once and kept within bounds."""

from __future__ import annotations

from types import SimpleNamespace

from tensorlink.pipeline import tally
from tensorlink.pipeline.tally import Tally


def commitment(stage, step, work_units=10):
    return SimpleNamespace(stage=stage, step=step, work_units=work_units)


def verdict(worker, finding):
    return SimpleNamespace(worker=worker, finding=finding)


def test_a_step_is_counted_once_for_each_stage():
    found = Tally()
    for stage, step in [(0, 0), (0, 0), (1, 0), (0, 1), (0, 0)]:
        found.commitment(commitment(stage, step))
    assert (found.work_units(0), found.work_units(1), found.work_units(2)) == (20, 10, 0)


def test_findings_are_counted_for_all_and_for_each():
    found = Tally()
    for worker, finding in [(b"a", "honest"), (b"a", "fraudulent"), (b"b", "honest"), (b"b", "inconclusive")]:
        found.verdict(verdict(worker, finding))
    assert found.findings() == {"passed": 2, "failed": 1, "inconclusive": 1, "silent": 0}
    assert found.findings(b"a") == {"passed": 1, "failed": 1, "inconclusive": 0, "silent": 0}
    assert found.findings(b"c") == {"passed": 0, "failed": 0, "inconclusive": 0, "silent": 0}


def test_verdicts_are_kept_within_bounds_and_counts_are_not_lost(monkeypatch):
    monkeypatch.setattr(tally, "MAX_VERDICTS", 3)
    found = Tally()
    for index in range(5):
        found.verdict(verdict(bytes([index]), "honest"))
    assert [each.worker for each in found.verdicts()] == [b"\2", b"\3", b"\4"]
    assert found.findings()["passed"] == 5


def test_busy_seconds_add_up():
    found = Tally()
    found.busy(1, 0.5)
    found.busy(1, 0.25)
    assert (found.busy_s(1), found.busy_s(0)) == (0.75, 0.0)
