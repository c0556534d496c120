"""What each node of a traced model costs: seconds measured on this machine, or derived from operation counts.

Forward and backward are timed node by node, the quickest of the repeats: what other programs took meanwhile says
nothing of the model. In the backward a hook on each node's result says when its gradient is there and the node's own
turn comes. `partition.py` balances the proportions, `plan.py` scales the seconds to the speed of a rig.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorlink.program.flops import tensors_in
from tensorlink.program.graph import Node
from tensorlink.program.inputs import flatten_inputs
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.limits import measure
from tensorlink.program.trace import TracedModel

#: Nominal speeds of the derived profile; only their ratios have an effect: how much elementwise work counts.
NOMINAL_FLOPS_PER_S = 5e10
NOMINAL_BYTES_PER_S = 1e10
NOMINAL_CALL_S = 2e-6

_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Profile:
    """Seconds and bytes by node id of the training graph, for a batch of `batch` samples.

    `value_bytes` includes the inputs. `measured` is False where seconds were derived from operation counts.
    """

    batch: int
    forward_s: dict[int, float]
    backward_s: dict[int, float]
    value_bytes: dict[int, int]
    flops: dict[int, tuple[int, int]]
    measured: bool

    def cost_s(self, node_id: int) -> float:
        """Forward and backward seconds of a node."""
        return self.forward_s.get(node_id, 0.0) + self.backward_s.get(node_id, 0.0)

    def __repr__(self) -> str:
        forward, backward = sum(self.forward_s.values()), sum(self.backward_s.values())
        kind = "measured" if self.measured else "derived"
        return f"Profile({kind}, batch {self.batch}, forward {forward * 1e3:.2f} ms, backward {backward * 1e3:.2f} ms)"


def profile(
    traced: TracedModel,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    *,
    repeats: int = 5,
    measured: bool = True,
    samples: int | None = None,
) -> Profile:
    """Profiles the training graph on the first `samples` of the example (at least two where it has them), by default on
    all.

    The module's parameters are read and nothing of it is changed. `measured=False` gives the same result on every
    machine; so does a module (or an example) on the meta device, which nothing can run.
    """
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (example_inputs, {})
    inputs = flatten_inputs(traced, args, kwargs)
    measured = measured and not any(t.is_meta for t in (*traced.parameters.values(), *traced.buffers.values(), *inputs))
    batch = next(len(tensor) for tensor, is_dynamic in zip(inputs, traced.binding.dynamic, strict=True) if is_dynamic)
    if samples is not None and samples < batch:
        batch = min(batch, max(samples, 2))  # layers that normalise over the batch need two
        pairs = zip(inputs, traced.binding.dynamic, strict=True)
        inputs = [tensor[:batch].clone() if is_dynamic else tensor for tensor, is_dynamic in pairs]
    program = traced.whole()
    estimate = measure(
        program.train, program.parameters, program.buffers, program.inputs, batch, _UNLIMITED, _UNLIMITED, "train"
    )
    if measured:
        forward, backward = _timed(traced, inputs, repeats)
    else:
        forward = _derived(estimate.node_flops, estimate.value_bytes)
        backward = {
            node: seconds * (estimate.node_flops[node][1] / max(estimate.node_flops[node][0], 1))
            for node, seconds in forward.items()
        }
    return Profile(
        batch=batch,
        forward_s=forward,
        backward_s=backward,
        value_bytes=estimate.value_bytes,
        flops=estimate.node_flops,
        measured=measured,
    )


def _derived(node_flops: dict[int, tuple[int, int]], value_bytes: dict[int, int]) -> dict[int, float]:
    return {
        node: (forward / NOMINAL_FLOPS_PER_S + value_bytes.get(node, 0) / NOMINAL_BYTES_PER_S + NOMINAL_CALL_S)
        if forward
        else 0.0
        for node, (forward, _) in node_flops.items()
    }


def _timed(traced: TracedModel, inputs: list[Tensor], repeats: int) -> tuple[dict[int, float], dict[int, float]]:
    """The least forward and backward seconds of each node."""
    parameters = {
        name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in traced.parameters.items()
    }
    graph = traced.train.graph
    forwards: dict[int, list[float]] = {node.id: [] for node in graph.nodes}
    backwards: dict[int, list[float]] = {node.id: [] for node in graph.nodes}
    for repeat in range(repeats + 1):  # the first warms up caches and allocator
        interpreter = Interpreter(graph, dict(parameters), {**traced.buffers, **traced.constants}, cut=traced.inputs)
        clock = _Clock()
        with torch.enable_grad():
            outputs = interpreter.run(inputs, seed_for=lambda key: key, observer=clock)
        leaves = [tensor for tensor in parameters.values() if tensor.requires_grad]
        ends = [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]
        if ends and leaves:
            torch.autograd.grad(ends, leaves, [torch.ones_like(end) for end in ends], allow_unused=True)
        clock.turn(None)
        if repeat:
            for node in graph.nodes:
                forwards[node.id].append(clock.forward_s.get(node.id, 0.0))
                backwards[node.id].append(clock.backward_s.get(node.id, 0.0))
    return _least(forwards), _least(backwards)


def _least(samples: dict[int, list[float]]) -> dict[int, float]:
    return {node: min(found, default=0.0) for node, found in samples.items()}


class _Clock:
    """An observer that notes how long each node took, forward and then backward."""

    def __init__(self) -> None:
        self.forward_s: dict[int, float] = {}
        self.backward_s: dict[int, float] = {}
        self._turn: int | None = None  # whose backward is running
        self._last = time.perf_counter()

    def __call__(self, node: Node, result: Any) -> None:
        self.forward_s[node.id] = time.perf_counter() - self._last
        for tensor in tensors_in(result):
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(self._hook, node.id))
        self._last = time.perf_counter()

    def _hook(self, node_id: int, gradient: Tensor) -> None:
        self.turn(node_id)

    def turn(self, node_id: int | None) -> None:
        """The gradient of a node's result is there: what follows is its backward, until the next node's turn."""
        now = time.perf_counter()
        if self._turn is not None:
            self.backward_s[self._turn] = self.backward_s.get(self._turn, 0.0) + now - self._last
        self._turn, self._last = node_id, now
