"""One loaded stage: its state, its inbox, its actions. Knows nothing of processes; what leaves goes to a `Port`.

Neighbours: `executor.py` chooses the action, `backward.py` computes it, `steplog/` keeps what crossed, `compute.py`
owns stages and moves their tensors, tests put several into one process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor as Pool
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from smartnodes_core.errors import ProtocolError
from tensorlink.errors import TensorError
from tensorlink.pipeline.backward import ForwardPass, GradientSum, Value, backward, forward
from tensorlink.pipeline.executor import BackwardState, CallState, Executor, Ready
from tensorlink.pipeline.inbox import Delivery, Inbox
from tensorlink.pipeline.seeds import seed_for
from tensorlink.program.graph import LossProgram, StageProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.loss import constants_of
from tensorlink.program.values import DTYPE_NAMES
from tensorlink.records import Slot
from tensorlink.stage_optimizer import StageOptimizer
from tensorlink.steplog import snapshots
from tensorlink.steplog.digests import as_tensor, digests, slots
from tensorlink.steplog.log import ForwardRecord, StepLog, StepRecord, UnitRecord

MAX_SIZE = 1 << 48


class Port(Protocol):
    """Where a stage's results go. `to` is "next", "previous" or "user"."""

    def send(self, to: str, delivery: Delivery, slot: int, tensor: Tensor) -> None:
        """A tensor leaves; it is not written to afterwards."""

    def loss(self, call: CallState, micro_batch: int, value: float) -> None:
        """The last stage computed the loss of a micro-batch (not weighted)."""

    def done(self, call: CallState, type: str, backward_pass: int, busy_s: float) -> None:
        """All micro-batches of a call are through, in one direction."""


@dataclass(frozen=True)
class Place:
    """Where in which job a stage stands."""

    job: bytes
    plan_version: int
    replica: int
    stage: int
    num_stages: int
    seed: int


class Stage:
    """A stage that computes.

    `parameters` and `buffers` are the stage's own from now on. `pool` has one thread and computes digests. All
    methods are called from one thread. Raises ProgramError, TensorError, ProtocolError for what peers send wrong.
    """

    def __init__(
        self,
        place: Place,
        program: StageProgram,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        port: Port,
        pool: Pool,
        *,
        window_steps: int,
        shared_bytes: int = 1 << 62,
    ) -> None:
        self.place, self.program = place, program
        self.parameters, self.buffers = parameters, buffers
        self.step = 0
        self.optimizer: StageOptimizer | None = None
        self.gradients = GradientSum()
        self.log = StepLog(window_steps, shared_bytes)
        self._port, self._pool = port, pool
        self._inbox = Inbox()
        self._executor = Executor(place.stage, place.num_stages, self._has)
        self._interpreters = {
            training: Interpreter(program.graph(training), parameters, buffers) for training in (True, False)
        }
        self._loss: tuple[LossProgram, Interpreter] | None = None
        self._buffers_at_start = dict(buffers)
        inputs, outputs = program.inputs.slots, program.outputs.slots
        self._input_slots = range(len(inputs))
        self._gradient_slots = [i for i, slot in enumerate(outputs) if slot.requires_grad]
        self._upstream_slots = [i for i, slot in enumerate(inputs) if slot.requires_grad]

    @property
    def is_last(self) -> bool:
        """Whether outputs go to the user."""
        return self.place.stage == self.place.num_stages - 1

    # -- what is announced --------------------------------------------------------------------------------------------

    def set_loss(self, program: LossProgram) -> None:
        """The loss of `train_step`; only the last stage needs one."""
        self._loss = (program, Interpreter(program.graph, {}, constants_of(program)))

    def begin(self, params: dict[str, Any]) -> None:
        """A call was announced; its micro-batches run as their tensors arrive."""
        if params["type"] == "train_step" and self.is_last and self._loss is None:
            raise ProtocolError("train_step needs a loss program, and none was sent")
        self._executor.begin(params)

    def begin_backward(self, params: dict[str, Any]) -> None:
        """A backward through a finished or running call was asked for."""
        self._executor.begin_backward(params)

    def drop_call(self, step: int, call: int) -> None:
        """The user dropped the graph of a call."""
        self._executor.drop(step, call)
        self._inbox.forget(step, call)

    def receive(self, delivery: Delivery, slot: int, tensor: Tensor) -> bool:
        """A tensor arrived; True where it was new. Raises TensorError where it does not fit the cut."""
        if delivery.step < self.step:
            return False
        expected = self._expected(delivery.type, slot)
        if expected is None:
            return False
        _check_fits(expected, delivery, tensor)
        return self._inbox.put(delivery, slot, tensor)

    def _expected(self, type: str, slot: int) -> Slot | None:
        """What the cut says of a slot; None for a gradient that nothing here depends on."""
        if type == "target":
            cut = self._loss[0].inputs.slots[self._loss[0].num_outputs :] if self._loss else []
        elif type == "activation":
            cut = self.program.inputs.slots
        elif type == "activation_gradient":
            cut = self.program.outputs.slots
            if 0 <= slot < len(cut) and slot not in self._gradient_slots:
                return None
        else:
            raise TensorError(f"no stage takes a tensor of type {type!r:.40}")
        if not 0 <= slot < len(cut):
            raise TensorError(f"{type} {slot}: the cut has {len(cut)} slots")
        return cut[slot]

    def _has(self, kind: str, delivery: Delivery) -> bool:
        if kind == "inputs":
            return self._inbox.has(delivery, self._input_slots)
        if kind == "gradients":
            return self._inbox.has(delivery, self._gradient_slots)
        loss = self._loss
        return loss is not None and self._inbox.has(delivery, range(len(loss[0].inputs.slots) - loss[0].num_outputs))

    # -- what is computed ---------------------------------------------------------------------------------------------

    def run_next(self) -> bool:
        """Runs one action; False where none is ready."""
        ready = self._executor.next()
        if ready is None:
            return False
        began = time.perf_counter()
        if ready.backward is None:
            self._forward(ready)
            ready.call.busy_s += time.perf_counter() - began
            self._forward_done(ready.call)
        else:
            self._backward(ready, ready.backward)
            ready.backward.busy_s += time.perf_counter() - began
            self._backward_done(ready.backward)
        return True

    def _forward(self, ready: Ready) -> None:
        call, m = ready.call, ready.micro_batch
        delivery = Delivery(call.step, call.call, m, "activation", 0)
        arrived = self._inbox.take(delivery)
        inputs = _values(self.program.inputs.slots, arrived)
        with_loss = call.type == "train_step" and self.is_last
        targets = self._inbox.take(delivery._replace(type="target")) if with_loss else {}
        before = dict(self.buffers)
        passed = self._compute_forward(call, m, inputs, targets if with_loss else None)
        call.next_forward += 1
        if call.grad:
            call.passes[m] = passed
            call.held += 1
        if call.grad or call.training:
            record = ForwardRecord(
                call.call, m, call.training, call.type, slots(arrived), self._kept(passed.outputs), before
            )
            if with_loss and passed.loss is not None:
                record.target, record.loss = slots(targets), slots([passed.loss])
                record.loss_weight = call.weights[m]
            self._log_forward(delivery, record)
        if with_loss and passed.loss is not None:
            self._port.loss(call, m, float(passed.loss.detach()))
        else:
            self._send_outputs(delivery, passed)
        if not call.grad:
            passed.free()

    def _kept(self, outputs: Sequence[Value]) -> dict[str, Tensor]:
        """Outputs for the log: those that are views of parameters are copied, for the optimizer writes into those."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.parameters.values()}
        return {
            slot: tensor.clone() if tensor.untyped_storage().data_ptr() in own else tensor
            for slot, tensor in slots(outputs).items()
        }

    def _compute_forward(
        self, call: CallState, micro_batch: int, inputs: Sequence[Value], targets: Mapping[int, Tensor] | None
    ) -> ForwardPass:
        seeds = seed_for(self.place.seed, self.place.replica, call.step, call.call, micro_batch)
        loss = None
        if targets is not None and self._loss is not None:
            program, interpreter = self._loss
            loss = (interpreter, _values(program.inputs.slots[program.num_outputs :], targets))
        return forward(self._interpreters[call.training], self.program.inputs, inputs, seeds, call.grad, loss)

    def _send_outputs(self, delivery: Delivery, passed: ForwardPass) -> None:
        to, type_ = ("user", "output") if self.is_last else ("next", "activation")
        for slot, value in enumerate(passed.outputs):
            self._port.send(to, delivery._replace(type=type_), slot, as_tensor(value))

    def _forward_done(self, call: CallState) -> None:
        if call.forward_done and call.type == "forward":
            self._port.done(call, "forward", 0, call.busy_s)
            if not call.grad:
                self.drop_call(call.step, call.call)

    def _backward(self, ready: Ready, state: BackwardState) -> None:
        call, m = ready.call, ready.micro_batch
        delivery = Delivery(call.step, call.call, m, "activation_gradient", state.backward_pass)
        passed = call.passes[m]
        arrived = self._inbox.take(delivery)
        gradients = dict(arrived)
        if passed.loss is not None:
            gradients = {-1: torch.tensor(call.weights[m], dtype=passed.loss.dtype).expand_as(passed.loss)}
        of_inputs, of_parameters = self._compute_backward(passed, gradients, state.retain)
        if passed.freed:
            call.held -= 1
        state.next += 1
        self.gradients.add(of_parameters)
        to = "previous" if self.place.stage else "user"
        for slot in self._upstream_slots:
            self._port.send(to, delivery, slot, of_inputs[slot])
        record = self.log.open.forwards[(call.call, m)]
        self._log_unit(delivery, UnitRecord(record, state.backward_pass, slots(arrived), slots(of_inputs)))

    def _compute_backward(
        self, passed: ForwardPass, gradients: Mapping[int, Tensor], retain: bool
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        return backward(passed, gradients, self.parameters, retain)

    def _backward_done(self, state: BackwardState) -> None:
        if state.done:
            call = state.call
            if call.type == "train_step":
                self._port.done(call, "train_step", 0, call.busy_s + state.busy_s)
            else:
                self._port.done(call, "backward", state.backward_pass, state.busy_s)

    # -- the log ------------------------------------------------------------------------------------------------------

    def _log_forward(self, delivery: Delivery, record: ForwardRecord) -> None:
        self.log.open.forwards[(record.call, record.micro_batch)] = record
        groups = {"x": record.x, "y": record.y, "target": record.target, "loss": record.loss}
        record.digests = self._pool.submit(_group_digests, {name: dict(group) for name, group in groups.items()})
        self._inbox.remember(delivery, "x", record.digests)
        if record.target:
            self._inbox.remember(delivery._replace(type="target"), "target", record.digests)

    def _log_unit(self, delivery: Delivery, unit: UnitRecord) -> None:
        self.log.open.units.append(unit)
        unit.digests = self._pool.submit(_group_digests, {"gy": dict(unit.gy), "gx": dict(unit.gx)})
        if unit.gy:
            self._inbox.remember(delivery, "gy", unit.digests)
        self.log.settle(unit)

    # -- the step -----------------------------------------------------------------------------------------------------

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
        kept = record.after
        if kept is None:
            following = self.log.following(record.step)
            kept = following.before if following is not None else None
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
        self._executor.drop(step)
        self._inbox.forget(step)
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
        self._executor.drop(step)
        self._inbox.forget(step)
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


def _group_digests(groups: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, bytes]]:
    return {name: digests(group) for name, group in groups.items()}


def _values(expected: Sequence[Slot], arrived: Mapping[int, Tensor]) -> list[Value]:
    return [_size(arrived[i]) if slot.type == "symint" else arrived[i] for i, slot in enumerate(expected)]


def _size(tensor: Tensor) -> int:
    size = int(tensor)
    if not 0 <= size < MAX_SIZE:
        raise TensorError(f"a size of {size}: sizes are 0 to {MAX_SIZE}")
    return size


def _check_fits(slot: Slot, delivery: Delivery, tensor: Tensor) -> None:
    shape, dtype = list(tensor.shape), DTYPE_NAMES[tensor.dtype]
    wanted_dtype, wanted = ("int64", []) if slot.type == "symint" else (slot.dtype, list(slot.shape))
    fits = len(shape) == len(wanted) and all(want in (-1, size) for want, size in zip(wanted, shape, strict=True))
    if dtype != wanted_dtype or not fits:
        raise TensorError(
            f"{delivery.type} of micro-batch {delivery.micro_batch}, slot {slot.name!r}: found {dtype} {shape}, needed "
            f"{wanted_dtype} {wanted} (-1 is the batch)"
        )
