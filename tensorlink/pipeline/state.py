"""The state of a stage and how a step changes it: optimizer, gradients, log. No links, no schedule.

Neighbours: `stage.py` adds to it what computes micro-batches; `steplog/` keeps what an audit or a take-over needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smartnodes_core.errors import ProtocolError
from tensorlink.pipeline.backward import GradientSum
from tensorlink.program.graph import StageProgram
from tensorlink.stage_optimizer import StageOptimizer
from tensorlink.steplog import snapshots
from tensorlink.steplog.log import StepLog, StepRecord
from tensorlink.steplog.shelf import Shelf


class StageState(ABC):
    """Parameters, buffers and optimizer of one stage, the gradients of the open step, and the log.

    `parameters` and `buffers` are its own from now on. All methods are called from one thread.
    """

    def __init__(
        self,
        program: StageProgram,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        window_steps: int,
        shared_bytes: int,
        shelf: Shelf | None = None,
    ) -> None:
        self.program = program
        self.parameters, self.buffers = parameters, buffers
        self.step = 0
        self.optimizer: StageOptimizer | None = None
        self.gradients = GradientSum()
        self.log = StepLog(window_steps, shared_bytes, shelf)
        self._buffers_at_start = dict(buffers)

    @abstractmethod
    def _end_calls(self, step: int) -> None:
        """Calls up to `step` are over; what computes them frees what they held."""

    def set_optimizer(self, name: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """The optimizer of this stage's parameters, with fresh state. Raises OptimizerError."""
        optimizer = StageOptimizer(name, groups, self.parameters)
        self._keep_state_after()
        self.optimizer = optimizer

    def _keep_state_after(self) -> None:
        """The state is about to change other than by a step: the last step's audit needs it as it is."""
        record = self.log.last()
        if record is not None and record.after is None:
            state = self.optimizer.state_tensors() if self.optimizer else {}
            record.after = snapshots.take(self.parameters, record.buffers_after, state)

    def state_after(self, record: StepRecord) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Weights and optimizer state as a committed step left them; not to be written to."""
        kept = record.after or self.log.state_after(record.step)
        if kept is not None:
            return kept.weights, kept.optimizer
        return self.parameters, self.optimizer.state_tensors() if self.optimizer else {}

    @property
    def num_units(self) -> int:
        """Backwards of single micro-batches that are in this step's gradient."""
        return len(self.log.open.units)

    def commit(
        self, step: int, clip_coefficient: float, options: Sequence[Mapping[str, Any]], order: bytes
    ) -> StepRecord:
        """Updates the parameters with this step's gradients; what an audit of it needs stays in the log.

        Nobody may be reading parameters or optimizer state (hashing) meanwhile. Raises ProtocolError for another step
        than the open one, OptimizerError before anything is changed.
        """
        if step < self.step or self.optimizer is None:
            raise ProtocolError(
                f"step {step} cannot be committed: the open step is {self.step}, the optimizer "
                f"{'is set' if self.optimizer else 'is not set'}"
            )
        record = self.log.open
        record.step = step
        record.squared_norm, _ = self.gradients.squared_norm()
        state = self.optimizer.state_tensors()
        record.before = snapshots.take(self.parameters, self._buffers_at_start, state, self.log.make_room())
        record.gradient = self.gradients.take()
        record.clip_coefficient, record.order, record.options = clip_coefficient, order, [dict(o) for o in options]
        record.buffers_after = dict(self.buffers)
        self._update(record, options)
        self.log.commit(step + 1)
        self._end_calls(step)
        self._buffers_at_start = dict(self.buffers)
        self.step = step + 1
        return record

    def _update(self, record: StepRecord, options: Sequence[Mapping[str, Any]]) -> None:
        if self.optimizer is not None:
            self.optimizer.step(clipped(record.gradient, record.clip_coefficient), options)

    def abort(self, step: int) -> None:
        """Drops gradients, log and calls of the open step; buffers are again what they were when it began."""
        self.buffers.update(self._buffers_at_start)
        self.zero_grad(step)

    def zero_grad(self, step: int) -> None:
        """Drops the gradients added since the last step, and the calls they came from; buffers keep what forwards
        did."""
        self.gradients.take()
        self._end_calls(step)
        self.log.begin(max(step, self.step))
        self._buffers_at_start = dict(self.buffers)

    def set_state(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Replaces parameters and buffers by values of the same names and shapes. Nobody may be reading them
        meanwhile."""
        self._keep_state_after()
        with torch.no_grad():
            for name, tensor in parameters.items():
                self.parameters[name].copy_(tensor)
        self.buffers.update(buffers)
        self._buffers_at_start = dict(self.buffers)


def clipped(gradient: Mapping[str, Tensor], coefficient: float) -> dict[str, Tensor]:
    """Gradients times the clip coefficient; the very same tensors where it is 1."""
    if coefficient == 1.0:
        return dict(gradient)
    return {name: tensor * coefficient for name, tensor in gradient.items()}
