"""The main job, end to end, by the command that a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.starts_network


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    path = tmp_path_factory.mktemp("demo") / "report.json"
    command = [sys.executable, "-m", "tensorlink.cli.main", "demo", "--steps", "20", "--report", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return done, json.loads(path.read_text()) if path.exists() else {}


pytestmark = pytest.mark.timeout(300)


def test_the_demo_ends_well_and_says_so(demo: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    done, _ = demo
    assert done.returncode == 0, done.stderr[-3000:]
    assert "losses as in one plain process" in done.stdout
    assert "Traceback" not in done.stderr


def test_its_losses_are_those_of_one_plain_process(
    demo: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    _, report = demo
    assert len(report["losses"]) == len(report["plain_losses"]) == 20
    assert report["loss_relative_difference"] <= 1e-5
    assert report["losses"] == report["plain_losses"]  # on as many threads: bit by bit
    assert report["validation_loss"]["after"] < report["validation_loss"]["before"]


def test_each_node_is_a_process_of_its_own(demo: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    _, report = demo
    names = [row["name"] for row in report["processes"]]
    for name in ("chain", "validator-0", "validator-3", "worker-0", "worker-2", "worker-0 compute"):
        assert name in names
    assert len({row["pid"] for row in report["processes"]}) == len(names)


def test_the_table_tells_work_audits_reputation_and_pay(
    demo: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    _, report = demo
    held = [row["stages"] for row in report["workers"]]
    assert held[2] == []
    assert all(held[:2])
    assert sorted(held[0] + held[1]) == list(range(len(held[0]) + len(held[1])))
    for row in report["workers"][:2]:
        assert row["work_units"] > 0
        assert row["audits_failed"] == 0
        assert row["sno_earned"] > 0
    assert report["workers"][2]["sno_earned"] == 0  # the spare did no work
    passed = sum(row["audits_passed"] for row in report["workers"])
    assert passed > 0
    assert any(row["reputation"] > 1 for row in report["workers"][:2])
    assert report["rounds"] >= 2


def test_zero_steps_are_refused() -> None:
    command = [sys.executable, "-m", "tensorlink.cli.main", "demo", "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "found --steps 0, needed at least 1" in done.stderr
