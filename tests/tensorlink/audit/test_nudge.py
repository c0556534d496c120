"""From other numbers no gradient flows where none can; what cancels by chance does so no more."""

from __future__ import annotations

import torch

from tensorlink.audit.nudge import VARIANTS, nudged
from tensorlink.pipeline.seeds import seed_for
from tensorlink.steplog.replay import Replayer, UnitInputs


def unit(x):
    gradient = torch.randn(len(x), 16) if x.is_floating_point() else torch.randn(*x.shape, 16)
    return UnitInputs(
        x={"0": x}, gy={"0": gradient}, target={}, buffers={}, training=True, loss_weight=None, backward=True,
        seeds=seed_for(0, 0, 0, 0, 0),
    )  # fmt: skip


def gradients(rig, name, x):
    """Of the first stage of a model, once as it is and in each nudged replay."""
    programs, states = rig.stage_programs(rig.MODELS[name](), rig.batch(name)[0][:2])
    one = unit(x)
    if name == "mlp":
        buffers = {key: states[0][key] for key in programs[0].buffers}
        one = UnitInputs(**{**one.__dict__, "buffers": buffers})
    replayer = Replayer(programs[0], None, {key: states[0][key] for key in programs[0].parameters})
    moved = [nudged(replayer, [one], draw) for draw in range(len(VARIANTS))]
    others = [other.gradient(units, variant) for (other, units), variant in zip(moved, VARIANTS, strict=True)]
    return replayer.gradient([one]), others


def test_a_row_that_no_token_names_has_no_gradient_from_other_numbers_either(rig):
    plain, others = gradients(rig, "gpt", torch.randint(0, 20, (4, 6)))
    assert all(not other["0.weight"][20:].any() for other in others)
    used = plain["0.weight"].any(dim=1)
    assert all(torch.equal(other["0.weight"].any(dim=1), used) for other in others)
    assert not torch.equal(others[1]["0.weight"], plain["0.weight"])


def test_a_bias_before_batchnorm_has_noise_for_a_gradient_in_some_replay_or_other(rig):
    torch.manual_seed(0)
    _, others = gradients(rig, "mlp", torch.randn(6, 8))
    somewhere = torch.stack([other["0.bias"] != 0 for other in others]).any(dim=0)
    alive = torch.stack([other["1.bias"] != 0 for other in others]).any(dim=0)  # a dead channel has none at all
    assert torch.equal(somewhere | ~alive, torch.ones(16, dtype=torch.bool))
