"""What the demo says, writes and draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorlink.demo import report
from tensorlink.demo.run import DemoOptions, DemoResult


@pytest.fixture
def result() -> DemoResult:
    return DemoResult(
        DemoOptions(steps=3),
        losses=[5.0, 4.0, 3.0],
        plain_losses=[5.0, 4.0, 3.0],
        step_times_s=[0.5, 0.5, 0.5],
        validation_before=5.5,
        validation_after=3.25,
        workers=[_row("aa" * 32, [0, 3]), _row("bb" * 32, [])],
    )


def _row(worker: str, stages: list[int]) -> dict[str, object]:
    return {
        "worker": worker,
        "stages": stages,
        "work_units": 1000,
        "audits_passed": 7,
        "audits_failed": 0,
        "reputation": 9,
        "sno_earned": 1.5,
    }


def test_equal_losses_are_said_to_be_equal(result: DemoResult) -> None:
    assert result.loss_relative_difference == 0
    assert any("losses as in one plain process" in line for line in report.lines(result))


def test_a_difference_over_the_tolerance_is_said_to_be_one(result: DemoResult) -> None:
    result.losses[1] = 4.0 * (1 + 1e-4)
    assert result.loss_relative_difference == pytest.approx(1e-4)
    assert any("losses NOT as in one plain process" in line for line in report.lines(result))


def test_losses_of_another_number_of_steps_cannot_be_compared(result: DemoResult) -> None:
    result.plain_losses.pop()
    with pytest.raises(ValueError, match="shorter"):
        _ = result.loss_relative_difference


def test_the_spare_is_named_as_such(result: DemoResult) -> None:
    assert any("spare" in line for line in report.lines(result))
    assert any("0, 3" in line for line in report.lines(result))


def test_the_report_holds_the_settings_and_the_picture_lies_beside_it(result: DemoResult, tmp_path: Path) -> None:
    picture = report.write(result, tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["loss_relative_difference"] == 0
    assert written["validation_loss"] == {"before": 5.5, "after": 3.25}
    for setting in ("round_interval_s", "claim_delay_s", "audit_window_steps", "audit_rate_per_step"):
        assert setting in written["settings"]
    assert picture == tmp_path / "report.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
