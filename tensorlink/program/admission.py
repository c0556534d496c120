"""Sizes that a peer sends, let into a program only where their cost was found to be within the limits.

The check at loading is for the largest batch that the job announces. What arrives may have other sizes, and a program
may cost more for smaller ones (`zeros(10**12 // batch)`), so each combination is measured the first time it is seen.
Neighbours: `limits.py` (measures), `interpreter.py` (asks), `pipeline/stage.py` and `steplog/replay.py` (install it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorlink.program import limits
from tensorlink.program.graph import BufferSpec, Constant, Graph, LossProgram, ParameterSpec, StageProgram
from tensorlink.records import Cut

#: Combinations of sizes that are remembered; beyond them all are forgotten and measured again.
MAX_REMEMBERED = 256


@dataclass(frozen=True)
class Bounds:
    """What one micro-batch may cost: bytes of state and activations together, operations of forward and backward."""

    max_bytes: int
    max_flops: int


class Admission:
    """The check for one graph; made by `of_stage` and `of_loss`."""

    def __init__(
        self,
        graph: Graph,
        parameters: Mapping[str, ParameterSpec],
        buffers: Mapping[str, BufferSpec | Constant],
        cut: Cut,
        mode: str,
        bounds: Bounds,
    ) -> None:
        self._graph, self._parameters, self._buffers, self._cut = graph, parameters, buffers, cut
        self._mode, self._bounds = mode, bounds
        self._seen: set[tuple[object, ...]] = set()

    @classmethod
    def of_stage(cls, program: StageProgram, training: bool, bounds: Bounds) -> Admission:
        """For the graph that trains, or for the one that evaluates."""
        mode = "train" if training else "eval"
        return cls(program.graph(training), program.parameters, program.buffers, program.inputs, mode, bounds)

    @classmethod
    def of_loss(cls, program: LossProgram, bounds: Bounds) -> Admission:
        """For a loss."""
        return cls(program.graph, {}, program.constants, program.inputs, "loss", bounds)

    def __call__(self, inputs: Sequence[Tensor | int]) -> None:
        """Raises OverLimitError naming the node that goes over a limit for these inputs, ProgramError or TensorError
        where they cannot be run at all."""
        grad = torch.is_grad_enabled()
        key = (grad, *((item.shape, item.dtype) if isinstance(item, Tensor) else item for item in inputs))
        if key in self._seen:
            return
        limits.measure(
            self._graph,
            self._parameters,
            self._buffers,
            self._cut,
            1,
            self._bounds.max_bytes,
            self._bounds.max_flops,
            self._mode,
            grad,
            inputs,
        )
        if len(self._seen) >= MAX_REMEMBERED:
            self._seen.clear()
        self._seen.add(key)
