"""A whole training step in one call, with the loss computed behind the last layer, under the plan's schedule.

Targets go straight from the user to the last stage; what comes back is each micro-batch's loss. Where the last layers
are private, targets and loss stay here, and workers see a forward and a backward. Neighbours: `calls.py` sends and
takes, `steps.py` closes the step, `program/loss.py` turns the loss function into data.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from smartnodes_core.records import NO_DIGEST
from tensorlink.calls import Calls
from tensorlink.lanes import Lane, run_lanes
from tensorlink.pipeline.batching import (
    LossReduction,
    bind_batch,
    check_finite,
    flat_inputs,
    loss_weights,
    split_targets,
    target_tensors,
)
from tensorlink.pipeline.driver import Call
from tensorlink.pipeline.executor import Timeline
from tensorlink.pipeline.schedule import Kind, Timetable
from tensorlink.placement import Placement
from tensorlink.private import LOSS
from tensorlink.program.inputs import unflatten_outputs
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.loss import constants_of, trace_loss
from tensorlink.program.values import DTYPES
from tensorlink.steps import Steps

if TYPE_CHECKING:
    from tensorlink.optimizer import DistributedOptimizer
    from tensorlink.program.graph import LossProgram

LossFunction = Callable[..., torch.Tensor]
#: Traced losses that are kept: one per function and kind of target.
MAX_LOSSES = 16


@dataclass(frozen=True)
class Batch:
    """A batch in micro-batches: inputs and targets by slot, number of samples, and what each one's loss counts."""

    inputs: list[list[torch.Tensor]]
    targets: list[list[torch.Tensor]]
    samples: list[int]
    weights: list[float]


class TrainStep:
    """Runs training steps of one job. `by_keyword`: the example inputs were a map, and so are those of a step."""

    def __init__(self, placement: Placement, calls: Calls, steps: Steps, by_keyword: bool):
        self._placement, self._calls, self._steps = placement, calls, steps
        self._driver, self._private = placement.driver, placement.private
        self._by_keyword = by_keyword
        self._losses: OrderedDict[Any, LossProgram] = OrderedDict()
        self._sent: bytes | None = None  # the digest of the loss that the last stage computes now
        self._timelines: dict[int, Timeline] = {}

    def run(
        self,
        batch: Sequence[Any],
        loss_fn: LossFunction,
        optimizer: DistributedOptimizer,
        loss_reduction: LossReduction,
        clip_norm: float | None,
        training: bool,
    ) -> torch.Tensor:
        """See `DistributedModel.train_step`."""
        began = time.monotonic()
        self._steps.check(optimizer)
        args, kwargs, target = bind_batch(batch, self._by_keyword)
        flat = flat_inputs(self._calls.traced, args, kwargs)
        check_finite(flat, [f"input {name!r}" for name in self._calls.traced.input_names])
        pieces, samples = self._calls.split(flat)
        targets = split_targets(target, samples)
        whole = target_tensors(target)
        check_finite(whole, [f"target {index}" for index in range(len(whole))])
        weights = loss_weights(loss_reduction, samples, targets)
        loss = self._traced(loss_fn, targets[0], samples[0])
        self._steps.drop_gradients()
        whole_batch = Batch(pieces, [target_tensors(piece) for piece in targets], samples, weights)
        send = self._send_with_loss_here if self._private.has_tail else self._send_with_loss_there
        call = send(whole_batch, loss, training)
        # the order goes to workers: what they do not compute is none of their business
        told = (NO_DIGEST, []) if self._private.has_tail else (loss.digest, weights)
        order = self._steps.order(optimizer, *told, clip_norm)  # signed while the stages compute
        self._wait(call)
        value = sum(weight * call.losses[i] for i, weight in enumerate(weights))
        self._steps.decide(self._steps.prepare(self._calls.num_units, call.prepared), order)
        self._driver.tally.step(time.monotonic() - began)
        return torch.tensor(value, dtype=DTYPES[loss.outputs.slots[0].dtype])

    def _wait(self, call: Call) -> None:
        """Until every stage is through, and every micro-batch's loss is here."""
        type_, stages = "backward" if self._private.has_tail else "train_step", self._driver.num_stages
        self._driver.wait_for(
            lambda: call.is_done(type_, 0, stages) and len(call.losses) == call.num_micro_batches, "a training step"
        )
        if type_ == "train_step":
            self._timelines = call.timelines

    def _send_with_loss_there(self, batch: Batch, loss: LossProgram, training: bool) -> Call:
        """Inputs and targets are on their way, and the last stage computes the losses."""
        calls, last = self._calls, self._driver.num_stages - 1
        if loss.digest != self._sent:
            self._driver.call(last, "set_loss", {}, [loss.to_json()])
            self._sent = loss.digest
        schedule = self._placement.table.schedule
        options = {
            "type": "train_step",
            "weights": [weight.hex() for weight in batch.weights],
            "schedule": schedule.name,
            "num_workers": schedule.num_workers,
            "prepare": True,
        }
        call = calls.open(batch.samples, {**options, "training": training, "grad": True})
        call.num_backwards, call.freed, calls.dirty = 1, True, True

        def send(micro_batch: int) -> None:
            calls.crossing.send_inputs(call, micro_batch, batch.inputs[micro_batch])
            calls.crossing.send_targets(call, micro_batch, batch.targets[micro_batch])

        self._run(call, send, [])
        return call

    def timetable(self) -> Timetable:
        """See `DistributedModel.timetable`."""
        records: list[tuple[int, Kind, int, float, float]] = []
        for stage, timeline in sorted(self._timelines.items()):
            split = {micro_batch for kind, micro_batch, _, _ in timeline if kind == "W"}
            for kind, micro_batch, began_ns, ended_ns in timeline:
                known: Kind = "W" if kind == "W" else "F" if kind == "F" else "I" if micro_batch in split else "B"
                records.append((stage, known, micro_batch, began_ns / 1e9, ended_ns / 1e9))
        return Timetable.recorded(records, self._placement.table.schedule.placement)

    def _send_with_loss_here(self, batch: Batch, loss: LossProgram, training: bool) -> Call:
        """Inputs and gradients are on their way: each loss is computed behind the private layers as soon as the last
        stage's output is in, and its gradient is sent at once.
        """
        calls = self._calls
        interpreter = Interpreter(loss.graph, {}, constants_of(loss))
        options = {"type": "forward", "weights": [], "schedule": "1f1b"}
        call = calls.open(batch.samples, {**options, "training": training, "grad": True})
        calls.begin_backward(call, retain=False, prepare=True)

        def turn(micro_batch: int) -> None:
            arrived, targets = calls.crossing.take_arrived(call, micro_batch), batch.targets[micro_batch]
            value = self._private.forward_loss(call, micro_batch, arrived, interpreter, targets)
            call.losses[micro_batch] = float(value)
            weight = torch.tensor(batch.weights[micro_batch], dtype=value.dtype)
            calls.crossing.send_gradients(call, micro_batch, 0, {LOSS: weight}, retain=False)

        def send(micro_batch: int) -> None:
            calls.crossing.send_inputs(call, micro_batch, batch.inputs[micro_batch])

        self._run(call, send, [Lane(lambda m: calls.crossing.has_outputs(call, m), turn)])
        return call

    def _run(self, call: Call, send: Callable[[int], None], turning: list[Lane]) -> None:
        """Send micro-batches, turn them round where the loss is here, take them back: what is furthest goes first.

        With private layers, no more are under way than there are stages: the memory of 1F1B.
        """
        crossing = self._calls.crossing
        most = self._driver.num_stages + 2 if self._private else call.num_micro_batches
        lanes: list[Lane] = []

        def may_take(micro_batch: int) -> bool:
            return micro_batch < lanes[1].next and crossing.has_input_gradients(call, micro_batch, 0)

        def take(micro_batch: int) -> None:
            crossing.take_input_gradients(call, micro_batch, 0, retain=False)

        def may_send(micro_batch: int) -> bool:
            return micro_batch - min(lane.next for lane in lanes[:-1]) < most

        lanes += [Lane(may_take, take), *turning, Lane(may_send, send)]
        run_lanes(self._driver, call.num_micro_batches, lanes, "a training step")

    def _traced(self, loss_fn: LossFunction, target: Any, num_samples: int) -> LossProgram:
        """The loss program of `loss_fn`, traced once per kind of target."""
        key = (_identity(loss_fn), *_kind(target))
        program = self._losses.get(key)
        if program is None:
            program = self._losses[key] = trace_loss(
                loss_fn,
                self._example_output(num_samples),
                target,
                num_samples=num_samples,
                autocast=self._calls.traced.autocast,
            )
            while len(self._losses) > MAX_LOSSES:
                self._losses.popitem(last=False)
        self._losses.move_to_end(key)
        return program

    def _example_output(self, num_samples: int) -> Any:
        """Something of the shape of the model's output for a micro-batch, to trace a loss with."""
        traced = self._calls.traced
        return unflatten_outputs(traced, traced.example_outputs(num_samples))


def _identity(loss_fn: LossFunction) -> Any:
    """What tells one loss from another. A function without a closure is its code: a lambda written inside the loop is
    a new object every time round, and the same loss.
    """
    if isinstance(loss_fn, FunctionType) and not loss_fn.__closure__ and not loss_fn.__defaults__:
        return loss_fn.__code__
    return loss_fn


def _kind(target: Any) -> tuple[Any, ...]:
    """What a loss is traced for: the structure of a target, its dtypes and sizes but for the batch."""
    leaves, tree = pytree.tree_flatten(target)
    described = [
        (leaf.dtype, tuple(leaf.shape[1:])) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves
    ]
    return str(tree), *described
