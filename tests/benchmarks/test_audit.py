"""Audits find every attack of the benchmark and accuse no honest worker. The long version is
`benchmarks/benchmark_audit.py`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
attacks = importlib.import_module("audit.attacks")
bounds = importlib.import_module("audit.bounds")
detection = importlib.import_module("audit.detection")
drifting = importlib.import_module("audit.drifting")
honest = importlib.import_module("audit.honest")
rig = importlib.import_module("audit.rig")
benchmark = importlib.import_module("benchmark_audit")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def validators():
    return rig.Validators()


@pytest.mark.parametrize("name", [name for name in attacks.ATTACKS if "honest" not in name])
def test_an_attack_is_found(name, validators):
    found = attacks.count(name, 2, validators, steps=1)
    assert (found.caught, found.missed) == (2, 0), found.examples


def test_an_honest_worker_of_another_numeric_class_is_not_accused():
    found = honest.examine(honest.NumericClass(2, False, "avx2"), "mlp", 0, num_jobs=2, num_steps=2)
    assert found.audits == found.independent + 4 > 8  # of one job units are audited, of the other whole steps
    assert (found.accused, found.inconclusive) == (0, 0), found.reasons


def test_a_result_scaled_by_one_per_cent_is_found_in_bfloat16_too(validators):
    found = attacks.count("x0.99 weight gradient", 2, validators, dtype="-bf16", steps=1)
    assert "right result times 0.99" in found.seen


def test_a_drift_below_the_tolerance_is_seen_when_it_goes_on(validators, monkeypatch):
    monkeypatch.setattr(validators.replayer, "_residual_key", bytes(32))  # when it is seen depends on the secret
    kind = type("Drift", (drifting.RowDrift,), {"share": 0.9, "tensor": "2.weight"})
    job = rig.Job("gpt", 0, validators, attacks.cheats.classes(kind, 2, [1]))
    found = []
    for step in range(4):
        job.step()
        found.append(job.audit(1, step))
    assert [one.finding for one in found[:2]] == ["honest", "honest"]
    assert found[-1].finding == "inconclusive"
    assert "off the same way" in found[-1].reason


def test_the_draw_takes_as_long_as_the_closed_form_says():
    found = detection.simulate("wrong-output", 400)
    assert found.distance < 1.36 / 400**0.5  # Kolmogorov-Smirnov at 5 %, which this seed is not beyond
    assert 0.9 < found.mean / found.expected < 1.1


def test_bounds_are_those_of_clopper_and_pearson():
    assert bounds.upper(0, 3000) == pytest.approx(1 - 0.05 ** (1 / 3000))
    assert bounds.upper(2, 100) == pytest.approx(0.0616, abs=1e-4)
    assert bounds.upper(5, 5) == 1.0
    assert bounds.kolmogorov_smirnov([1] * 50 + [2] * 25 + [3] * 25, 0.5) == pytest.approx(0.125)


def test_the_benchmark_prints_what_it_found_and_adds_pieces_up(tmp_path, capsys):
    out = tmp_path / "pieces"
    for seed in (0, 50):
        benchmark.main(
            [
                "attacks",
                "--trials",
                "1",
                "--steps",
                "1",
                "--only",
                "zero w",
                "--out",
                str(out),
                "--first-seed",
                str(seed),
            ]
        )
    benchmark.main(["cost", "--small"])
    assert "MB an interval" in capsys.readouterr().out
    assert [json.loads(line)["caught"] for line in out.read_text().splitlines()] == [1, 1]
    benchmark.main(["sum", str(out)])
    assert "zero weight gradient                     2       0" in capsys.readouterr().out
