"""A whole training step in one call, with the loss computed in the last stage: 1F1B.

Targets go straight from the user to the last stage; what comes back is each micro-batch's loss. Neighbours:
`steps.py` closes the step, `program/loss.py` turns the loss function into data.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from tensorlink.calls import Calls
from tensorlink.pipeline.batching import (
    LossReduction,
    bind_batch,
    check_finite,
    flat_inputs,
    loss_weights,
    split_targets,
    target_tensors,
)
from tensorlink.placement import Placement
from tensorlink.program.inputs import unflatten_outputs
from tensorlink.program.loss import trace_loss
from tensorlink.program.values import DTYPES
from tensorlink.steps import Steps

if TYPE_CHECKING:
    from tensorlink.optimizer import DistributedOptimizer
    from tensorlink.program.graph import LossProgram

LossFunction = Callable[..., torch.Tensor]
#: Traced losses that are kept: one per function and kind of target.
MAX_LOSSES = 16


class TrainStep:
    """Runs training steps of one job. `by_keyword`: the example inputs were a map, and so are those of a step."""

    def __init__(self, placement: Placement, calls: Calls, steps: Steps, by_keyword: bool):
        self._placement, self._calls, self._steps = placement, calls, steps
        self._driver = placement.driver
        self._by_keyword = by_keyword
        self._losses: OrderedDict[Any, LossProgram] = OrderedDict()
        self._sent: bytes | None = None  # the digest of the loss that the last stage computes now

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
        self._steps.check(optimizer)
        args, kwargs, target = bind_batch(batch, self._by_keyword)
        flat = flat_inputs(self._calls.traced, args, kwargs)
        check_finite(flat, [f"input {name!r}" for name in self._calls.traced.input_names])
        pieces, samples = self._calls.split(flat)
        targets = split_targets(target, samples)
        whole = target_tensors(target)
        check_finite(whole, [f"target {index}" for index in range(len(whole))])
        weights = loss_weights(loss_reduction, samples, targets)
        loss = self._send_loss(loss_fn, targets[0], samples[0])
        self._steps.drop_gradients()
        options = {
            "type": "train_step",
            "training": training,
            "grad": True,
            "weights": [weight.hex() for weight in weights],
            "schedule": self._placement.schedule,
            "num_workers": self._placement.num_workers,
        }
        call = self._calls.open(pieces, samples, options)
        call.num_backwards, call.freed = 1, True
        self._calls.dirty = True
        last = self._driver.num_stages - 1
        for micro_batch, piece in enumerate(targets):
            for slot, tensor in enumerate(target_tensors(piece)):
                self._driver.send(last, call, micro_batch, slot, tensor, type="target")
        self._driver.wait_for(
            lambda: call.is_done("train_step", 0, last + 1) and len(call.losses) == len(samples), "a training step"
        )
        self.timelines = call.timelines
        value = sum(weight * call.losses[i] for i, weight in enumerate(weights))
        prepared = self._steps.prepare(self._calls.num_units)
        self._steps.decide(optimizer, prepared, loss.digest, weights, clip_norm)
        return torch.tensor(value, dtype=DTYPES[loss.outputs.slots[0].dtype])

    def _send_loss(self, loss_fn: LossFunction, target: Any, num_samples: int) -> LossProgram:
        """The loss program of `loss_fn`, traced once per kind of target, and given to the last stage when it
        changes."""
        key = (_identity(loss_fn), *_kind(target))
        program = self._losses.get(key)
        if program is None:
            program = self._losses[key] = trace_loss(loss_fn, self._example_output(num_samples), target)
            while len(self._losses) > MAX_LOSSES:
                self._losses.popitem(last=False)
        self._losses.move_to_end(key)
        if program.digest != self._sent:
            self._driver.call(self._driver.num_stages - 1, "set_loss", {}, [program.to_json()])
            self._sent = program.digest
        return program

    def _example_output(self, num_samples: int) -> Any:
        """Something of the shape of the model's output for a micro-batch, to trace a loss with."""
        traced = self._calls.traced
        tensors = [
            torch.zeros([num_samples if size == -1 else size for size in slot.shape], dtype=DTYPES[slot.dtype])
            for slot in traced.outputs.slots
        ]
        return unflatten_outputs(traced, tensors)


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
