"""The tolerance: what honest noise looks like passes, what is just beyond it does not."""

from __future__ import annotations

import torch

from tensorlink.audit.compare import deviation, stray, update_deviation, usable_exact

torch.manual_seed(0)
EXACT = torch.randn(1000, dtype=torch.float64)
REPLAYS = [EXACT.float(), (EXACT * (1 + 1e-7 * torch.randn(1000, dtype=torch.float64))).float()]


def test_a_distance_of_the_noise_passes_and_ten_times_the_floor_does_not():
    assert deviation("t", REPLAYS[1], REPLAYS, EXACT) is None
    assert deviation("t", REPLAYS[0] * (1 + 9e-6), REPLAYS, EXACT) is None
    found = deviation("t", REPLAYS[0] * (1 + 1e-4), REPLAYS, EXACT)
    assert "outside" in str(found)


def test_a_gradient_that_is_noise_itself_accuses_nobody():
    noise = [1e-9 * torch.randn(100) for _ in range(3)]
    assert deviation("bias", noise[0], noise[1:], torch.zeros(100, dtype=torch.float64)) is None


def test_what_is_zero_in_every_replay_is_found_where_it_is_not_zero():
    exact = EXACT.clone()
    exact[5] = 0
    replays = [exact.float(), exact.float()]
    claimed = exact.float()
    assert stray("t", claimed, [*replays, exact]) is None
    claimed[5] = 1e-9
    assert "not zero" in str(stray("t", claimed, [*replays, exact]))
    assert stray("t", claimed, [*replays, EXACT]) is None


def test_nan_shape_and_dtype_are_deviations():
    assert deviation("t", REPLAYS[0] * float("nan"), REPLAYS, EXACT) is not None
    assert deviation("t", REPLAYS[0][:5], REPLAYS, EXACT) is not None
    assert deviation("t", REPLAYS[0].double(), REPLAYS, EXACT) is not None
    assert deviation("t", torch.tensor([1]), [torch.tensor([2])], None) is not None


def test_a_replay_with_other_masks_is_not_used_as_the_exact_one():
    assert usable_exact({"t": EXACT}, {"t": REPLAYS[0]})
    assert not usable_exact({"t": EXACT.flip(0)}, {"t": REPLAYS[0]})
    kept = torch.rand(1000) > 0.05
    assert not usable_exact({"t": EXACT * kept}, {"t": REPLAYS[0].bfloat16()}, random=True)


def test_noise_of_some_per_cent_in_half_precision_is_measured_and_not_taken_for_other_masks():
    noisy = {"t": (EXACT * (1 + 0.05 * torch.randn(1000, dtype=torch.float64))).bfloat16()}
    assert usable_exact({"t": EXACT}, noisy)
    assert usable_exact({"t": EXACT}, noisy, random=True)
    assert not usable_exact({"t": EXACT}, {"t": noisy["t"].float()})
    assert deviation("t", EXACT.bfloat16(), [noisy["t"]], EXACT) is None


def test_an_update_may_differ_in_the_last_places_of_its_largest_term_only():
    before = torch.randn(100)
    after = before - 1e-3 * torch.randn(100)
    ulp = torch.finfo(torch.float32).eps * torch.maximum(before.abs(), after.abs())
    assert update_deviation("w", before, after + 15 * ulp, after) is None
    assert "3 of 100 elements" in str(
        update_deviation("w", before, after + torch.cat([20 * ulp[:3], torch.zeros(97)]), after)
    )
    assert update_deviation("w", before, after * float("nan"), after) is not None


HALF = torch.randn(400, dtype=torch.float64)
HALVES = [HALF.bfloat16(), (HALF * (1 + 2e-3 * torch.randn(400, dtype=torch.float64))).bfloat16()]


def test_in_half_precision_a_result_that_is_scaled_by_one_per_cent_does_not_pass():
    for replay in HALVES:
        assert deviation("t", replay, HALVES, HALF) is None
    for factor in (0.99, 1.01):
        found = deviation("t", HALVES[0] * factor, HALVES, HALF)
        assert f"the right result times {factor}"[:-1] in str(found)


def test_in_half_precision_other_roundings_than_any_replay_had_pass():
    for _ in range(20):
        other = (HALF * (1 + 2e-3 * torch.randn(400, dtype=torch.float64))).bfloat16()
        assert deviation("t", other, HALVES, HALF) is None


def test_in_half_precision_four_spreads_are_enough_where_float64_shows_them():
    noise = 0.015 * torch.randn(400, dtype=torch.float64) * HALF.norm() / 20
    claimed = (HALF + noise).bfloat16()
    assert "outside" in str(deviation("t", claimed, HALVES, HALF))
    assert deviation("t", claimed, HALVES, None) is None


def test_in_half_precision_little_is_asked_of_few_elements_and_of_what_is_noise():
    few = HALF[:8]
    assert deviation("t", few.bfloat16() * 0.99, [few.bfloat16()], few) is None
    noise = [1e-3 * torch.randn(100).bfloat16() for _ in range(4)]
    assert deviation("bias", noise[0] * 5, noise[1:], 1e-6 * torch.randn(100, dtype=torch.float64)) is None
