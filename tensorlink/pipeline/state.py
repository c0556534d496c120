"""The state of a stage and how a step changes it: optimizer, gradients, log. No links, no schedule.

Neighbours: `stage.py` adds to it what computes micro-batches; `tied.py` adds the gradients of parameters that several
stages hold; `steplog/` keeps what an audit or a take-over needs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smartnodes_core.errors import ProtocolError
from tensorlink.lasting import lasting
from tensorlink.pipeline.backward import GradientSum, squared_norm
from tensorlink.pipeline.tied import Settled, SumId, TiedGradients
from tensorlink.program.graph import StageProgram
from tensorlink.stage_optimizer import StageOptimizer
from tensorlink.steplog import snapshots
from tensorlink.steplog.log import StepLog, StepRecord
from tensorlink.steplog.shelf import Shelf
from tensorlink.steplog.snapshots import Snapshot

#: Two honest sums of the same squares are no farther apart than this.
NORM_TOLERANCE = 1e-3


class StageState(ABC):
    """Parameters, buffers and optimizer of one stage, the gradients of the open step, and the log.

    `parameters` and `buffers` are its own from now on. The state is kept and committed to every
    `state_interval_steps` steps. All methods are called from one thread.
    """

    def __init__(
        self,
        program: StageProgram,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        window_steps: int,
        shared_bytes: int,
        shelf: Shelf | None = None,
        state_interval_steps: int = 1,
    ) -> None:
        self.program = program
        self.parameters: Mapping[str, Tensor] = parameters
        self.buffers = buffers
        self.step = 0
        self.optimizer: StageOptimizer | None = None
        self.gradients = GradientSum()
        self.gradients.lend(lasting({name: tensor for name, tensor in parameters.items() if tensor.requires_grad}))
        self.tied = TiedGradients(program, self._send_sum)
        self.log = StepLog(window_steps, shared_bytes, shelf)
        self._buffers_at_start = dict(buffers)
        self._interval_steps = state_interval_steps
        self._steps_left = 0  # of the interval that the last step belongs to
        self._copy: Snapshot | None = None  # of weights and optimizer as the last step left them
        self._spare: Snapshot | None = None  # whose memory the next copy may use

    @abstractmethod
    def _end_calls(self, step: int) -> None:
        """Calls up to `step` are over; what computes them frees what they held."""

    @abstractmethod
    def _send_sum(self, to: int, id: SumId, slot: int, tensor: Tensor) -> None:
        """This stage's sum of a tied parameter goes to stage `to`."""

    def set_optimizer(self, name: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """The optimizer of this stage's parameters, with fresh state. Raises OptimizerError."""
        optimizer = self._make_optimizer(name, groups)
        self._keep_state_after()
        self.optimizer = optimizer

    def _make_optimizer(self, name: str, groups: Sequence[Mapping[str, Any]]) -> StageOptimizer:
        return StageOptimizer(name, groups, self.parameters)

    def set_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces optimizer state by copies, parameter by parameter. Nobody may be reading it meanwhile. Raises
        OptimizerError before anything is changed."""
        if self.optimizer is None:
            raise ProtocolError("no optimizer is set whose state this could be")
        self._keep_state_after()
        self.optimizer.load_state_tensors(tensors)

    def _keep_state_after(self) -> None:
        """The state is about to change other than by a step: the next one begins an interval, and where the last one
        ended its own, its audit needs the state as it is."""
        record, copy = self.log.last(), self._copy
        self._copy, self._steps_left = None, 0
        if record is not None and record.ends_interval and record.after is None:
            record.after = (
                snapshots.take(self.parameters, record.buffers_after, self._optimizer_state())
                if copy is None
                else replace(copy, buffers=record.buffers_after)
            )

    def _optimizer_state(self) -> Mapping[str, Tensor]:
        return self.optimizer.state_tensors() if self.optimizer else {}

    def _take_before(self) -> Snapshot:
        """The state with which the open step began, which its update is about to change."""
        before, self._copy = self._copy or self._state_copied(), None
        return replace(before, buffers=dict(self._buffers_at_start))

    def _state_copied(self) -> Snapshot:
        spare, self._spare = self._spare, None
        return snapshots.take(self.parameters, {}, self._optimizer_state(), spare)

    def state_after(self, record: StepRecord) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Weights and optimizer state as a step that ends its interval left them, those on the shelf as `Shelved`; not
        to be written to. Of other steps nobody keeps them: empty."""
        if not record.ends_interval:
            return {}, {}
        kept = record.after or self.log.state_after(record.step) or self._copy
        if kept is not None:
            return kept.weights, kept.optimizer
        return self.parameters, self._optimizer_state()

    @property
    def num_units(self) -> int:
        """Backwards of single micro-batches that are in this step's gradient."""
        return len(self.log.open.units)

    def share(self, step: int) -> list[int]:
        """Sends the sums of tied parameters to their other holders; returns the stages whose sums are still to come.

        Called when all of the step's backwards are in, and again whenever a sum has come.
        """
        id = self._sum_id(step)
        return [] if id is None else self.tied.share(id, self.gradients.sums())

    def _sum_id(self, step: int) -> SumId | None:
        """None where there is nothing to add over stages."""
        units = self.log.open.units
        if not units or not self.tied.ties.others:
            return None
        return SumId(step, units[-1].forward.call, len(units))

    def squared_norm(self, step: int) -> tuple[float, str]:
        """Of this step's gradients, and the first that is not finite; tied ones are the first holder's to count.

        Raises ProtocolError while other holders' sums are still to come.
        """
        settled = self._settled(step)
        if settled is None:
            return self.gradients.squared_norm()
        if settled.norm is None:
            gradients = {**self.gradients.sums(), **settled.totals}
            counted = {name: tensor for name, tensor in gradients.items() if self.tied.ties.counts(name)}
            settled.norm = squared_norm(counted)
        return settled.norm

    def _settled(self, step: int) -> Settled | None:
        """All holders' sums for what is added up now; None where nothing is tied."""
        id = self._sum_id(step)
        if id is None:
            return None
        settled = self.tied.settled(id)
        if settled is None:
            raise ProtocolError(f"step {step} was not prepared: sums of tied parameters are still to come")
        return settled

    def commit(
        self,
        step: int,
        clip_coefficient: float,
        options: Sequence[Mapping[str, Any]],
        order: bytes,
        clip_norm: str = "",
    ) -> StepRecord:
        """Updates the parameters with this step's gradients; what an audit of it needs stays in the log.

        Nobody may be reading parameters or optimizer state (hashing) meanwhile. Raises ProtocolError for another step
        than the open one and for a coefficient that the order's `clip_norm` does not give (the stage would be held
        responsible), OptimizerError before anything is changed.
        """
        if step < self.step or self.optimizer is None:
            raise ProtocolError(
                f"step {step} cannot be committed: the open step is {self.step}, the optimizer "
                f"{'is set' if self.optimizer else 'is not set'}"
            )
        settled = self._settled(step)
        squared, _ = self.squared_norm(step)
        if not clip_fits(clip_coefficient, clip_norm, squared, NORM_TOLERANCE / 2):
            raise ProtocolError(f"clip coefficient {clip_coefficient} is not what the order and the gradient give")
        record = self.log.open
        record.step, record.squared_norm = step, squared
        begins = self._steps_left == 0
        self._spare = self.log.make_room(begins) or self._spare
        if begins:
            record.before, self._steps_left = self._take_before(), self._interval_steps
        self._steps_left -= 1
        record.ends_interval = self._steps_left == 0
        record.buffers_before = dict(self._buffers_at_start)
        own, ties = self.gradients.take(), self.tied.ties
        record.sent_sums = {to: {name: own[name] for name in ties.names(to) if name in own} for to in ties.others}
        record.received_sums = {of: dict(settled.received[of]) if settled else {} for of in ties.others}
        record.gradient = dict(sorted({**own, **settled.totals}.items())) if settled else own
        self.tied.forget()
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

    def put_gradient_away(self, record: StepRecord) -> None:
        """The gradient of a committed step is hashed: where there is a shelf, the next one may stand in its memory. May
        run beside the next step's work."""
        self.gradients.lend(self.log.put_gradient_away(record))

    def put_away(self, record: StepRecord) -> None:
        """A committed step is hashed: where there is a shelf, it leaves memory. Where an interval ended, the state is
        copied for the next step's sake, onto the shelf or else in memory. May run beside the next step's work, in which
        nobody writes to that state."""
        self.log.shelve(record.step)
        if record.ends_interval:
            self._copy = self.log.copy(self.parameters, self._optimizer_state()) or self._state_copied()

    def close(self) -> None:
        """The stage is gone: the shelf gets its room back."""
        if self._copy is not None:
            self.log.give_up(self._copy)
        self.log.close()

    def abort(self, step: int) -> None:
        """Drops gradients, log and calls of the open step; buffers are again what they were when it began."""
        self.buffers.update(self._buffers_at_start)
        self.zero_grad(step)

    def zero_grad(self, step: int) -> None:
        """Drops the gradients added since the last step, and the calls they came from; buffers keep what forwards
        did."""
        self.gradients.drop()
        self.tied.forget()
        self._end_calls(step)
        self.log.begin(max(step, self.step))
        self._buffers_at_start = dict(self.buffers)

    def set_state(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Replaces parameters and buffers by values of the same names and shapes; what the open step has computed with
        the old ones is dropped. Nobody may be reading them meanwhile."""
        self._keep_state_after()
        self._replace_parameters(parameters)
        self.buffers.update(buffers)
        self.zero_grad(self.log.open.step)

    def _replace_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in parameters.items():
                self.parameters[name].copy_(tensor)


def clip_fits(coefficient: float, clip_norm: str, squared_norm: float, tolerance: float) -> bool:
    """Whether an order to clip to `clip_norm` (`float.hex()`, "" for none) gives this coefficient on a stage.

    Other stages' gradients are not known here: the global norm is at least this stage's.
    """
    if not clip_norm:
        return coefficient == 1.0
    most = float.fromhex(clip_norm) / max(math.sqrt(squared_norm), 1e-30)
    return 0.0 <= coefficient <= min(1.0, most * (1 + tolerance))


def clipped(gradient: Mapping[str, Tensor], coefficient: float) -> dict[str, Tensor]:
    """Gradients times the clip coefficient; the very same tensors where it is 1."""
    if coefficient == 1.0:
        return dict(gradient)
    return {name: tensor * coefficient for name, tensor in gradient.items()}
