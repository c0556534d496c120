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


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_every_allowed_optimizer_updates_as_torch_s(job, name):
    assert_same(job, lambda make: make(ALLOWED[name], lr=1e-2))


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
