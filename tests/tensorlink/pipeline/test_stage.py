"""Stages in one process against the plain loop over the same micro-batches, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smartnodes_core.errors import ProtocolError
from tensorlink.errors import TensorError
from tensorlink.pipeline.inbox import Delivery
from tensorlink.program.loss import trace_loss
from tensorlink.stage_optimizer import encode_options

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def begin(step=0, call=0, n=4, type="train_step", training=True, grad=True, weights=None, schedule="1f1b"):
    weights = [w.hex() for w in weights or [1 / n] * n]
    return {
        "step": step, "call": call, "num_micro_batches": n, "samples": [], "training": training, "grad": grad,
        "type": type, "weights": weights if type == "train_step" else [], "schedule": schedule,
    }  # fmt: skip


def groups(stage):
    return [{"parameters": list(stage.program.parameters), **encode_options(OPTIONS)}]


def prepare(rig, name, **options):
    modules = rig.MODELS[name]()
    x, y = rig.batch(name)
    programs, states = rig.stage_programs(modules, x[:2])
    pipe = rig.Pipe(programs, states, **options)
    with torch.no_grad():
        example = nn.Sequential(*modules).eval()(x[:2])
    nn.Sequential(*modules).train()
    pipe.stages[-1].set_loss(trace_loss(rig.loss_fn, example, y[:2]))
    for stage in pipe.stages:
        stage.set_optimizer("AdamW", groups(stage))
    return modules, pipe


def train_step(pipe, x, y, step, n=4):
    pipe.tell("begin", begin(step, n=n))
    for m, (xm, ym) in enumerate(zip(torch.tensor_split(x, n), torch.tensor_split(y, n), strict=True)):
        delivery = Delivery(step, 0, m, "activation", 0)
        pipe.stages[0].receive(delivery, 0, xm.clone())
        pipe.stages[-1].receive(delivery._replace(type="target"), 0, ym.clone())
    pipe.run()
    for stage in pipe.stages:
        assert stage.num_units == n
        stage.commit(step, 1.0, groups(stage), b"o" * 32)
    return [pipe.losses[(step, 0, m)] for m in range(n)]


def plain_step(rig, module, optimizer, x, y, n=4):
    optimizer.zero_grad()
    losses = []
    for xm, ym in zip(torch.tensor_split(x, n), torch.tensor_split(y, n), strict=True):
        loss = rig.loss_fn(module(xm), ym)
        (loss * (1 / n)).backward()
        losses.append(loss.item())
    optimizer.step()
    return losses


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_a_pipeline_trains_bitwise_like_the_plain_loop(rig, name):
    modules, pipe = prepare(rig, name)
    module = nn.Sequential(*modules)
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False, **OPTIONS)
    for step in range(4):
        x, y = rig.batch(name, seed=step)
        assert train_step(pipe, x, y, step) == plain_step(rig, module, optimizer, x, y)
        record = [stage.log.committed(step) for stage in pipe.stages]
        for part, stage, one in zip(modules, pipe.stages, record, strict=True):
            for key, parameter in part.named_parameters():
                assert torch.equal(one.gradient[key], parameter.grad), key
                assert torch.equal(stage.parameters[key], parameter), key
            for key, buffer in part.named_buffers():
                assert torch.equal(stage.buffers[key], buffer), key


def forward_call(pipe, x, call=0, step=0, n=4, **options):
    pipe.tell("begin", begin(step, call, n, type="forward", schedule="gpipe", **options))
    for m, xm in enumerate(torch.tensor_split(x, n)):
        pipe.stages[0].receive(Delivery(step, call, m, "activation", 0), 0, xm.clone())
    pipe.run()
    return [pipe.outputs[(Delivery(step, call, m, "output", 0), 0)] for m in range(n)]


def backward_call(rig, pipe, outputs, y, call=0, step=0, backward_pass=0, retain=False):
    n = len(outputs)
    params = {"step": step, "call": call, "backward_pass": backward_pass, "num_micro_batches": n, "retain": retain}
    pipe.tell("begin_backward", params)
    for m, (out, ym) in enumerate(zip(outputs, torch.tensor_split(y, n), strict=True)):
        leaf = out.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(rig.loss_fn(leaf, ym) / n, leaf)
        pipe.stages[-1].receive(Delivery(step, call, m, "activation_gradient", backward_pass), 0, gradient)
    pipe.run()


def held(pipe):
    return sum(len(call.passes) for stage in pipe.stages for call in stage._executor.calls.values())


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_the_drop_in_loop_with_several_forwards_before_one_backward_is_bitwise_the_plain_loop(rig, name):
    modules, pipe = prepare(rig, name)
    module = nn.Sequential(*modules)
    (x0, y0), (x1, y1) = rig.batch(name, 0), rig.batch(name, 1, rows=9)
    first, second = forward_call(pipe, x0, 0), forward_call(pipe, x1, 1)
    backward_call(rig, pipe, first, y0, 0)
    backward_call(rig, pipe, second, y1, 1)
    plain = [[module(xm) for xm in torch.tensor_split(x, 4)] for x in (x0, x1)]
    for outs, y in zip(plain, (y0, y1), strict=True):
        for out, ym in zip(outs, torch.tensor_split(y, 4), strict=True):
            (rig.loss_fn(out, ym) / 4).backward()
    assert all(torch.equal(a, b) for a, b in zip(first + second, plain[0] + plain[1], strict=True))
    for part, stage in zip(modules, pipe.stages, strict=True):
        found = stage.gradients.take()
        for key, parameter in part.named_parameters():
            assert torch.equal(found[key], parameter.grad), key


def test_two_backwards_through_one_retained_forward_add_up(rig):
    modules, pipe = prepare(rig, "gpt")
    module = nn.Sequential(*modules)
    x, y = rig.batch("gpt")
    outputs = forward_call(pipe, x)
    backward_call(rig, pipe, outputs, y, retain=True)
    backward_call(rig, pipe, outputs, y.flip(0), backward_pass=1)
    plain = [module(xm) for xm in torch.tensor_split(x, 4)]
    for targets in (y, y.flip(0)):
        for out, ym in zip(plain, torch.tensor_split(targets, 4), strict=True):
            (rig.loss_fn(out, ym) / 4).backward(retain_graph=True)
    found = pipe.stages[0].gradients.take()
    assert all(torch.equal(found[key], parameter.grad) for key, parameter in modules[0].named_parameters())
    assert [unit.backward_pass for unit in pipe.stages[0].log.open.units] == [0] * 4 + [1] * 4


def test_a_second_backward_through_a_freed_graph_says_what_to_do(rig):
    _, pipe = prepare(rig, "gpt")
    x, y = rig.batch("gpt")
    outputs = forward_call(pipe, x)
    backward_call(rig, pipe, outputs, y)
    with pytest.raises(TensorError, match="retain_graph=True"):
        backward_call(rig, pipe, outputs, y, backward_pass=1)


def test_evaluation_equals_eager_keeps_nothing_and_its_number_may_be_used_again(rig):
    modules, pipe = prepare(rig, "mlp")
    module = nn.Sequential(*modules).eval()
    x, _ = rig.batch("mlp")
    before = [dict(stage.buffers) for stage in pipe.stages]
    for _ in range(2):
        outputs = forward_call(pipe, x, training=False, grad=False)
        assert torch.equal(torch.cat(outputs), torch.cat([module(xm) for xm in torch.tensor_split(x, 4)]))
        assert not any(stage._executor.calls for stage in pipe.stages)
    for stage, kept in zip(pipe.stages, before, strict=True):
        assert not stage.log.open.forwards
        assert all(stage.buffers[name] is tensor for name, tensor in kept.items())


def test_a_dropped_graph_frees_its_activations(rig):
    _, pipe = prepare(rig, "gpt")
    forward_call(pipe, rig.batch("gpt")[0])
    assert held(pipe) == 12
    for stage in pipe.stages:
        stage.drop_call(0, 0)
    assert held(pipe) == 0


@pytest.mark.parametrize("num_stages", [3])
def test_1f1b_holds_no_more_forwards_than_its_schedule(rig, num_stages):
    _, pipe = prepare(rig, "gpt")
    most = [0] * num_stages
    for index, stage in enumerate(pipe.stages):
        original = stage.run_next

        def counted(index=index, stage=stage, original=original):
            worked = original()
            most[index] = max(most[index], sum(call.held for call in stage._executor.calls.values()))
            return worked

        stage.run_next = counted
    x, y = rig.batch("gpt")
    train_step(pipe, x, y, 0, n=6)
    assert most[0] <= 3
    assert most[1] <= 2
    assert most[2] <= 1


def test_an_aborted_step_leaves_no_trace(rig):
    modules, pipe = prepare(rig, "mlp")
    x, y = rig.batch("mlp")
    parameters = [{n: p.detach().clone() for n, p in stage.parameters.items()} for stage in pipe.stages]
    buffers = [dict(stage.buffers) for stage in pipe.stages]
    backward_call(rig, pipe, forward_call(pipe, x), y)
    for stage in pipe.stages:
        stage.abort(0)
    for stage, kept, kept_buffers in zip(pipe.stages, parameters, buffers, strict=True):
        assert all(torch.equal(stage.parameters[n], p) for n, p in kept.items())
        assert stage.buffers == kept_buffers
        assert stage.num_units == len(stage.gradients) == held(pipe) == 0
    assert train_step(pipe, x, y, 0) == plain_step(
        rig, nn.Sequential(*modules), torch.optim.AdamW(nn.Sequential(*modules).parameters(), **OPTIONS), x, y
    )


@pytest.mark.parametrize(
    ("coefficient", "clip_norm"), [(0.5, ""), (1.0, (1e-9).hex()), (2.0, (1e9).hex()), (-0.1, (1.0).hex()),
                                   (float("nan"), (1.0).hex())]
)  # fmt: skip
def test_a_clip_coefficient_that_no_order_gives_is_refused_before_anything_changes(rig, coefficient, clip_norm):
    _, pipe = prepare(rig, "mlp")
    x, y = rig.batch("mlp")
    backward_call(rig, pipe, forward_call(pipe, x), y)
    for stage in pipe.stages:
        before = {name: parameter.detach().clone() for name, parameter in stage.parameters.items()}
        with pytest.raises(ProtocolError, match="not what the order and the gradient give"):
            stage.commit(0, coefficient, groups(stage), b"", clip_norm)
        assert all(torch.equal(stage.parameters[name], value) for name, value in before.items())
        stage.commit(0, 0.0, groups(stage), b"", (1.0).hex())


def test_weights_that_are_replaced_drop_what_was_computed_with_the_old_ones(rig):
    _, pipe = prepare(rig, "mlp")
    x, y = rig.batch("mlp")
    backward_call(rig, pipe, forward_call(pipe, x), y)
    for stage in pipe.stages:
        stage.set_state({name: value.detach() + 1 for name, value in stage.parameters.items()}, {})
        assert stage.num_units == len(stage.gradients) == len(stage.log.open.forwards) == 0


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_optimizer_state_that_is_replaced_leaves_the_last_step_s_audit_what_it_was(rig, name):
    _, pipe = prepare(rig, "mlp")
    for stage in pipe.stages:
        stage.set_optimizer(name, groups(stage))
    x, y = rig.batch("mlp")
    train_step(pipe, x, y, 0)
    stage = pipe.stages[0]
    before = {key: value.clone() for key, value in stage.optimizer.state_tensors().items()}
    stage.set_optimizer_state({key: value + 1 for key, value in before.items()})
    _, kept = stage.state_after(stage.log.committed(0))
    assert all(torch.equal(kept[key], value) for key, value in before.items())
    assert all(torch.equal(value, before[key] + 1) for key, value in stage.optimizer.state_tensors().items())
    stage.optimizer = None
    with pytest.raises(ProtocolError, match="no optimizer is set"):
        stage.set_optimizer_state({})


def test_dropout_masks_depend_on_step_and_micro_batch_alone(rig):
    _, pipe = prepare(rig, "dropout")
    x = torch.ones(8, 8)
    outputs = forward_call(pipe, x)
    assert not torch.equal(outputs[0], outputs[1])
    for stage in pipe.stages:
        stage.zero_grad(0)
    pipe.outputs.clear()
    assert all(torch.equal(a, b) for a, b in zip(outputs, forward_call(pipe, x), strict=True))


def test_a_duplicate_counts_once_and_one_that_differs_is_a_fault(rig):
    _, pipe = prepare(rig, "gpt")
    x, y = rig.batch("gpt")
    first, delivery = pipe.stages[0], Delivery(0, 0, 0, "activation", 0)
    assert first.receive(delivery, 0, x[:3])
    assert not first.receive(delivery, 0, x[:3].clone())
    with pytest.raises(TensorError, match="came twice with different content"):
        first.receive(delivery, 0, x[3:6])
    outputs = forward_call(pipe, x)
    assert not first.receive(delivery, 0, x[:3].clone())
    with pytest.raises(TensorError, match="came again with different content"):
        first.receive(delivery, 0, x[3:6])
    backward_call(rig, pipe, outputs, y)
    num = first.num_units
    gradient = Delivery(0, 0, 0, "activation_gradient", 0)
    last = pipe.stages[-1]
    assert not last.receive(gradient, 0, last.log.open.units[0].gy["0"].clone())
    pipe.run()
    assert first.num_units == num == 4


def test_late_tensors_of_a_decided_step_are_ignored(rig):
    _, pipe = prepare(rig, "gpt")
    x, y = rig.batch("gpt")
    train_step(pipe, x, y, 0)
    assert not pipe.stages[0].receive(Delivery(0, 0, 0, "activation", 0), 0, x[:3])


@pytest.mark.parametrize(
    ("type", "slot", "tensor"),
    [
        ("activation", 0, torch.zeros(3, 6)),
        ("activation", 0, torch.zeros(3, 6, 1, dtype=torch.int64)),
        ("activation", 1, torch.zeros(3, 6, dtype=torch.int64)),
        ("activation", -1, torch.zeros(3, 6, dtype=torch.int64)),
        ("target", 0, torch.zeros(3, 6, dtype=torch.int64)),
        ("activation_gradient", 0, torch.zeros(3, 6, 99)),
        ("output", 0, torch.zeros(3)),
    ],
)
def test_what_does_not_fit_the_cut_is_refused(rig, type, slot, tensor):
    _, pipe = prepare(rig, "gpt")
    with pytest.raises(TensorError):
        pipe.stages[0].receive(Delivery(0, 0, 0, type, 0), slot, tensor)


def test_what_comes_out_of_turn_is_a_fault(rig):
    _, pipe = prepare(rig, "gpt")
    first = pipe.stages[0]
    wrong = [
        ("num_micro_batches", 0),
        ("num_micro_batches", 1 << 20),
        ("type", "other"),
        ("schedule", "no"),
        ("step", -1),
    ]
    for name, value in wrong:
        with pytest.raises(ProtocolError):
            first.begin({**begin(), name: value})
    with pytest.raises(ProtocolError, match="no such graph"):
        first.begin_backward({"step": 0, "call": 3, "backward_pass": 0})
    first.begin(begin(type="forward"))
    with pytest.raises(ProtocolError, match="announced again"):
        first.begin(begin(type="forward"))


def test_the_window_bounds_what_is_kept(rig):
    _, pipe = prepare(rig, "gpt", window_steps=2)
    for step in range(5):
        x, y = rig.batch("gpt", seed=step)
        train_step(pipe, x, y, step)
    assert all(stage.log.steps() == [3, 4] for stage in pipe.stages)


def test_stages_that_were_asked_to_say_at_their_end_what_a_prepare_would(rig):
    _, pipe = prepare(rig, "mlp")
    x, y = rig.batch("mlp")
    for step, asked in enumerate((True, False)):
        pipe.prepared.clear()
        pipe.tell("begin", {**begin(step), "prepare": asked})
        for m, (xm, ym) in enumerate(zip(torch.tensor_split(x, 4), torch.tensor_split(y, 4), strict=True)):
            delivery = Delivery(step, 0, m, "activation", 0)
            pipe.stages[0].receive(delivery, 0, xm.clone())
            assert pipe.prepared == {}
            pipe.stages[-1].receive(delivery._replace(type="target"), 0, ym.clone())
        pipe.run()
        told = {stage.place.stage: stage.squared_norm(step) for stage in pipe.stages}
        assert pipe.prepared == (told if asked else {})
        for stage in pipe.stages:
            stage.commit(step, 1.0, groups(stage), b"o" * 32)
