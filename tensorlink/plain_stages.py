"""Stage programs one after the other in one process, as `plain.py` runs them where the module alone will not do.

Autograd goes through all of them at once. Only tied parameters are special: each stage that holds one has a leaf of
its own over the same memory, so that its gradients add up by stage, and the stages' sums are added in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from smartnodes_core.errors import JobError
from tensorlink.pipeline.tied import in_stage_order
from tensorlink.program.graph import StageProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.trace import TracedModel


class PlainStages:
    """`programs`, all stages of `traced` in order, over the module's own parameters and buffers."""

    def __init__(self, traced: TracedModel, programs: Sequence[StageProgram]) -> None:
        found = [(program.stage_index, program.num_stages) for program in programs]
        if found != [(stage, len(programs)) for stage in range(len(programs))]:
            raise JobError(f"stages (index, of) {found}: all stages of one partition are needed, in order")
        self._traced = traced
        self._leaves: dict[str, list[Tensor]] = {}  # of tied parameters, in stage order
        whole = traced.whole()
        self._buffers = {name: tensor for name, tensor in traced.state(whole).items() if name in whole.buffers}
        self._interpreters: dict[bool, list[Interpreter]] = {True: [], False: []}
        for program in programs:
            parameters = self._parameters(program)
            for training, chain in self._interpreters.items():
                chain.append(Interpreter(program.graph(training), parameters, self._buffers))

    def run(self, values: Sequence[Any], seeds: Callable[[int], int], training: bool) -> list[Any]:
        """One micro-batch through all stages; buffers of the module change as its own forward would change them."""
        self._buffers.update({name: tensor.detach().clone() for name, tensor in self._traced.buffers.items()})
        given = dict(self._buffers)
        for interpreter in self._interpreters[training]:
            values = interpreter.run([v.contiguous() if isinstance(v, Tensor) else v for v in values], seeds)
        with torch.no_grad():
            for name, tensor in self._traced.buffers.items():
                if self._buffers[name] is not given[name]:
                    tensor.copy_(self._buffers[name])
        return list(values)

    def before_backward(self) -> None:
        """Gradients that were dropped from the module's parameters are dropped from the stages' sums too."""
        for name, leaves in self._leaves.items():
            gradient = self._traced.parameters[name].grad
            if gradient is None or not gradient.any():
                for leaf in leaves:
                    leaf.grad = None

    def after_backward(self) -> None:
        """Tied parameters get their gradient: the stages' sums so far, added in the order of the stages."""
        for name, leaves in self._leaves.items():
            total = in_stage_order(leaf.grad for leaf in leaves)
            self._traced.parameters[name].grad = None if total is None else total.clone()

    def _parameters(self, program: StageProgram) -> dict[str, Tensor]:
        parameters: dict[str, Tensor] = {}
        for name, spec in program.parameters.items():
            parameters[name] = self._traced.parameters[name]
            if spec.holders and spec.requires_grad:
                parameters[name] = parameters[name].detach().requires_grad_()
                self._leaves.setdefault(name, []).append(parameters[name])
        return parameters
