"""Layers that stay with the user change no bit of the training, and what they are to hide leaves no trace outside."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import tensorlink
from smartnodes_core.errors import JobError
from smartnodes_core.records import NO_DIGEST
from tensorlink.audit.commitments import input_root
from tensorlink.errors import NonFiniteError, OptimizerError, PartitionError, RemoteParameterError
from tensorlink.parameters import PRIVATE
from tensorlink.pipeline.frames import tensor_bytes
from tensorlink.steplog.digests import digest, root

ENDS = ("first", "last", "both")


@pytest.fixture
def inside():
    """A network inside this process."""
    spec = importlib.util.spec_from_file_location("inprocess", Path(__file__).with_name("inprocess.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.InProcess()


def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 4))


def frozen():
    """The private head has nothing to train: no gradient comes back from the workers."""
    module = mlp()
    module[0].requires_grad_(False)
    return module


class Cnn(nn.Module):
    """Batch norm at both ends and in the middle."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.body(self.stem(x)).mean((2, 3))))


class Block(nn.Module):
    """(B, T, C) to (B, T, C): causal attention of two heads and an MLP, both residual, with dropout."""

    def __init__(self, width=16):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """(B, T) tokens to (B, T, V) logits, with dropout everywhere; `tied`: embedding and head are one weight."""

    def __init__(self, tied=False):
        super().__init__()
        self.token, self.position, self.drop = nn.Embedding(32, 16), nn.Embedding(8, 16), nn.Dropout(0.2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.last, self.head = nn.LayerNorm(16), nn.Dropout(0.2), nn.Linear(16, 32, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x):
        h = self.drop(self.token(x) + self.position(torch.arange(x.shape[1], device=x.device)))
        for block in self.blocks:
            h = block(h)
        return self.head(self.last(self.norm(h)))


def tied():
    return Transformer(tied=True)


def rows(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def classes(count, high=4, seed=0, shape=()):
    return torch.randint(0, high, (count, *shape), generator=torch.Generator().manual_seed(seed))


def batch(module, seed, count=9):
    if isinstance(module, Transformer):
        return classes(count, 32, seed, (8,)), classes(count, 32, seed + 50, (8,))
    shape = (1, 8, 8) if isinstance(module, Cnn) else (6,)
    return rows(count, *shape, seed=seed), classes(count, seed=seed)


def loss_fn(output, target):
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


def pair(network, module, private, audit_rates=None, **options):
    """The module with private layers on a network, and its twin in this process."""
    x = batch(module, 0)[0]
    arguments = {"micro_batches": 4, "example_inputs": (x,), "seed": 3, **options}
    plain = tensorlink.reference(copy.deepcopy(module), **arguments)
    model = tensorlink.DistributedModel(
        module, network=network, stages=2, private=private, audit_rates=audit_rates, progress=False, **arguments
    )
    return model, plain


def assert_same_state(model, plain):
    ours, theirs = model.state_dict(), plain.module.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


CASES = [
    *[(make, private) for make in (mlp, Cnn, Transformer) for private in ENDS],
    (frozen, "both"),
    (Cnn, ["stem", "norm", "head"]),
    (Transformer, ["token", "position", "drop", "norm", "head"]),
    (Transformer, ["token", "position", "blocks.0"]),
    (tied, "both"),
    (tied, ["token"]),
]


@pytest.mark.parametrize(("make", "private"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_training_is_bit_for_bit_that_of_one_plain_process(inside, make, private):
    torch.manual_seed(0)
    module = make()
    model, plain = pair(inside, module, private)
    with model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
        plain_optimizer = torch.optim.AdamW(plain.module.parameters(), lr=1e-2)
        schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (optimizer, plain_optimizer)]
        for step in range(3):
            losses = []
            for each, opt in ((model, optimizer), (plain, plain_optimizer)):
                opt.zero_grad()
                for part in range(2):  # gradients accumulate over two forwards
                    x, y = batch(module, 10 * step + part)
                    loss = loss_fn(each(x), y)
                    loss.backward()
                    losses.append(loss.item())
                opt.step()
            plain.end_step()
            [scheduler.step() for scheduler in schedulers]
            assert losses[:2] == losses[2:], step
            model.eval(), plain.eval()
            with torch.no_grad():
                assert torch.equal(model(x), plain(x)), step
            model.train(), plain.train()
        for step in range(3, 6):
            x, y = batch(module, 10 * step)
            ours = model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer)
            theirs = plain.train_step(x, y, loss_fn=loss_fn, optimizer=plain_optimizer)
            assert ours.item() == theirs.item(), step
        assert_same_state(model, plain)


@pytest.mark.parametrize("make", [Cnn, Transformer])
def test_under_autocast_private_layers_compute_as_a_plain_loop_does(inside, make):
    torch.manual_seed(0)
    module = make()
    model, plain = pair(inside, module, "both", autocast=torch.bfloat16)
    with model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)
        plain_optimizer = torch.optim.SGD(plain.module.parameters(), lr=0.1)
        for step in range(2):
            x, y = batch(module, step)
            ours = model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer)
            theirs = plain.train_step(x, y, loss_fn=loss_fn, optimizer=plain_optimizer)
            assert (ours.item(), ours.dtype) == (theirs.item(), theirs.dtype), step
            assert torch.equal(model(x), plain(x)), step
            optimizer.zero_grad()
        assert_same_state(model, plain)


@pytest.fixture
def fresh(inside):
    """Twins with both ends private and SGD each: (network, model, optimizer, plain, plain optimizer, x, y)."""
    torch.manual_seed(1)
    x = rows(9, 6).requires_grad_()
    model, plain = pair(inside, mlp(), "both", example_inputs=(x,))
    with model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
        plain_optimizer = torch.optim.SGD(plain.module.parameters(), lr=0.1, momentum=0.9)
        yield inside, model, optimizer, plain, plain_optimizer, x.detach(), classes(9)


def train(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    if isinstance(model, tensorlink.reference):
        model.end_step()
    return loss.item()


def test_a_retained_graph_goes_backwards_twice_and_inputs_get_their_gradients(fresh):
    _, model, optimizer, plain, plain_optimizer, x, y = fresh
    found = []
    for each, opt in ((model, optimizer), (plain, plain_optimizer)):
        given = x.clone().requires_grad_()
        loss = F.cross_entropy(each(given * 2), y)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(given.grad)
        opt.step()
    assert torch.equal(*found)
    assert_same_state(model, plain)


def test_what_backwards_need_is_freed_with_the_step_the_graph_and_without_gradients(fresh):
    _, model, optimizer, _, _, x, y = fresh
    ends = model._placement.private._head, model._placement.private._tail
    with torch.no_grad():
        model(x)
    assert [len(end.passes) for end in ends] == [0, 0]
    model(x)  # nobody keeps the output
    kept = model(x)
    assert [len(end.passes) for end in ends] == [1, 1]
    F.cross_entropy(kept, y).backward()
    optimizer.step()
    model.train_step(x, y, loss_fn=F.cross_entropy, optimizer=optimizer)
    assert [len(end.passes) for end in ends] == [0, 0]


def test_zero_grad_drops_what_was_added_here_too(fresh):
    _, model, optimizer, plain, plain_optimizer, x, y = fresh
    F.cross_entropy(model(x), y).backward()
    model.zero_grad()
    assert train(model, optimizer, x, y) == train(plain, plain_optimizer, x, y)
    assert_same_state(model, plain)


def test_clipping_counts_private_gradients(fresh):
    _, model, optimizer, plain, plain_optimizer, x, y = fresh
    F.cross_entropy(model(x) * 50, y).backward()
    F.cross_entropy(plain(x) * 50, y).backward()
    norm = model.clip_grad_norm_(0.5)
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(plain.module.parameters(), 0.5).item(), rel=1e-6)
    optimizer.step(), plain_optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.module.state_dict()[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("by_train_step", [False, True])
def test_a_gradient_that_is_not_finite_leaves_no_trace_here_or_there(inside, by_train_step):
    """Batch statistics of the dropped step are forgotten too."""
    torch.manual_seed(0)
    module = Cnn()
    model, plain = pair(inside, module, ["stem", "norm", "head"])
    with model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)
        plain_optimizer = torch.optim.SGD(plain.module.parameters(), lr=0.1)
        x, y = batch(module, 0)
        before = model.state_dict()

        def broken(output, target):
            return F.cross_entropy(output * float("inf"), target)

        def step():
            if by_train_step:
                model.train_step(x, y, loss_fn=broken, optimizer=optimizer)
            else:
                broken(model(x), y).backward()
                optimizer.step()

        with pytest.raises(NonFiniteError, match="no parameter changed"):
            step()
        after = model.state_dict()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert train(model, optimizer, x, y) == train(plain, plain_optimizer, x, y)


def test_a_private_gradient_alone_that_is_not_finite_is_named_and_drops_the_step(fresh):
    _, model, optimizer, _, _, x, y = fresh
    before = model.state_dict()
    F.cross_entropy(model(x), y).backward()
    model._placement.private._gradients.add({"5.bias": torch.full((4,), float("nan"))})
    with pytest.raises(NonFiniteError, match=r"gradient of 5\.bias \(a private layer\)"):
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_make_the_round_trip_and_the_wrapped_module_stays_as_it_is(fresh):
    _, model, optimizer, plain, plain_optimizer, x, y = fresh
    start = model.state_dict()
    train(model, optimizer, x, y)
    changed = {name: value + 1 for name, value in start.items()}
    assert tuple(model.load_state_dict(changed)) == ([], [])
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())
    model.load_state_dict({"0.bias": torch.zeros(12)}, strict=False)
    state = model.state_dict()
    assert torch.equal(state["0.bias"], torch.zeros(12))
    assert torch.equal(state["0.weight"], changed["0.weight"])
    state["0.weight"].zero_()  # a copy: nobody trains on it
    with pytest.raises(JobError, match=r"5\.bias is \[5\], the model has \[4\]"):
        model.load_state_dict({**changed, "0.bias": changed["0.bias"] * 9, "5.bias": torch.zeros(5)})
    assert torch.equal(model.state_dict()["0.bias"], torch.zeros(12))
    plain.module.load_state_dict(changed)
    model.load_state_dict(changed)
    again = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    assert train(model, again, x, y) == train(plain, plain_optimizer, x, y)
    assert_same_state(model, plain)


@pytest.mark.parametrize("private", [*ENDS, ["stem", "norm", "head"]])
def test_private_layers_of_a_module_without_weights_begin_with_those_of_the_files(inside, tmp_path, private):
    torch.manual_seed(0)
    real = Cnn()
    real.register_buffer("unused", torch.ones(2))
    with torch.device("meta"):
        meta = Cnn()
        meta.register_buffer("unused", torch.ones(2))
    save_file(real.state_dict(), tmp_path / "model.safetensors")
    x, y = batch(real, 0)
    plain = tensorlink.reference(real, micro_batches=4, example_inputs=(x,), seed=3)
    with tensorlink.DistributedModel(
        meta, network=inside, stages=2, micro_batches=4, example_inputs=(x,), seed=3, private=private,
        weights=tmp_path, progress=False,
    ) as model:  # fmt: skip
        assert_same_state(model, plain)
        assert model.report()["profile_measured"] is False
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
        plain_optimizer = adamw(plain.module.parameters())
        for _ in range(2):
            assert train(model, optimizer, x, y) == train(plain, plain_optimizer, x, y)
        assert_same_state(model, plain)
        model.save_checkpoint(tmp_path / "saved", optimizer=optimizer, progress=False)
        assert model.load_checkpoint(tmp_path / "saved", optimizer=optimizer, progress=False) == 2
        assert_same_state(model, plain)
        model.load_state_dict(model.state_dict())
        assert_same_state(model, plain)


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=False, **options)


def test_the_optimizer_s_state_holds_that_of_private_layers_and_makes_the_round_trip(fresh):
    _, model, _, plain, _, x, y = fresh
    optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    plain_optimizer = adamw(plain.module.parameters())
    for _ in range(2):
        assert train(model, optimizer, x, y) == train(plain, plain_optimizer, x, y)
    ours, theirs = optimizer.state_dict(), plain_optimizer.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][number][key], value) for key, value in state.items())
    again = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    again.load_state_dict(ours)
    fewer = {number: state for number, state in ours["state"].items() if number}
    with pytest.raises(OptimizerError, match=r"for '0\.weight'"):
        again.load_state_dict({**ours, "state": {**fewer, 0: {"step": torch.tensor(2.0)}}})
    assert train(model, again, x, y) == train(plain, plain_optimizer, x, y)
    assert_same_state(model, plain)


MOST = ["stem", "norm", "head"]


@pytest.mark.parametrize(
    ("make", "before", "after"),
    [
        *[(Cnn, before, after) for before, after in ((MOST, MOST), (MOST, ()), ((), MOST), ("first", "last"))],
        (Transformer, "both", ()),
        (Transformer, (), "both"),
        (tied, "both", "both"),
    ],
)
def test_a_checkpoint_is_resumed_bitwise_whatever_is_private_before_and_after(inside, tmp_path, make, before, after):
    def learn(model, optimizer, seed):
        x, y = batch(module, seed)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    torch.manual_seed(0)
    module, other = make(), make()
    losses, states = [], []
    for private, wrapped in ((before, module), (after, other)):
        model, _ = pair(inside, wrapped, private)
        with model:
            optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
            if private is before and wrapped is module:
                learn(model, optimizer, 0)
                with torch.no_grad():
                    model(batch(module, 7)[0])
                model(batch(module, 8)[0]).square().mean().backward()  # is not part of what is saved
                model.zero_grad()
                model.save_checkpoint(tmp_path, optimizer=optimizer, shard_bytes=300, progress=False)
            else:
                kept = model(batch(module, 9)[0])
                assert model.load_checkpoint(tmp_path, optimizer=optimizer, part_bytes=300, progress=False) == 1
                with pytest.raises(JobError, match="run the forward again"):
                    kept.sum().backward()
            losses.append([learn(model, optimizer, seed) for seed in (1, 2)])
            states.append((model.state_dict(), optimizer.state_dict()["state"]))
    assert losses[0] == losses[1]
    (one, moments), (two, others) = states
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert moments.keys() == others.keys()
    for number, state in moments.items():
        assert all(torch.equal(others[number][key], value) for key, value in state.items())


def test_private_parameters_are_stand_ins_that_say_where_they_are(fresh):
    _, model, *_ = fresh
    stages = {name: parameter.stage for name, parameter in model.named_parameters()}
    assert [name for name, stage in stages.items() if stage == PRIVATE] == ["0.weight", "0.bias", "5.weight", "5.bias"]
    assert model.report()["private_parameters"] == ["0.weight", "0.bias", "5.weight", "5.bias"]
    with pytest.raises(RemoteParameterError, match=r"lives on this machine, in a private layer.*state_dict"):
        _ = next(model.parameters()).grad


def test_groups_may_hold_private_parameters_alone(fresh):
    _, model, _, plain, _, x, y = fresh
    optimizer = tensorlink.DistributedOptimizer(
        model, torch.optim.AdamW, groups=[{"parameters": ["0.*"], "lr": 0.5}], lr=1e-2
    )
    parameters = dict(plain.module.named_parameters())
    plain_optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in parameters.items() if name.startswith("0.")], "lr": 0.5},
            {"params": [p for name, p in parameters.items() if not name.startswith("0.")]},
        ],
        lr=1e-2,
    )
    for _ in range(2):
        assert train(model, optimizer, x, y) == train(plain, plain_optimizer, x, y)
    assert_same_state(model, plain)


# -- what leaves the machine -------------------------------------------------------------------------------------------


def leaks(sent, tensors):
    """Which of the named tensors a worker could know: their bytes, or a digest of them, anywhere in what was sent."""
    found = set()
    for name, tensor in tensors.items():
        roots = [input_root({0: tensor}), root({"0": tensor})] + [digest(str(slot), tensor) for slot in range(4)]
        needles = [bytes(tensor_bytes(tensor.contiguous())), *roots]
        for message in sent:
            content = b"".join((repr(message.params).encode(), message.body, *_records(message)))
            texts = [repr(needle)[2:-1].encode() for needle in needles]
            if any(needle in content for needle in (*needles, *texts)):
                found.add(name)
    return found


def _records(message):
    if message.order is not None:
        yield message.order.encode()
    yield from (value for value in message.params.values() if isinstance(value, bytes))


@pytest.mark.parametrize(("private", "seen"), [("both", ""), ("first", "y"), ("last", "x"), ((), "xy")], ids=str)
def test_inputs_and_labels_leave_the_machine_only_where_no_private_layer_hides_them(inside, private, seen):
    torch.manual_seed(0)
    x, y = classes(9, 32, 5, (8,)), classes(9, 32, 6, (8,))
    pieces = {
        f"{name}.{m}": piece for name, tensor in (("x", x), ("y", y)) for m, piece in enumerate(tensor.tensor_split(3))
    }
    module = nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 32))
    model, _ = pair(inside, module, private, micro_batches=3, example_inputs=(x,))
    sent = inside.user.sent
    with model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)

        def weight(target):
            return float((target > 3).sum())

        model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer, loss_reduction=weight)
        assert leaks(sent, {**pieces, "x": x, "y": y}) == {name for name in pieces if name[0] in seen}
        told = [message.name for message in sent if message.name in ("set_loss", "target")]
        begin = next(message.params for message in sent if message.name == "begin")
        order = next(message.order for message in sent if message.order is not None)
        if "y" in seen:
            assert told == ["set_loss", "target", "target", "target"]
            assert (len(begin["weights"]), len(order.loss_weights)) == (3, 3)
        else:
            assert told == []
            assert (begin["weights"], order.loss_weights, order.loss) == ([], [], NO_DIGEST)
        assert (order.target_root == NO_DIGEST) == ("y" not in seen)
        del sent[:]  # the drop-in loop keeps labels here in any case
        loss_fn(model(x), y).backward()
        optimizer.step()
        assert leaks(sent, pieces) == {name for name in pieces if name[0] == "x" and "x" in seen}


def test_private_weights_never_leave_the_machine(fresh):
    network, model, optimizer, _, _, x, y = fresh
    for _ in range(2):
        train(model, optimizer, x, y)
        state = model.state_dict()
        model.load_state_dict(state)
    names = model.report()["private_parameters"]
    assert leaks(network.user.sent, {name: state[name] for name in names}) == set()
    assert leaks(network.user.sent, {"2.weight": state["2.weight"]}) == {"2.weight"}


# -- overlap -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", ENDS)
def test_a_training_step_streams_and_holds_no_more_than_there_are_stages(inside, private):
    """The workers stand still until as many micro-batches are under way as there are stages, private ones included."""
    torch.manual_seed(0)
    module = mlp()
    model, _ = pair(inside, module, private, micro_batches=12)
    with model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)
        x, y = batch(module, 0, count=12)
        model.train_step(x, y, loss_fn=F.cross_entropy, optimizer=optimizer)
        events, full = inside.user.watch(lambda events: count(events, "sent", "activation") == 2 + 2)
        inside.user.stall(full)
        model.train_step(x, y, loss_fn=F.cross_entropy, optimizer=optimizer)
    # what ends a micro-batch's way, as the user sees it
    end = ("sent", "activation_gradient") if private == "last" else ("came", "activation_gradient")
    under_way = [count(events[:at], "sent", "activation") - count(events[:at], *end) for at in range(len(events) + 1)]
    assert (max(under_way), under_way[-1]) == (4, 0)
    for kind in ("activation", "activation_gradient"):
        order = [event[2] for event in events if event[:2] == ("sent", kind)]
        assert order == (list(range(12)) if kind == "activation" or private != "first" else [])
    first_through = next(at for at, event in enumerate(events) if event[:2] == end)
    assert first_through < events.index(("sent", "activation", 4))


def count(events, what, kind):
    return sum(event[:2] == (what, kind) for event in events)


# -- what is refused ---------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """The mask is used behind every layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x) * mask
        return x


class Hidden(nn.Module):
    """Returns what the loss could be computed from before the last layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = self.one(x)
        return h, self.three(self.two(h))


class Branching(nn.Module):
    """Gives its input as it is in one of two branches, of which the other has a layer."""

    def __init__(self):
        super().__init__()
        self.one, self.rest = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))

    def forward(self, x):
        return self.rest(torch.cond(x.sum() > 0, self.one, lambda x: x + 0, (x,)))


@pytest.mark.parametrize(
    ("make", "private", "match"),
    [
        (mlp, "middle", "needed 'first', 'last', 'both', or a list"),
        (mlp, ["0", "7"], r"private names '7', which is no layer of the model; it has \['0', '2', '4', '5'\]"),
        (mlp, ["2"], "layer '2' is in the middle: '0' runs before it and '5' behind it"),
        (mlp, ["0", "4"], "layer '4' is in the middle: '2' runs before it"),
        (mlp, ["?"], "leaves no layer with parameters to workers"),
        (lambda: nn.Sequential(nn.Linear(6, 4)), "first", "leaves no layer with parameters to workers"),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), "both", "leaves no layer with parameters to workers"),
        (lambda: nn.Sequential(nn.Tanh(), nn.ReLU()), "first", "no layer with parameters that could stay"),
        (tied, "first", r"'token\.weight' is tied and used in the private first layers and in stage 1.*private='both'"),
        (Masked, "first", "no cut keeps the inputs private.*Leave that input out"),
        (Hidden, "last", "no cut keeps the labels private.*Return only what the loss needs"),
    ],
)
def test_what_cannot_be_private_is_refused_with_a_remedy(inside, make, private, match):
    module = make()
    inputs = (rows(4, 6), rows(4, 6)) if isinstance(module, Masked) else (batch(module, 0, count=4)[0],)
    with pytest.raises(PartitionError, match=match):
        tensorlink.DistributedModel(
            module, network=inside, stages=2, example_inputs=inputs, private=private, progress=False
        )


def test_a_layer_that_only_adds_hides_nothing_and_the_next_one_stays_too(inside):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(6))
            self.layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))

        def forward(self, x):
            return self.layers(x + self.shift)

    with tensorlink.DistributedModel(
        Shifted(), network=inside, stages=2, example_inputs=(rows(4, 6),), private="first", progress=False
    ) as model:
        assert model.report()["private_parameters"] == ["shift", "layers.0.weight", "layers.0.bias"]


def test_a_branch_may_let_its_input_show_so_the_next_layer_stays_too(inside):
    with tensorlink.DistributedModel(
        Branching(), network=inside, stages=2, example_inputs=(rows(4, 6),), private="first", progress=False
    ) as model:
        kept = set(model.report()["private_parameters"])
        assert kept == {"one.weight", "one.bias", "rest.0.weight", "rest.0.bias"}


def test_real_workers_train_between_private_layers_and_pass_their_audits(network, processes):
    torch.manual_seed(0)
    module = tied()
    x, y = batch(module, 0)
    model, plain = pair(network, module, "both", audit_rates=(1.0, 1.0))
    with model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
        plain_optimizer = torch.optim.AdamW(plain.module.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad(), plain_optimizer.zero_grad()
            losses = []
            for each, opt in ((model, optimizer), (plain, plain_optimizer)):
                loss = loss_fn(each(x), y)
                loss.backward()
                opt.step()
                losses.append(loss.item())
            plain.end_step()
            losses.append(model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer).item())
            losses.append(plain.train_step(x, y, loss_fn=loss_fn, optimizer=plain_optimizer).item())
            assert losses[::2] == losses[1::2]
            assert math.isfinite(losses[-1])
        assert_same_state(model, plain)
        assert processes.wait_until(lambda: sum(model.audits().values()) >= 8, 30) is not None, model.audits()
        assert model.audits()["failed"] == model.audits()["inconclusive"] == 0, [v.reason for v in model.verdicts()]
