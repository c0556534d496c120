"""`DistributedOptimizer` is driven like torch's optimizers and does what they do, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers

import tensorlink
from tensorlink.errors import OptimizerError
from tensorlink.stage_optimizer import ALLOWED

pytestmark = pytest.mark.starts_network

X, Y = torch.randn(8, 6), torch.randint(0, 4, (8,))


@pytest.fixture(scope="module")
def job(network):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))
    plain = tensorlink.reference(copy.deepcopy(module), micro_batches=2, example_inputs=(X,))
    with tensorlink.DistributedModel(
        module, network=network, stages=2, micro_batches=2, example_inputs=(X,), progress=False
    ) as model:
        yield model, plain, module.state_dict()


def step(model, optimizer):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(X), Y)
    loss.backward()
    optimizer.step()
    if isinstance(model, tensorlink.reference):
        model.end_step()
    return loss.item()


def assert_same(job, make, plain_groups=None, steps=3, schedule=lambda optimizer: None):
    """Train both sides with the optimizer that `make(parameters or model)` gives, from the same weights."""
    model, plain, start = job
    model.load_state_dict(start)
    plain.module.load_state_dict(start)
    ours = make(lambda cls, **options: tensorlink.DistributedOptimizer(model, cls, **options))
    groups = plain.module.parameters() if plain_groups is None else plain_groups(plain.module)
    theirs = make(lambda cls, **options: cls(groups, **{k: v for k, v in options.items() if k != "groups"}))
    both = schedule(ours), schedule(theirs)
    for _ in range(steps):
        losses = step(model, ours), step(plain, theirs)
        assert losses[0] == losses[1]
        for scheduler in both:
            if isinstance(scheduler, schedulers.ReduceLROnPlateau):
                scheduler.step(losses[0])
            elif scheduler is not None:
                scheduler.step()
    state = model.state_dict()
    assert [name for name, value in plain.module.state_dict().items() if not torch.equal(state[name], value)] == []


@pytest.mark.parametrize("name", sorted(set(ALLOWED) - {"Muon"}))
def test_every_allowed_optimizer_updates_as_torch_s(job, name):
    assert_same(job, lambda make: make(ALLOWED[name], lr=1e-2))


def test_muon_updates_a_model_of_matrices_and_refuses_others(network, job):
    with pytest.raises(OptimizerError, match=r"Muon updates matrices, and 0\.bias has shape \[8\]: freeze it"):
        tensorlink.DistributedOptimizer(job[0], torch.optim.Muon)
    module = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4))
    module[2].bias.requires_grad_(False)
    plain = tensorlink.reference(copy.deepcopy(module), micro_batches=2, example_inputs=(X,))
    with tensorlink.DistributedModel(
        module, network=network, stages=2, micro_batches=2, example_inputs=(X,), progress=False
    ) as model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.Muon, lr=0.1, adjust_lr_fn="match_rms_adamw")
        matrices = [parameter for parameter in plain.module.parameters() if parameter.dim() == 2]
        plain_optimizer = torch.optim.Muon(matrices, lr=0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            assert step(model, optimizer) == step(plain, plain_optimizer)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in plain.module.state_dict().items())


def test_options_reach_the_workers(job):
    assert_same(
        job, lambda make: make(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, dampening=0)
    )
    assert_same(job, lambda make: make(torch.optim.Adam, lr=1e-2, betas=(0.8, 0.95), amsgrad=True, maximize=True))


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 2]),
    "ConstantLR": schedulers.ConstantLR,
    "LinearLR": schedulers.LinearLR,
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-1, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1e-1, total_steps=5),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.5)], o
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_drives_it(job, name):
    assert_same(job, lambda make: make(torch.optim.SGD, lr=1e-2, momentum=0.9), steps=4, schedule=SCHEDULERS[name])


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("cls", "options"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
def test_a_scheduler_sets_every_group_s_options_as_it_sets_a_plain_optimizer_s(job, name, cls, options):
    model, plain, _ = job
    ours = tensorlink.DistributedOptimizer(
        model, cls, groups=[{"parameters": "*.bias", "lr": 3e-3}], lr=1e-2, **options
    )
    named = list(plain.module.named_parameters())
    biases, rest = [[p for n, p in named if n.endswith("bias") == wanted] for wanted in (True, False)]
    theirs = cls([{"params": biases, "lr": 3e-3}, {"params": rest}], lr=1e-2, **options)
    make = LONG.get(name, SCHEDULERS[name])
    both = [(optimizer, make(optimizer)) for optimizer in (ours, theirs)]
    seen = []
    for index in range(20):
        for optimizer, scheduler in both:
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        found = [
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer, _ in both
        ]
        assert found[0] == found[1], index
        seen.append(found[0][0]["lr"])
    assert len(set(seen)) > 1
    assert both[0][1].state_dict().keys() == both[1][1].state_dict().keys()


#: The same for more steps than `SCHEDULERS` has room for.
LONG = {"OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1e-1, total_steps=21)}


def test_one_cycle_moves_adam_s_betas_too(job):
    assert_same(job, lambda make: make(torch.optim.AdamW, lr=1e-2), steps=4, schedule=SCHEDULERS["OneCycleLR"])


def test_groups_are_made_by_patterns_of_names(job):
    groups = [{"parameters": ["*.bias", "2.*"], "weight_decay": 0.0, "lr": 1e-3}]

    def plain_groups(module):
        named = dict(module.named_parameters())
        first = [p for name, p in named.items() if name.endswith("bias") or name.startswith("2.")]
        return [
            {"params": first, "weight_decay": 0.0, "lr": 1e-3},
            {"params": [p for p in named.values() if all(p is not each for each in first)]},
        ]

    assert_same(job, lambda make: make(torch.optim.AdamW, groups=groups, lr=1e-2, weight_decay=0.1), plain_groups)


def test_a_group_changed_between_steps_counts_from_the_next(job):
    def halve(optimizer):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / 2

    class Halving:
        def __init__(self, optimizer):
            self.step = lambda: halve(optimizer)

    assert_same(job, lambda make: make(torch.optim.Adam, lr=1e-2), schedule=Halving)


def test_a_closure_is_evaluated_with_gradients(job):
    model, *_ = job
    optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    before = model.report()["num_steps"]
    assert optimizer.step(closure).item() > 0
    assert model.report()["num_steps"] == before + 1


def test_what_has_no_meaning_here_is_refused_and_not_ignored(job):
    model, *_ = job
    for option in ("capturable", "differentiable"):
        with pytest.raises(OptimizerError, match=f"{option}=True: updates run on workers"):
            tensorlink.DistributedOptimizer(model, torch.optim.Adam, **{option: True})
    group = {"parameters": "*", "initial_accumulator_value": 1.0}
    with pytest.raises(OptimizerError, match="initial_accumulator_value for all groups at once"):
        tensorlink.DistributedOptimizer(model, torch.optim.Adagrad, groups=[group])
    optimizer = tensorlink.DistributedOptimizer(model, torch.optim.Adam, foreach=True)
    with pytest.raises(OptimizerError, match=r"pass groups=.*lr=0\.0 holds it still"):
        optimizer.add_param_group({"params": list(model.parameters())})
    for look in (
        lambda: optimizer.state[next(model.parameters())],
        lambda: list(optimizer.state),
        lambda: optimizer.state.clear(),
        lambda: len(optimizer.state),
        lambda: copy.deepcopy(optimizer),
    ):
        with pytest.raises(OptimizerError, match=r"optimizer\.state_dict\(\)"):
            look()


# -- state in torch's own format -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen(network):
    """A job with a parameter that is frozen and one that no stage computes with, and its twin."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.idle, self.norm = nn.Linear(6, 8), nn.Linear(2, 2), nn.LayerNorm(8)
            self.two = nn.Linear(8, 4)
            self.one.bias.requires_grad_(False)

        def forward(self, x):
            return self.two(self.norm(torch.tanh(self.one(x))))

    torch.manual_seed(0)
    module = Net()
    plain = tensorlink.reference(copy.deepcopy(module), micro_batches=2, example_inputs=(X,))
    with tensorlink.DistributedModel(
        module, network=network, stages=2, micro_batches=2, example_inputs=(X,), progress=False
    ) as model:
        yield model, plain, module.state_dict()


STATES = {
    "Adam": {"lr": 1e-2, "amsgrad": True},
    "Adafactor": {"lr": 1e-2},
    "ASGD": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-2, "centered": True, "momentum": 0.9},
    "Rprop": {"lr": 1e-2},
    "SGD": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2},
    "Adagrad": {"lr": 1e-2, "initial_accumulator_value": 0.3},
}


def assert_same_optimizer_state(ours, theirs):
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == sorted(ours["state"])
    for index, state in theirs["state"].items():
        if index in ours["state"]:
            assert state.keys() == ours["state"][index].keys()
            for key, value in state.items():
                assert torch.equal(value, ours["state"][index][key]), (index, key)
        else:  # Adagrad makes state for what has no gradient
            assert all(not value.any() or key == "sum" for key, value in state.items())


def plain_groups(module):
    named = dict(module.named_parameters())
    first = [p for name, p in named.items() if name.endswith("bias")]
    return [{"params": first, "lr": 1e-3}, {"params": [p for name, p in named.items() if not name.endswith("bias")]}]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", STATES)
def test_state_goes_to_a_plain_optimizer_and_back_and_training_goes_on_bitwise(frozen, name, grouped):
    model, plain, start = frozen
    model.load_state_dict(start), plain.module.load_state_dict(start)
    options = STATES[name]
    groups = [{"parameters": "*.bias", "lr": 1e-3}] if grouped else []

    def ours():
        return tensorlink.DistributedOptimizer(model, ALLOWED[name], groups=groups, **options)

    def theirs():
        return ALLOWED[name](plain_groups(plain.module) if grouped else plain.module.parameters(), **options)

    optimizer, plain_optimizer = ours(), theirs()
    for _ in range(2):
        assert step(model, optimizer) == step(plain, plain_optimizer)
    saved, plain_saved = optimizer.state_dict(), plain_optimizer.state_dict()
    assert_same_optimizer_state(saved, plain_saved)
    plain_saved = copy.deepcopy(plain_saved)
    optimizer, plain_optimizer = ours(), theirs()
    optimizer.load_state_dict(plain_saved), plain_optimizer.load_state_dict(saved)
    for _ in range(2):
        assert step(model, optimizer) == step(plain, plain_optimizer)
    assert_same_optimizer_state(optimizer.state_dict(), plain_optimizer.state_dict())
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.module.state_dict().items())


def test_state_that_does_not_fit_is_refused_and_changes_nothing(frozen):
    model, *_ = frozen
    optimizer = tensorlink.DistributedOptimizer(model, torch.optim.Adam, lr=1e-2)
    step(model, optimizer)
    saved = optimizer.state_dict()
    number = next(iter(saved["state"]))
    groups = saved["param_groups"]
    for bad, says in (
        ({**saved, "param_groups": groups * 2}, "groups of .* parameters, needed"),
        ({**saved, "param_groups": [{**groups[0], "params": [0]}]}, r"groups of \[1\] parameters, needed \[8\]"),
        ({**saved, "state": {99: {}}}, "state for parameter 99"),
        ({**saved, "state": {number: {"step": torch.tensor(1.0)}}}, "Adam keeps exp_avg, exp_avg_sq"),
        ({**saved, "state": {number: {**saved["state"][number], "exp_avg": torch.ones(2)}}}, r"\[2\], Adam keeps"),
        ({**saved, "state": {number: {"step": "x"}}}, "found optimizer state of type str"),
        ({**saved, "param_groups": [{**groups[0], "lr": "fast"}]}, "option lr='fast' does not travel"),
    ):
        with pytest.raises(OptimizerError, match=says):
            optimizer.load_state_dict(bad)
    assert_same_optimizer_state(optimizer.state_dict(), saved)


def test_hooks_of_state_dicts_are_called(frozen):
    model, *_ = frozen
    optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=1e-2)
    called = []
    optimizer.register_state_dict_pre_hook(lambda *_: called.append("before save"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: called.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: called.append("after load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["before save", "before load", "after load"]


def test_an_optimizer_that_workers_do_not_run_is_refused(job):
    model, *_ = job

    class Own(torch.optim.SGD):
        pass

    for found in (torch.optim.LBFGS, torch.optim.SparseAdam, Own, "SGD"):
        with pytest.raises(OptimizerError, match=r"needed one of torch\.optim's ASGD, .*SGD: "):
            tensorlink.DistributedOptimizer(model, found, lr=0.1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"learning_rate": 1.0}, "unexpected keyword argument 'learning_rate'"),
        ({"groups": [{"lr": 1.0}]}, "needs the key 'parameters'"),
        ({"groups": [{"parameters": ["nothing.*"]}]}, r"no trainable parameter matches \['nothing\.\*'\]"),
        ({"groups": [{"parameters": ["0.*"], "speed": 3}]}, "SGD has no option 'speed'; it has dampening"),
    ],
)
def test_options_that_torch_would_refuse_are_refused_here(job, options, says):
    model, *_ = job
    with pytest.raises(OptimizerError, match=says):
        tensorlink.DistributedOptimizer(model, torch.optim.SGD, **options)


def test_the_optimizer_made_last_is_the_one_in_force(job):
    model, *_ = job
    old = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)
    new = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(OptimizerError, match="made last"):
        old.step()
    step(model, new)


def test_clipping_needs_an_optimizer(network):
    with tensorlink.DistributedModel(
        nn.Linear(6, 4), network=network, stages=1, example_inputs=(X,), progress=False
    ) as model:
        F.cross_entropy(model(X), Y).backward()
        with pytest.raises(OptimizerError, match="make one first"):
            model.clip_grad_norm_(1.0)
