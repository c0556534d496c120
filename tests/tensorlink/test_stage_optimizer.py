"""Every allowed optimizer steps bitwise like torch's own, and its state survives a move."""

from __future__ import annotations

import pytest
import torch

from tensorlink.errors import OptimizerError
from tensorlink.stage_optimizer import ALLOWED, StageOptimizer, check_state, decode_options, encode_options, state_specs


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 4, generator=generator, requires_grad=True) for name in ("a", "b")}


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(3, 4, generator=generator) for name in ("a", "b")}


def options(name):
    known = defaults_of(name)
    wanted = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
    return {key: value for key, value in wanted.items() if key in known}


def defaults_of(name):
    return ALLOWED[name]([torch.zeros(1, 1)]).defaults


#: Every option of every optimizer, away from its default at least once.
OPTIONS = [
    *[(name, options(name)) for name in sorted(ALLOWED)],
    *[(name, {"maximize": True}) for name in sorted(ALLOWED) if "maximize" in defaults_of(name)],
    ("ASGD", {"lr": 0.02, "lambd": 1e-3, "alpha": 0.6, "t0": 2.0}),
    ("Adadelta", {"lr": 0.5, "rho": 0.8, "eps": 1e-5}),
    ("Adafactor", {"lr": 0.02, "beta2_decay": -0.7, "eps": (1e-4, 1e-2), "d": 1.5, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 0.02, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-6}),
    ("Adam", {"betas": (0.8, 0.9), "eps": 1e-5, "amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("AdamW", {"betas": (0.8, 0.9), "eps": 1e-5, "amsgrad": True}),
    ("Adamax", {"betas": (0.8, 0.9), "eps": 1e-5}),
    ("Muon", {"nesterov": False, "momentum": 0.8, "ns_steps": 3, "eps": 1e-6, "adjust_lr_fn": "match_rms_adamw"}),
    ("Muon", {"ns_coefficients": (3.0, -4.0, 2.0), "adjust_lr_fn": "original"}),
    ("NAdam", {"betas": (0.8, 0.9), "eps": 1e-5, "momentum_decay": 1e-2, "decoupled_weight_decay": True}),
    ("RAdam", {"betas": (0.8, 0.9), "eps": 1e-5, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("RMSprop", {"alpha": 0.9, "eps": 1e-5, "momentum": 0.9, "centered": True}),
    ("Rprop", {"lr": 0.02, "etas": (0.4, 1.3), "step_sizes": (1e-5, 10.0)}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_an_allowed_optimizer_steps_like_torchs_own_and_can_be_moved(name, options):
    ours, plain = parameters(), parameters()
    group = [{"parameters": ["a", "b", "of another stage"], **encode_options(options)}]
    optimizer = StageOptimizer(name, group, ours)
    torchs = ALLOWED[name](plain.values(), **options)
    for step in range(6):
        if step == 3:
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
    state = optimizer.state_tensors()
    for key, parameter in plain.items():
        for each, value in torchs.state[parameter].items():
            assert torch.equal(state[f"{key}/{each}"], value)


def test_every_option_is_tried():
    tried = {name: {key for each, options in OPTIONS if each == name for key in options} for name in ALLOWED}
    untried = {name: set(encode_options(defaults_of(name))) - tried[name] for name in ALLOWED}
    assert untried == {name: {"decoupled_weight_decay"} if name == "AdamW" else set() for name in ALLOWED}


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 1, 3)])
@pytest.mark.parametrize(("name", "options"), [each for each in OPTIONS if each[0] != "Muon"])
def test_what_state_is_kept_is_known_before_a_step(name, options, shape):
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.ones(shape, dtype=dtype, requires_grad=True)
        parameter.grad = torch.ones_like(parameter)
        plain = ALLOWED[name]([parameter], **options)
        plain.step()
        found = {k: (v.dtype, tuple(v.shape)) for k, v in plain.state[parameter].items() if v is not None}
        kept, needed = state_specs(name, plain.param_groups[0], shape, dtype)
        assert needed == set(found)
        assert {key: kept[key] for key in needed} == found
        check_state(name, plain.param_groups[0], "p", shape, dtype, plain.state[parameter])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exp_avg": None}, "Adam keeps exp_avg, exp_avg_sq, max_exp_avg_sq, step for 'a', found exp_avg_sq, step"),
        ({"more": torch.ones(1)}, "found exp_avg, exp_avg_sq, more, step"),
        ({"exp_avg": torch.ones(4, 3)}, r"exp_avg of 'a' is torch.float32 \[4, 3\], Adam keeps torch.float32 \[3, 4\]"),
        ({"exp_avg": torch.ones(3, 4).double()}, "is torch.float64"),
        ({"step": torch.ones(3, 4)}, r"Adam keeps torch.float32 \[\]"),
    ],
)
def test_state_that_the_optimizer_does_not_keep_is_refused_and_changes_nothing(changes, says):
    optimizer = StageOptimizer("Adam", [{"parameters": ["a", "b"]}], parameters())
    optimizer.step(gradients(0))
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    state = {**{key: before[f"a/{key}"] + 1 for key in ("exp_avg", "exp_avg_sq", "step")}, **changes}
    with pytest.raises(OptimizerError, match=says):
        optimizer.load_state_tensors({f"a/{key}": value for key, value in state.items() if value is not None})
    after = optimizer.state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_state_comes_in_parts():
    ours, other = (StageOptimizer("Adam", [{"parameters": ["a", "b"]}], parameters()) for _ in range(2))
    ours.step(gradients(0))
    for part in ("a/", "b/"):
        other.load_state_tensors({k: v for k, v in ours.state_tensors().items() if k.startswith(part)})
    assert all(torch.equal(value, other.state_tensors()[name]) for name, value in ours.state_tensors().items())


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [{"parameters": ["a"]}],
        [{"parameters": ["a", "b"]}, {"parameters": []}],
        [{"parameters": ["b"]}, {"parameters": ["a"]}],
        [{}, {}],
    ],
)
def test_a_step_with_other_groups_is_refused_for_an_auditor_would_compute_something_else(groups):
    optimizer = StageOptimizer("SGD", [{"parameters": ["a", "elsewhere"]}, {"parameters": ["b"]}], parameters())
    with pytest.raises(OptimizerError, match="not those that the optimizer was made with"):
        optimizer.step(gradients(0), groups)


def test_options_change_with_every_step():
    ours, plain = parameters(), parameters()
    groups = [{"parameters": ["a"]}, {"parameters": ["b"]}]
    optimizer = StageOptimizer("SGD", groups, ours)
    torchs = torch.optim.SGD([{"params": [plain["a"]]}, {"params": [plain["b"]]}])
    for step in range(3):
        rates = [0.1 / (step + 1), 0.2]
        changed = [{**group, "lr": rate.hex()} for group, rate in zip(groups, rates, strict=True)]
        optimizer.step(gradients(step), changed)
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
    defaults = defaults_of(name)
    travelling = encode_options({**defaults, "initial_lr": 0.1})
    assert not any(isinstance(value, float) for value in travelling.values())
    decoded = decode_options(name, travelling)
    assert decoded == {key: value for key, value in defaults.items() if key in decoded}
    assert {"lr", "weight_decay"} & set(defaults) <= set(decoded)


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("LBFGS", [], "found optimizer 'LBFGS', needed one of .*ASGD.*the loss again and again within one step"),
        ("SparseAdam", [], "sparse gradients"),
        ("__class__", [], "workers run no others"),
        ("Muon", [{"parameters": ["a"], "adjust_lr_fn": "__import__"}], "not a number"),
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
    with pytest.raises(OptimizerError, match="no parameter of this stage's optimizer"):
        optimizer.load_state_tensors({"c/exp_avg": torch.ones(1)})
