"""Training over real processes is, bit for bit, the training of one plain process."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tensorlink
from smartnodes_core.errors import JobError
from tensorlink.demo.model import ByteGPT, next_byte_loss
from tensorlink.errors import (
    InputError,
    NonFiniteError,
    OptimizerError,
    PartitionError,
    RemoteParameterError,
    TraceError,
)

pytestmark = pytest.mark.starts_network


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x):
        return self.layers(x)


class Cnn(nn.Module):
    """Batch statistics are state: they must go through micro-batches in order."""

    def __init__(self):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.two, self.norm2 = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.norm1(self.one(x)))
        return self.head(F.relu(self.norm2(self.two(x))).mean((2, 3)))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.Dropout(0.4), nn.ReLU(), nn.Linear(16, 16), nn.Dropout(0.2), nn.Linear(16, 4)
        )

    def forward(self, x):
        return self.layers(x)


class Keywords(nn.Module):
    """Two inputs by keyword, a dict of outputs, one of them an integer."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, *, ids, scale):
        h = torch.tanh(self.mix(self.embed(ids).mean(1) * scale))
        logits = self.head(h)
        return {"logits": logits, "hidden": h, "best": logits.argmax(1)}


class WithLoss(nn.Module):
    """Computes its own loss, and branches on its data."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.flip = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, *, ids, labels):
        h = self.embed(ids)
        h = torch.cond(h[0, 0, 0] > 0, lambda h: torch.tanh(self.mix(h)), lambda h: torch.relu(self.flip(h)), (h,))
        logits = self.head(h)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits.flatten(0, 1)}


class Unused(nn.Module):
    """A parameter and a buffer that nothing computes with, a tied weight, and a buffer outside of the state_dict."""

    def __init__(self):
        super().__init__()
        self.first, self.never = nn.Linear(6, 6), nn.Linear(3, 3)
        self.again = self.first
        self.second = nn.Sequential(nn.Linear(6, 4096), nn.Linear(4096, 6))  # most of the work, so that the cut is here
        self.head = nn.Linear(6, 4)
        self.register_buffer("shift", torch.arange(6.0), persistent=False)
        self.register_buffer("idle", torch.full((2,), 5.0))

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.again(self.first(x))) + self.shift)))


def rows(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def classes(count, high=4, seed=0, shape=()):
    return torch.randint(0, high, (count, *shape), generator=torch.Generator().manual_seed(seed))


def frozen():
    module = Mlp()
    module.layers[0].weight.requires_grad_(False)
    module.layers[4].bias.requires_grad_(False)
    return module


def keyword_loss(outputs, target):
    return (
        F.cross_entropy(outputs["logits"], target["labels"]) + outputs["hidden"].pow(2).mean() * target["factor"].mean()
    )


def own_loss(outputs, target):
    return outputs["loss"] + F.cross_entropy(outputs["logits"], target.flatten(), label_smoothing=0.1)


def own_loss_batch(seed):
    labels = classes(7, 4, seed, (5,))
    return {"ids": classes(7, 20, seed, (5,)), "labels": labels}, labels


def text_batch(seed):
    return classes(8, 256, seed, (8,)), classes(8, 256, seed + 1, (8,))


def keyword_batch(seed):
    x = {"ids": classes(8, 20, seed, (5,)), "scale": rows(8, 1, seed=seed)}
    return x, {"labels": classes(8, 4, seed), "factor": rows(8, seed=seed).abs()}


CASES = {
    "gpt": (lambda: ByteGPT(2, 16, 2, 8), text_batch, next_byte_loss),
    "mlp, uneven batches": (Mlp, lambda s: (rows(11, 6, seed=s), classes(11, seed=s)), F.cross_entropy),
    "fewer samples than micro-batches": (Mlp, lambda s: (rows(3, 6, seed=s), classes(3, seed=s)), F.cross_entropy),
    "convolutions with batch norm": (Cnn, lambda s: (rows(8, 1, 8, 8, seed=s), classes(8, seed=s)), F.cross_entropy),
    "dropout": (Dropping, lambda s: (rows(8, 6, seed=s), classes(8, seed=s)), F.cross_entropy),
    "frozen parameters": (frozen, lambda s: (rows(8, 6, seed=s), classes(8, seed=s)), F.cross_entropy),
    "keywords and dicts": (Keywords, keyword_batch, keyword_loss),
    "a loss and a branch inside": (WithLoss, own_loss_batch, own_loss),
    "autocast": (WithLoss, own_loss_batch, own_loss),
}  # fmt: skip


def call(model, x):
    return model(**x) if isinstance(x, dict) else model(x)


def example(x):
    return x if isinstance(x, dict) else (x,)


def pair(network, module, x, **options):
    """The module on the network, and its twin in this process."""
    twin = copy.deepcopy(module)
    arguments = {"micro_batches": 4, "example_inputs": example(x), "seed": 3, **options}
    plain = tensorlink.reference(twin, **arguments)
    model = tensorlink.DistributedModel(module, network=network, stages=2, progress=False, **arguments)
    return model, plain


def assert_same_state(model, module):
    ours, theirs = model.state_dict(), module.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_one_plain_process(network, case):
    make, batch, loss_fn = CASES[case]
    torch.manual_seed(0)
    module = make()
    autocast = torch.bfloat16 if case == "autocast" else None
    model, plain = pair(network, module, batch(0)[0], autocast=autocast)
    with model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
        plain_optimizer = torch.optim.AdamW(plain.module.parameters(), lr=1e-2)
        for step in range(3):
            x, y = batch(step)
            optimizer.zero_grad()
            loss = loss_fn(call(model, x), y)
            loss.backward()
            optimizer.step()
            plain_optimizer.zero_grad()
            expected = loss_fn(call(plain, x), y)
            expected.backward()
            plain_optimizer.step()
            plain.end_step()
            assert loss.item() == expected.item(), step
            model.eval(), plain.eval()
            with torch.no_grad():
                assert loss_fn(call(model, x), y).item() == loss_fn(call(plain, x), y).item(), step
            model.train(), plain.train()
        for step in range(3, 5):
            x, y = batch(step)
            loss = model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer)
            expected = plain.train_step(x, y, loss_fn=loss_fn, optimizer=plain_optimizer)
            assert loss.item() == expected.item(), step
        assert_same_state(model, plain.module)
        assert model.report()["num_steps"] == 5


@pytest.fixture(scope="module")
def mlp(network):
    """One job for all tests that leave it usable: (model, plain twin), made equal and given fresh optimizers each
    time by `fresh`."""
    torch.manual_seed(1)
    x = rows(8, 6).requires_grad_()
    model, plain = pair(network, Mlp(), x)
    with model:
        yield model, plain


@pytest.fixture
def fresh(mlp):
    """Twins in the same state, with SGD each: (model, optimizer, plain, plain optimizer, x, y)."""
    model, plain = mlp
    torch.manual_seed(2)
    state = {name: torch.randn_like(value) * 0.3 for name, value in plain.module.state_dict().items()}
    plain.module.load_state_dict(state)
    model.load_state_dict(state)
    model.train(), plain.train()
    optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    plain_optimizer = torch.optim.SGD(plain.module.parameters(), lr=0.1, momentum=0.9)
    plain_optimizer.zero_grad()
    return model, optimizer, plain, plain_optimizer, rows(9, 6, seed=5), classes(9, seed=5)


def train(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    if isinstance(model, tensorlink.reference):
        model.end_step()
    return loss.item()


def test_gradients_of_several_backwards_add_up_before_a_step(fresh):
    model, optimizer, plain, plain_optimizer, x, y = fresh
    for each, opt in ((model, optimizer), (plain, plain_optimizer)):
        for part in (slice(0, 5), slice(5, 9)):
            F.cross_entropy(each(x[part]), y[part]).backward()
        with torch.no_grad():
            each(x)
        opt.step()
    plain.end_step()
    assert_same_state(model, plain.module)


def test_a_retained_graph_goes_backwards_twice_and_no_other_does(fresh):
    model, optimizer, plain, plain_optimizer, x, y = fresh
    for each, opt in ((model, optimizer), (plain, plain_optimizer)):
        loss = F.cross_entropy(each(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
        opt.step()
    plain.end_step()
    assert_same_state(model, plain.module)
    out = model(x)
    out.sum().backward()
    with pytest.raises(JobError, match="retain_graph=True"):
        out.backward(torch.ones_like(out))
    stale = model(x)
    optimizer.step()
    with pytest.raises(JobError, match="before the last step"):
        stale.sum().backward()
    optimizer.zero_grad()


def test_inputs_get_their_gradients(fresh):
    model, _, plain, _, x, y = fresh
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.cross_entropy(model(ours * 2), y).backward()
    F.cross_entropy(plain(theirs * 2), y).backward()
    assert torch.equal(ours.grad, theirs.grad)
    model.zero_grad()


def test_dropped_forwards_free_their_activations(fresh):
    model, optimizer, plain, plain_optimizer, x, y = fresh
    for _ in range(3):
        model(x)  # nobody keeps the output
    gc.collect()
    assert len(model._calls._open) <= 3
    kept = model(x)
    assert len(model._calls._open) == 1
    assert len(model._driver._calls) == 1
    F.cross_entropy(kept, y).backward()
    optimizer.step()
    F.cross_entropy(plain(x), y).backward()
    plain_optimizer.step()
    plain.end_step()
    assert_same_state(model, plain.module)


def test_zero_grad_drops_what_was_added(fresh):
    model, optimizer, plain, plain_optimizer, x, y = fresh
    F.cross_entropy(model(x), y).backward()
    model.zero_grad()
    assert train(model, optimizer, x, y) == train(plain, plain_optimizer, x, y)
    optimizer.step()  # nothing to do: no gradients
    assert_same_state(model, plain.module)


def test_clipping_is_torch_s(fresh):
    model, optimizer, plain, plain_optimizer, x, y = fresh
    F.cross_entropy(model(x) * 50, y).backward()
    F.cross_entropy(plain(x) * 50, y).backward()
    norm = model.clip_grad_norm_(0.5)
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(plain.module.parameters(), 0.5).item(), rel=1e-6)
    optimizer.step(), plain_optimizer.step()
    plain.end_step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.module.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_several_forwards_before_one_backward_and_a_second_backward_through_both(fresh):
    model, optimizer, plain, plain_optimizer, x, y = fresh
    for each, opt in ((model, optimizer), (plain, plain_optimizer)):
        first, second = each(x[:5]), each(x[4:])
        loss = F.cross_entropy(first, y[:5]) + 0.5 * F.cross_entropy(second, y[4:])
        loss.backward(retain_graph=True)
        (first.square().mean() * second.square().mean()).backward()
        opt.step()
    plain.end_step()
    assert_same_state(model, plain.module)


def test_clipping_takes_the_norm_of_all_that_was_accumulated(fresh):
    model, optimizer, plain, plain_optimizer, x, y = fresh
    for each, opt in ((model, optimizer), (plain, plain_optimizer)):
        for part in (slice(0, 5), slice(5, 9)):
            F.cross_entropy(each(x[part]) * 20, y[part]).backward()
        clip = (
            model.clip_grad_norm_
            if each is model
            else partial(nn.utils.clip_grad_norm_, list(plain.module.parameters()))
        )
        assert clip(1e9) > 0.5
        clip(0.5)
        opt.step()
    plain.end_step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.module.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_a_training_step_clips_like_the_loop(fresh):
    model, optimizer, plain, *_ = fresh
    x, y = fresh[4:]
    model.train_step(x, y, loss_fn=F.cross_entropy, optimizer=optimizer, clip_norm=0.01)
    clipping = torch.optim.SGD(plain.module.parameters(), lr=0.1, momentum=0.9)

    def clip(*_):
        nn.utils.clip_grad_norm_(plain.module.parameters(), 0.01)

    clipping.register_step_pre_hook(clip)
    plain.train_step(x, y, loss_fn=F.cross_entropy, optimizer=clipping)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.module.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_a_gradient_that_is_not_finite_drops_the_step_on_every_stage(fresh):
    model, optimizer, plain, plain_optimizer, x, y = fresh
    before = model.state_dict()
    step = model.report()["num_steps"]
    (model(x) * float("inf")).sum().backward()
    with pytest.raises(NonFiniteError, match=r"gradient of layers\.\d.* no parameter changed"):
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.report()["num_steps"] == step
    assert train(model, optimizer, x, y) == train(plain, plain_optimizer, x, y)
    assert_same_state(model, plain.module)


def test_a_loss_in_the_last_stage_that_is_not_finite_drops_the_step(fresh):
    model, optimizer, *_, x, y = fresh
    before = model.state_dict()
    with pytest.raises(NonFiniteError, match="no parameter changed"):
        model.train_step(x, y, loss_fn=lambda o, t: F.cross_entropy(o * float("inf"), t), optimizer=optimizer)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_losses_may_alternate_and_weigh(fresh):
    model, optimizer, plain, plain_optimizer, x, y = fresh

    def squares(outputs, target):
        return (outputs - F.one_hot(target, 4)).pow(2).sum()

    for loss_fn, reduction in (
        (F.cross_entropy, "mean"),
        (squares, "sum"),
        (F.cross_entropy, lambda target: float((target > 0).sum()) + 1),
    ):
        ours = model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer, loss_reduction=reduction)
        theirs = plain.train_step(x, y, loss_fn=loss_fn, optimizer=plain_optimizer, loss_reduction=reduction)
        assert ours.item() == theirs.item()
    assert_same_state(model, plain.module)


def test_a_lambda_in_the_loop_is_traced_once(fresh):
    model, optimizer, *_, x, y = fresh
    losses = model._train_step._losses
    for _ in range(3):
        model.train_step(x, y, loss_fn=lambda outputs, target: F.cross_entropy(outputs, target), optimizer=optimizer)
    count = len(losses)
    model.train_step(x, y, loss_fn=F.cross_entropy, optimizer=optimizer)
    assert len(losses) - count <= 1


def test_whatever_an_honest_user_does_audits_pass(network, processes):
    """Losses that alternate, weights that are loaded, accumulation, evaluation and dropped steps accuse nobody."""
    torch.manual_seed(0)
    x, y = rows(8, 6), classes(8)
    with tensorlink.DistributedModel(
        Dropping(),
        network=network,
        stages=2,
        micro_batches=2,
        example_inputs=(x,),
        audit_rates=(1.0, 1.0),
        progress=False,
    ) as model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
        start = model.state_dict()
        for step in range(4):
            train(model, optimizer, x, y)
            model.train_step(x, y, loss_fn=F.cross_entropy, optimizer=optimizer, clip_norm=0.1)
            model.train_step(x, y, loss_fn=lambda o, t: F.cross_entropy(o * 2, t), optimizer=optimizer)
            with torch.no_grad():
                model.eval()(x)
            model.train()
            model(x)
            for _ in range(2):
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            (model(x) * float("nan")).sum().backward()
            with pytest.raises(NonFiniteError):
                optimizer.step()
            if step == 1:
                model.load_state_dict(start)
                optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=1e-2, momentum=0.9)
        assert processes.wait_until(lambda: sum(model.audits().values()) >= 32, 30) is not None, model.audits()
        assert model.audits()["failed"] == 0, [v.reason for v in model.verdicts() if v.finding != "honest"]
        assert model.audits()["inconclusive"] == 0, [v.reason for v in model.verdicts() if v.finding != "honest"]


# -- names and weights -------------------------------------------------------------------------------------------------


def test_names_order_ties_and_the_unused_survive_a_round_trip(network):
    torch.manual_seed(0)
    module = Unused()
    x = rows(8, 6)
    with tensorlink.DistributedModel(module, network=network, stages=2, example_inputs=(x,), progress=False) as model:
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in module.named_parameters()]
        assert {name for name, _ in model.named_parameters(remove_duplicate=False)} == {
            name for name, _ in module.named_parameters(remove_duplicate=False)
        }
        assert next(name for name, _ in model.named_parameters("m")) == "m.first.weight"
        assert list(model.named_parameters(recurse=False)) == []
        assert_same_state(model, module)
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.Adam)
        train(model, optimizer, x, classes(8))
        changed = {name: value + 1 for name, value in module.state_dict().items()}
        assert tuple(model.load_state_dict(changed)) == ([], [])
        state = model.state_dict()
        assert all(torch.equal(state[name], changed[name]) for name in changed)
        found = model.load_state_dict({"head.bias": torch.zeros(4), "other": torch.zeros(1)}, strict=False)
        assert found.unexpected_keys == ["other"]
        assert "first.weight" in found.missing_keys
        state = model.state_dict()
        assert torch.equal(state["head.bias"], torch.zeros(4))
        assert torch.equal(state["never.bias"], changed["never.bias"])
        module.load_state_dict(state)
        with pytest.raises(JobError, match=r"missing \['idle', 'first\.weight'.*strict=False"):
            model.load_state_dict({})
        with pytest.raises(JobError, match=r"head\.bias is \[5\], the model has \[4\]"):
            model.load_state_dict({**changed, "head.bias": torch.zeros(5)})


def test_the_report_is_plain_data(mlp):
    report = json.loads(json.dumps(mlp[0].report()))
    assert report["num_stages"] == 2
    assert report["stages"][0]["parameters"] == ["layers.0.weight", "layers.0.bias"]
    assert {stage["reputation"] for stage in report["stages"]} > {0} or report["stages"][0]["reputation"] >= 1
    assert report["stages"][1]["busy_s"] > 0


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit_the_trace_are_refused_here(mlp):
    model, _ = mlp
    for bad in (rows(8, 7), rows(8, 6).double(), classes(8), rows(0, 6), [1.0]):
        with pytest.raises(InputError):
            model(bad)
    with pytest.raises(InputError, match="forward"):
        model(rows(8, 6), rows(8, 6))


def test_inputs_that_are_not_finite_are_refused_here(fresh):
    model, optimizer, *_, x, y = fresh
    x[4, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"input 'x' holds NaN or infinity in sample 4: clean"):
        model(x)
    with pytest.raises(NonFiniteError, match="sample 4"):
        model.train_step(x, y, loss_fn=F.cross_entropy, optimizer=optimizer)


def test_a_training_step_needs_a_scalar_loss_and_a_target_of_the_batch(fresh):
    model, optimizer, *_, x, y = fresh
    with pytest.raises(TraceError, match="one scalar"):
        model.train_step(x, y, loss_fn=lambda o, t: F.cross_entropy(o, t, reduction="none"), optimizer=optimizer)
    with pytest.raises(InputError, match="9 samples"):
        model.train_step(x, y[:5], loss_fn=F.cross_entropy, optimizer=optimizer)
    with pytest.raises(InputError, match="then the target"):
        model.train_step(x, loss_fn=F.cross_entropy, optimizer=optimizer)
    with pytest.raises(JobError, match="loss_reduction"):
        model.train_step(x, y, loss_fn=F.cross_entropy, optimizer=optimizer, loss_reduction="none")
    with pytest.raises(OptimizerError, match="another optimizer"):
        model.train_step(x, y, loss_fn=F.cross_entropy, optimizer=object())
    assert train(model, optimizer, x, y) > 0


def test_torch_s_own_tools_are_refused_with_the_name_of_ours(mlp):
    model, _ = mlp
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    ours_ = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    for act, ours in (
        (own.step, "DistributedOptimizer"),
        (own.zero_grad, "zero_grad"),
        (lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0), "clip_grad_norm_"),
        (lambda: next(model.parameters()).grad, "DistributedOptimizer"),
        (lambda: next(model.parameters()).detach(), "state_dict"),
        (lambda: next(model.parameters()) + 1, "state_dict"),
        (lambda: nn.utils.clip_grad_value_(model.parameters(), 1.0), "clip_grad_norm_"),
        (lambda: nn.utils.parameters_to_vector(model.parameters()), "state_dict"),
        (lambda: nn.utils.vector_to_parameters(torch.zeros(999), model.parameters()), "state_dict"),
        (lambda: torch.optim.swa_utils.AveragedModel(model), r"average or copy model\.state_dict\(\)"),
        (lambda: copy.deepcopy(model), "state_dict"),
        (lambda: copy.copy(model), "save_checkpoint"),
        (lambda: torch.save(model, io.BytesIO()), "save_checkpoint"),
        (lambda: pickle.dumps(model), "save_checkpoint"),
        (lambda: model.requires_grad_(False), "freeze parameters before wrapping"),
        (lambda: scaler.step(ours_), "DistributedOptimizer"),
        (lambda: scaler.unscale_(ours_), "DistributedOptimizer"),
    ):
        with pytest.raises(RemoteParameterError, match=ours):
            act()


def test_a_model_that_is_spread_out_is_not_moved_or_cast(mlp):
    model, _ = mlp
    for act in (model.half, model.double, model.cpu, lambda: model.to("cpu"), lambda: model.to(torch.bfloat16)):
        with pytest.raises(RemoteParameterError, match="before wrapping"):
            act()


def test_a_model_that_branches_on_data_cannot_be_traced(network):
    class Branching(Mlp):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x[:, :4]

    with pytest.raises(TraceError, match=r"test_model\.py.*torch\.cond"):
        tensorlink.DistributedModel(
            Branching(), network=network, stages=2, example_inputs=(rows(8, 6),), progress=False
        )


def test_more_stages_than_layers_are_refused(network):
    with pytest.raises(PartitionError, match=r"3 stages were asked for.*at most 2"):
        tensorlink.DistributedModel(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
            network=network,
            stages=3,
            example_inputs=(rows(8, 4),),
            progress=False,
        )


def test_micro_batches_are_counted_from_one(network):
    with pytest.raises(JobError, match="micro_batches=0"):
        tensorlink.DistributedModel(Mlp(), network=network, micro_batches=0, example_inputs=(rows(8, 6),))


def test_an_output_without_a_batch_is_refused(network):
    class Centre(Mlp):
        def forward(self, x):
            return super().forward(x).mean(0)

    with pytest.raises(TraceError, match="needed a tensor with one batch dimension or a scalar"):
        tensorlink.DistributedModel(Centre(), network=network, stages=2, example_inputs=(rows(8, 6),), progress=False)


def test_a_closed_job_says_so(network):
    model = tensorlink.DistributedModel(Mlp(), network=network, stages=1, example_inputs=(rows(8, 6),), progress=False)
    model.close()
    model.close()
    with pytest.raises(JobError, match="the job is closed"):
        model(rows(8, 6))
