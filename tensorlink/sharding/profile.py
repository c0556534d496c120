"""What each node of a traced model costs: seconds measured on this machine, or derived from operation counts.

Forward is timed node by node (median of the repeats). Autograd does not say which node a backward kernel belongs to,
so the backward is timed as a whole and shared out in proportion to forward seconds times the ratio of backward to
forward operations. A machine's absolute speed does not matter here, only the proportions that `partition.py`
balances.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    repeats: int = 3,
    measured: bool = True,
) -> Profile:
    """Profiles the training graph on the example's batch.

    The module's parameters are read and nothing of it is changed. `measured=False` gives the same result on every
    machine; so does a module (or an example) on the meta device, which nothing can run.
    """
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (example_inputs, {})
    inputs = flatten_inputs(traced, args, kwargs)
    measured = measured and not any(t.is_meta for t in (*traced.parameters.values(), *traced.buffers.values(), *inputs))
    batch = next(len(tensor) for tensor, is_dynamic in zip(inputs, traced.binding.dynamic, strict=True) if is_dynamic)
    program = traced.whole()
    estimate = measure(
        program.train, program.parameters, program.buffers, program.inputs, batch, _UNLIMITED, _UNLIMITED, "train"
    )
    if measured:
        forward, backward_total = _timed(traced, inputs, repeats)
    else:
        forward = _derived(estimate.node_flops, estimate.value_bytes)
        backward_total = 0.0
    weights = {
        node: seconds * (estimate.node_flops[node][1] / max(estimate.node_flops[node][0], 1))
        for node, seconds in forward.items()
    }
    scale = backward_total / max(sum(weights.values()), 1e-12) if measured else 1.0
    return Profile(
        batch=batch,
        forward_s=forward,
        backward_s={node: weight * scale for node, weight in weights.items()},
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


def _timed(traced: TracedModel, inputs: list[Tensor], repeats: int) -> tuple[dict[int, float], float]:
    """Median forward seconds of each node, and of the whole backward."""
    parameters = {
        name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in traced.parameters.items()
    }
    graph = traced.train.graph
    times: dict[int, list[float]] = {node.id: [] for node in graph.nodes}
    backwards: list[float] = []
    for repeat in range(repeats + 1):  # the first warms up caches and allocator
        interpreter = Interpreter(graph, dict(parameters), {**traced.buffers, **traced.constants}, cut=traced.inputs)
        clock = _Clock()
        with torch.enable_grad():
            outputs = interpreter.run(inputs, seed_for=lambda key: key, observer=clock)
        leaves = [tensor for tensor in parameters.values() if tensor.requires_grad]
        ends = [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]
        started = time.perf_counter()
        if ends and leaves:
            torch.autograd.grad(ends, leaves, [torch.ones_like(end) for end in ends], allow_unused=True)
        if repeat:
            backwards.append(time.perf_counter() - started)
            for node, seconds in clock.seconds.items():
                times[node].append(seconds)
    return {node: statistics.median(samples) for node, samples in times.items()}, statistics.median(backwards)


class _Clock:
    """An observer that notes how long each node took."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._last = time.perf_counter()

    def __call__(self, node: Node, result: Any) -> None:
        now = time.perf_counter()
        self.seconds[node.id] = now - self._last
        self._last = time.perf_counter()
