"""A parameter held by several stages: the same gradient in each of them, bit for bit that of the reference with this
cut."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tensorlink
from smartnodes_core.errors import ProtocolError
from tensorlink.errors import TensorError
from tensorlink.pipeline.batching import loss_weights
from tensorlink.pipeline.inbox import Delivery
from tensorlink.pipeline.tied import NOTHING, SumId
from tensorlink.program.loss import trace_loss
from tensorlink.program.trace import trace
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile
from tensorlink.stage_optimizer import encode_options

N = 3
SEED = 7
VOCABULARY = 40


class Block(nn.Module):
    """(B, T, C) to (B, T, C): causal attention of one head, residual."""

    def __init__(self, width, p):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.drop(self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class TiedGpt(nn.Module):
    """As GPT-2: the head's weight is the embedding's. `between` uses it in the middle of the model too."""

    def __init__(self, layers=4, width=16, p=0.0, between=False):
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(8, width)
        self.layers = nn.ModuleList(Block(width, p) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight
        self.between = between

    def forward(self, x):
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        for index, layer in enumerate(self.layers):
            h = layer(h)
            if self.between and index == len(self.layers) // 2:
                h = h + F.softmax(F.linear(h, self.token.weight), -1) @ self.token.weight
        return self.head(self.norm(h))


def loss_fn(logits, y):
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), y.reshape(-1))


def batch(step, rows=6):
    tokens = torch.randint(0, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@functools.cache
def cut(num_stages, p=0.0, between=False):
    """A model, and the programs of its stages with what they start from."""
    torch.manual_seed(3)
    module = TiedGpt(p=p, between=between)
    x, _ = batch(0)
    traced = trace(module, (x,))
    programs = partition(traced, profile(traced, (x,), measured=False), num_stages)
    states = [{name: tensor.clone() for name, tensor in traced.state(program).items()} for program in programs]
    return module, programs, states


class Rig:
    """The stages in this process and the reference with the same cut, driven alike."""

    def __init__(self, rig, num_stages, optimizer="AdamW", options=None, **model):
        original, self.programs, states = cut(num_stages, **model)
        module = copy.deepcopy(original)
        x, y = batch(0)
        self.options = options or {"lr": 1e-2}
        self.pipe = rig.Pipe(self.programs, states, seed=SEED)
        self.stages = self.pipe.stages
        self.plain = tensorlink.reference(module, micro_batches=N, example_inputs=(x,), seed=SEED, stages=self.programs)
        self.module, self.parameters = module, dict(module.named_parameters())
        self.plain_optimizer = getattr(torch.optim, optimizer)(module.parameters(), foreach=False, **self.options)
        self.stages[-1].set_loss(trace_loss(loss_fn, torch.zeros(2, 8, VOCABULARY), y[:2]))
        for stage in self.stages:
            stage.set_optimizer(optimizer, self.groups(stage))

    def groups(self, stage):
        return [{"parameters": list(stage.program.parameters), **encode_options(self.options)}]

    def begin(self, step, call, **changes):
        weights = [w.hex() for w in loss_weights("mean", [2] * N, [None] * N)]
        self.pipe.tell("begin", {
            "step": step, "call": call, "num_micro_batches": N, "samples": [], "training": True, "grad": True,
            "type": "train_step", "weights": weights, "schedule": "1f1b", **changes,
        })  # fmt: skip

    def train(self, step, call=0):
        """Forwards and backwards of one batch with the loss in the last stage."""
        self.begin(step, call)
        x, y = batch(step)
        for m, (xm, ym) in enumerate(zip(x.tensor_split(N), y.tensor_split(N), strict=True)):
            self.stages[0].receive(Delivery(step, call, m, "activation", 0), 0, xm.clone())
            self.stages[-1].receive(Delivery(step, call, m, "target", 0), 0, ym.clone())
        self.pipe.run()

    def accumulate(self, step, call, seed):
        """One forward and backward of the drop-in loop, here and in the reference."""
        self.begin(step, call, type="forward", weights=[], schedule="gpipe")
        x, y = batch(seed)
        for m, xm in enumerate(x.tensor_split(N)):
            self.stages[0].receive(Delivery(step, call, m, "activation", 0), 0, xm.clone())
        self.pipe.run()
        outputs = [self.pipe.outputs[(Delivery(step, call, m, "output", 0), 0)] for m in range(N)]
        whole = torch.cat(outputs).requires_grad_()
        loss_fn(whole, y).backward()
        self.pipe.tell("begin_backward", {"step": step, "call": call, "backward_pass": 0})
        for m, gradient in enumerate(whole.grad.tensor_split(N)):
            self.stages[-1].receive(Delivery(step, call, m, "activation_gradient", 0), 0, gradient.clone())
        self.pipe.run()
        loss_fn(self.plain(x), y).backward()

    def prepare(self, step):
        """What all stages answer: squared norms, and gradients that are not finite."""
        for stage in self.stages:
            stage.share(step)
        self.pipe.run()
        assert [stage.share(step) for stage in self.stages] == [[]] * len(self.stages)
        return [stage.squared_norm(step) for stage in self.stages]

    def commit(self, step, coefficient=1.0, clip_norm=""):
        return [stage.commit(step, coefficient, self.groups(stage), b"o" * 32, clip_norm) for stage in self.stages]

    def assert_same(self):
        for stage in self.stages:
            for name, parameter in stage.parameters.items():
                assert torch.equal(parameter, self.parameters[name]), (stage.place.stage, name)


@pytest.fixture
def make(rig):
    return functools.partial(Rig, rig)


SGD, ADAMW = ("SGD", {"lr": 0.1, "momentum": 0.9}), ("AdamW", {"lr": 1e-2})


@pytest.mark.parametrize(
    ("num_stages", "model", "optimizer", "options"),
    [
        (2, {}, *SGD),
        (2, {}, *ADAMW),
        (3, {}, *ADAMW),
        (5, {}, *SGD),
        (3, {"between": True}, *ADAMW),
        (5, {"between": True}, *ADAMW),
        (3, {"p": 0.2}, *SGD),
    ],
)
def test_tied_weights_train_bitwise_like_the_reference_with_the_same_cut(make, num_stages, model, optimizer, options):
    one = make(num_stages, optimizer, options, **model)
    holders = one.programs[0].parameters["token.weight"].holders
    assert len(holders) == (3 if model.get("between") and num_stages > 2 else 2)
    for step in range(4):
        one.train(step)
        one.prepare(step)
        records = one.commit(step)
        expected = one.plain.train_step(*batch(step), loss_fn=loss_fn, optimizer=one.plain_optimizer)
        assert sum(one.pipe.losses[(step, 0, m)] / N for m in range(N)) == pytest.approx(expected.item(), rel=1e-6)
        for record in records:
            for name, gradient in record.gradient.items():
                assert torch.equal(gradient, one.parameters[name].grad), name
        one.assert_same()


def test_the_gradient_is_that_of_eager_but_for_rounding(make):
    one = make(5, between=True)
    one.train(0)
    one.prepare(0)
    records = one.commit(0)
    module, _, _ = cut(5, between=True)
    twin = copy.deepcopy(module)
    x, y = batch(0)
    loss_fn(twin(x), y).backward()
    eager = dict(twin.named_parameters())
    for record in records:
        for name, gradient in record.gradient.items():
            error = torch.linalg.vector_norm(gradient - eager[name].grad) / torch.linalg.vector_norm(eager[name].grad)
            assert error <= 1e-6, name


def test_gradients_of_several_calls_add_up_by_stage_and_a_norm_in_between_changes_nothing(make):
    one = make(3)
    for step in range(2):
        one.plain_optimizer.zero_grad()
        for call in range(3):
            one.accumulate(step, call, seed=10 * step + call)
            one.prepare(step)
        one.commit(step)
        one.plain_optimizer.step()
        one.plain.end_step()
        one.assert_same()


def test_a_tied_parameter_counts_once_in_the_norm_and_is_clipped_by_it(make):
    one = make(3, "SGD", {"lr": 0.1})
    one.accumulate(0, 0, seed=0)
    norm = sum(squared for squared, _ in one.prepare(0)) ** 0.5
    gradients = [parameter.grad for parameter in one.module.parameters()]
    assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-6)
    one.commit(0, 0.1 / norm, (0.1).hex())
    for gradient in gradients:
        gradient.mul_(0.1 / norm)
    one.plain_optimizer.step()
    one.assert_same()


def test_dropped_gradients_are_dropped_in_all_stages_even_those_that_were_exchanged(make):
    one = make(2)
    one.accumulate(0, 0, seed=5)
    one.prepare(0)
    for stage in one.stages:
        stage.zero_grad(0)
    one.plain_optimizer.zero_grad()
    one.accumulate(0, 1, seed=6)
    one.prepare(0)
    one.commit(0)
    one.plain_optimizer.step()
    one.assert_same()


def test_a_sum_that_is_not_finite_is_told_by_the_first_holder_and_the_step_leaves_no_trace(make):
    one = make(2)
    one.train(0)
    one.stages[-1].gradients.add({"token.weight": torch.full((VOCABULARY, 16), float("nan"))})
    assert [bad for _, bad in one.prepare(0)] == ["token.weight", ""]
    for stage in one.stages:
        stage.abort(0)
    one.assert_same()
    one.train(0, call=1)
    one.prepare(0)
    one.commit(0)
    one.plain.train_step(*batch(0), loss_fn=loss_fn, optimizer=one.plain_optimizer)
    one.assert_same()


def test_a_step_is_not_committed_before_all_holders_have_been_heard(make):
    one = make(2)
    one.train(0)
    before = {name: parameter.clone() for name, parameter in one.stages[0].parameters.items()}
    assert one.stages[0].share(0) == [1]
    for use in (lambda: one.stages[0].squared_norm(0), lambda: one.stages[0].commit(0, 1.0, [], b"")):
        with pytest.raises(ProtocolError, match="was not prepared"):
            use()
    assert all(torch.equal(before[name], parameter) for name, parameter in one.stages[0].parameters.items())
    one.prepare(0)
    one.commit(0)


ID = SumId(0, 0, N)
SUM = torch.ones(VOCABULARY, 16)


@pytest.mark.parametrize(
    ("stage", "slot", "tensor", "says"),
    [
        (1, 0, SUM, "stage 1 sent the sum of tied parameter 0; stage 0 shares 0 parameters with it"),
        (0, 0, SUM, "stage 0 shares 0"),
        (9, 0, SUM, "stage 0 shares 0"),
        (2, 1, SUM, "shares 1 parameters"),
        (2, -1, SUM, "shares 1 parameters"),
        (2, 0, SUM[1:], "found float32 [39, 16], needed float32 [40, 16]"),
        (2, 0, SUM.double(), "found float64"),
        (2, 0, SUM.expand(1, -1, -1), "[1, 40, 16]"),
    ],
)
def test_sums_that_were_not_to_come_are_refused(make, stage, slot, tensor, says):
    first = make(3).stages[0]
    with pytest.raises(TensorError) as raised:
        first.receive_sum(ID, stage, slot, tensor.contiguous())
    assert says in str(raised.value)
    assert first.receive_sum(ID, 2, 0, torch.empty(NOTHING))


def test_a_sum_counts_once_and_one_that_differs_is_a_fault(make):
    one = make(2)
    one.train(0)
    one.prepare(0)
    first = one.stages[0]
    (sum_,) = first.tied._arrived[1][1].values()
    assert not first.receive_sum(ID, 1, 0, sum_.clone())
    with pytest.raises(TensorError, match="came twice from stage 1 with different content"):
        first.receive_sum(ID, 1, 0, sum_ + 1)
    first.receive_sum(ID._replace(call=9), 1, 0, sum_ + 1)  # a holder that starts again undoes nothing
    assert first.share(0) == []
    one.commit(0)
    assert not first.receive_sum(ID, 1, 0, sum_ + 1)  # late: the step is over
    one.plain.train_step(*batch(0), loss_fn=loss_fn, optimizer=one.plain_optimizer)
    one.assert_same()


class SometimesTied(nn.Module):
    """The last layer uses the first one's weight in evaluation only: it gets no gradient from there."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.linear(x, self.layers[0].weight.detach() if self.training else self.layers[0].weight)


def test_a_holder_without_a_gradient_has_nothing_to_add(rig):
    torch.manual_seed(0)
    module, x = SometimesTied(), torch.randn(6, 4)
    traced = trace(module, (x,))
    programs = partition(traced, profile(traced, (x,), measured=False), 2)
    assert programs[1].parameters["layers.0.weight"].holders == (0, 1)
    states = [{name: tensor.clone() for name, tensor in traced.state(program).items()} for program in programs]
    pipe = rig.Pipe(programs, states)
    pipe.tell("begin", {
        "step": 0, "call": 0, "num_micro_batches": 1, "samples": [], "training": True, "grad": True,
        "type": "forward", "weights": [], "schedule": "gpipe",
    })  # fmt: skip
    pipe.stages[0].receive(Delivery(0, 0, 0, "activation", 0), 0, x)
    pipe.run()
    pipe.tell("begin_backward", {"step": 0, "call": 0, "backward_pass": 0})
    pipe.stages[1].receive(Delivery(0, 0, 0, "activation_gradient", 0), 0, torch.ones(6, 4))
    pipe.run()
    for stage in pipe.stages:
        stage.share(0)
    pipe.run()
    assert [stage.share(0) for stage in pipe.stages] == [[], []]
    module(x).sum().backward()
    for stage in pipe.stages:
        groups = [{"parameters": ["layers.0.weight"], **encode_options({"lr": 0.1})}]
        stage.set_optimizer("SGD", groups)
        record = stage.commit(0, 1.0, groups, b"")
        assert torch.equal(record.gradient["layers.0.weight"], module.layers[0].weight.grad)
    assert record.sent_sums == {0: {}}
