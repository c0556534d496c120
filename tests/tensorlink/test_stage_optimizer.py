"""Every allowed optimizer steps bitwise like torch's own, and its state survives a move."""

from __future__ import annotations

import pytest
import torch

from tensorlink.errors import OptimizerError
from tensorlink.stage_optimizer import ALLOWED, StageOptimizer, decode_options, encode_options


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 4, generator=generator, requires_grad=True) for name in ("a", "b")}


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(3, 4, generator=generator) for name in ("a", "b")}


def options(name):
    known = ALLOWED[name]([torch.zeros(1)]).defaults
    wanted = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
    return {key: value for key, value in wanted.items() if key in known}


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_an_allowed_optimizer_steps_like_torchs_own_and_can_be_moved(name):
    ours, plain = parameters(), parameters()
    group = [{"parameters": ["a", "b", "of another stage"], **encode_options(options(name))}]
    optimizer = StageOptimizer(name, group, ours)
    torchs = ALLOWED[name](plain.values(), foreach=False, **options(name))
    for step in range(4):
        if step == 2:
            moved = {key: tensor.detach().clone().requires_grad_() for key, tensor in ours.items()}
            fresh = StageOptimizer(name, group, moved)
            fresh.load_state_tensors(optimizer.state_tensors())
            ours, optimizer = moved, fresh
        optimizer.step(gradients(step), group)
        for key, gradient in gradients(step).items():
            plain[key].grad = gradient
        torchs.step()
        assert all(torch.equal(ours[key], plain[key]) for key in ours)
        assert all(parameter.grad is None for parameter in ours.values())


def test_options_change_with_every_step():
    ours, plain = parameters(), parameters()
    optimizer = StageOptimizer("SGD", [{"parameters": ["a"]}, {"parameters": ["b"]}], ours)
    torchs = torch.optim.SGD([{"params": [plain["a"]]}, {"params": [plain["b"]]}])
    for step in range(3):
        rates = [0.1 / (step + 1), 0.2]
        optimizer.step(gradients(step), [{"lr": rate.hex()} for rate in rates])
        for group, rate in zip(torchs.param_groups, rates, strict=True):
            group["lr"] = rate
        for key, gradient in gradients(step).items():
            plain[key].grad = gradient
        torchs.step()
    assert all(torch.equal(ours[key], plain[key]) for key in ours)


def test_a_parameter_without_gradient_stays_as_it_is():
    ours = parameters()
    kept = ours["b"].detach().clone()
    optimizer = StageOptimizer("AdamW", [{"parameters": ["a", "b"]}], ours)
    optimizer.step({"a": torch.ones(3, 4)})
    assert torch.equal(ours["b"], kept)
    assert all(name.startswith("a/") for name in optimizer.state_tensors())


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_options_travel_without_floats_and_come_back_exactly(name):
    defaults = ALLOWED[name]([torch.zeros(1)]).defaults
    travelling = encode_options({**defaults, "initial_lr": 0.1})
    assert not any(isinstance(value, float) for value in travelling.values())
    decoded = decode_options(name, travelling)
    assert decoded == {key: value for key, value in defaults.items() if key in decoded}
    assert {"lr", "weight_decay"} & set(defaults) <= set(decoded)


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("LBFGS", [], "allowed are ASGD"),
        ("__class__", [], "allowed are"),
        ("SGD", [{"parameters": ["a"], "betas": ["0x1p-1"]}], "no option 'betas'; it has"),
        ("SGD", [{"parameters": ["a"], "foreach": True}], "no option 'foreach'"),
        ("SGD", [{"parameters": ["a"], "lr": "fast"}], "not a number"),
        ("SGD", [{"parameters": ["a"], "lr": ["0x1p-1"] * 9}], "not a number"),
        ("SGD", [{"parameters": ["a"], "lr": (-1.0).hex()}], "Invalid learning rate"),
        ("SGD", [{"parameters": ["a"]}, {"parameters": ["a"]}], "stands in two groups"),
    ],
)
def test_what_workers_do_not_run_is_refused(name, groups, message):
    with pytest.raises(OptimizerError, match=message):
        StageOptimizer(name, groups, parameters())


def test_state_of_unknown_parameters_is_refused():
    optimizer = StageOptimizer("Adam", [{"parameters": ["a"]}], parameters())
    with pytest.raises(OptimizerError, match="no parameter of this stage"):
        optimizer.load_state_tensors({"c/exp_avg": torch.ones(1)})
