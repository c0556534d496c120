"""Sketches keep lengths and directions, and nobody foresees them without the key."""

from __future__ import annotations

import pytest
import torch

from tensorlink.audit.residual import NUM_BUCKETS, Residuals, sketch

KEY = bytes(32)


def test_a_sketch_is_linear_and_about_as_long_as_what_it_is_of():
    torch.manual_seed(0)
    a, b = torch.randn(2, 5000, dtype=torch.float64)
    assert torch.allclose(sketch(KEY, "w", a) + sketch(KEY, "w", b), sketch(KEY, "w", a + b))
    lengths = [float(sketch(KEY, f"w{i}", a).norm() / a.norm()) for i in range(50)]
    assert 0.9 < sum(lengths) / 50 < 1.1
    assert min(lengths) > 0.5


def test_another_key_or_name_gives_another_sketch():
    a = torch.ones(100)
    assert not torch.equal(sketch(KEY, "w", a), sketch(b"\1" * 32, "w", a))
    assert not torch.equal(sketch(KEY, "w", a), sketch(KEY, "v", a))


def test_residuals_are_means_over_the_units_of_an_audit_in_tolerances():
    residuals = Residuals(KEY)
    moved = torch.zeros(10)
    moved[3] = 0.5
    residuals.add("y/0", moved, torch.zeros(10), 2.0)
    residuals.equal("y/0")
    residuals.equal("gx/0")
    residuals.add_scale("y/0", -0.5)
    found = residuals.means()
    assert len(found["y/0"]) == NUM_BUCKETS
    assert sum(abs(value) for value in found["y/0"]) == pytest.approx(0.125)
    assert found["scale of y/0"] == [pytest.approx(-0.25)]
    assert found["gx/0"] == []
