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
from tensorlink.pipeline.arrivals import check_fits, values
from tensorlink.pipeline.backward import ForwardPass, GradientSum, Norm, Value, backward, forward
from tensorlink.pipeline.executor import BackwardState, CallState, Executor, Ready, Timeline
from tensorlink.pipeline.inbox import Delivery, Inbox
from tensorlink.pipeline.seeds import seed_for
from tensorlink.pipeline.state import StageState
from tensorlink.pipeline.tied import SumId
from tensorlink.program.admission import Admission, Bounds
from tensorlink.program.deferred import Deferred
from tensorlink.program.graph import LossProgram, StageProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.loss import constants_of
from tensorlink.records import Slot
from tensorlink.steplog.digests import digests, slots
from tensorlink.steplog.log import Digests, ForwardRecord, StepRecord, UnitRecord
from tensorlink.steplog.shelf import Shelf


class Port(Protocol):
    """Where a stage's results go. `to` is "next", "previous" or "user"."""

    def send(self, to: str, delivery: Delivery, slot: int, tensor: Tensor) -> None:
        """A tensor leaves; it is not written to afterwards."""

    def share(self, to: int, id: SumId, slot: int, tensor: Tensor) -> None:
        """A sum of a tied parameter's gradients leaves for the holder `to`; it is not read after the call."""

    def loss(self, call: CallState, micro_batch: int, value: float) -> None:
        """The last stage computed the loss of a micro-batch (not weighted)."""

    def done(
        self, call: CallState, type: str, backward_pass: int, timeline: Timeline, prepared: Norm | None = None
    ) -> None:
        """All micro-batches of a call are through, in one direction; `timeline` says what ran when, `prepared` what a
        prepare would say now, where that was asked for and waits for nobody.
        """


@dataclass(frozen=True)
class Place:
    """Where in which job a stage stands."""

    job: bytes
    plan_version: int
    replica: int
    stage: int
    num_stages: int
    seed: int


class Stage(StageState):
    """A stage that computes.

    `parameters` and `buffers` are the stage's own from now on. `bounds` are what a micro-batch may cost. `pool` has one
    thread and computes digests. All methods are called from one thread. Raises ProgramError, TensorError, ProtocolError
    for what peers send wrong.
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
        shelf: Shelf | None = None,
        bounds: Bounds | None = None,
        state_interval_steps: int = 1,
    ) -> None:
        super().__init__(program, parameters, buffers, window_steps, shared_bytes, shelf, state_interval_steps)
        self.place = place
        self._port, self._pool = port, pool
        self._inbox = Inbox()
        self._executor = Executor(place.stage, place.num_stages, self._has)
        self._bounds = bounds
        self._begin(parameters, bounds)
        self._loss: tuple[LossProgram, Interpreter] | None = None
        inputs, outputs = program.inputs.slots, program.outputs.slots
        self._input_slots = range(len(inputs))
        self._gradient_slots = [i for i, slot in enumerate(outputs) if slot.requires_grad]
        self._upstream_slots = [i for i, slot in enumerate(inputs) if slot.requires_grad]

    def _begin(self, parameters: dict[str, Tensor], bounds: Bounds | None) -> None:
        """Makes what computes with these parameters."""
        self._interpreters = {
            training: Interpreter(self.program.graph(training), parameters, self.buffers) for training in (True, False)
        }
        if bounds is not None:
            for training, interpreter in self._interpreters.items():
                interpreter.admit = Admission.of_stage(self.program, training, bounds)
        # the optimizer writes into these
        self._own = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}

    @property
    def is_last(self) -> bool:
        """Whether outputs go to the user."""
        return self.place.stage == self.place.num_stages - 1

    def shards(self) -> dict[str, Any]:
        """How the stage lies on several devices, for people, and the bytes on each; nothing where it is on one."""
        return {}

    # -- what is announced --------------------------------------------------------------------------------------------

    def set_loss(self, program: LossProgram) -> None:
        """The loss of `train_step`; only the last stage needs one."""
        interpreter = Interpreter(program.graph, {}, constants_of(program))
        if self._bounds is not None:
            interpreter.admit = Admission.of_loss(program, self._bounds)
        self._loss = (program, interpreter)

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
        check_fits(expected, delivery, tensor)
        return self._inbox.put(delivery, slot, tensor)

    def receive_sum(self, id: SumId, stage: int, slot: int, tensor: Tensor) -> bool:
        """A sum of a tied parameter came from another holder; True where it was new. Raises TensorError."""
        return id.step >= self.step and self.tied.receive(id, stage, slot, tensor)

    def _send_sum(self, to: int, id: SumId, slot: int, tensor: Tensor) -> None:
        self._port.share(to, id, slot, tensor)

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

    def _end_calls(self, step: int) -> None:
        self._executor.drop(step)
        self._inbox.forget(step)

    # -- what is computed ---------------------------------------------------------------------------------------------

    def run_next(self) -> bool:
        """Runs one action; False where none is ready."""
        ready = self.ready()
        if ready is not None:
            self.run(ready)
        return ready is not None

    def ready(self) -> Ready | None:
        """The action that can run now, or None where everything waits for tensors."""
        return self._executor.next()

    def run(self, ready: Ready) -> None:
        """Runs what `ready` returned last."""
        began = time.time_ns()
        if ready.backward is None:
            self._forward(ready)
        elif ready.kind == "W":
            self._weight_gradients()
        else:
            self._backward(ready, ready.backward)
        ready.call.ran(ready, began, time.time_ns())
        if ready.backward is None:
            self._forward_done(ready.call)
        else:
            self._backward_done(ready.backward)

    @property
    def num_units(self) -> int:
        """See `StageState`; a backward counts when its weight gradients are in the sum, too."""
        return super().num_units - len(self._executor.deferred)

    def _forward(self, ready: Ready) -> None:
        call, m = ready.call, ready.micro_batch
        delivery = Delivery(call.step, call.call, m, "activation", 0)
        arrived = self._inbox.take(delivery)
        inputs = values(self.program.inputs.slots, arrived)
        with_loss = call.type == "train_step" and self.is_last
        targets = self._inbox.take(delivery._replace(type="target")) if with_loss else {}
        before = dict(self.buffers)
        passed = self._compute_forward(call, m, inputs, targets if with_loss else None)
        call.next_forward += 1
        if call.grad:
            call.passes[m] = passed
            call.held += 1
        kept = self._kept(passed.outputs)
        if call.grad or call.training:
            record = ForwardRecord(call.call, m, call.training, call.type, slots(arrived), kept, before)
            if with_loss and passed.loss is not None:
                record.target, record.loss = slots(targets), slots([passed.loss])
                record.loss_weight = call.weights[m]
            self._log_forward(delivery, record)
        if with_loss and passed.loss is not None:
            self._port.loss(call, m, float(passed.loss.detach()))
        else:
            self._send_outputs(delivery, kept)
        if not call.grad:
            passed.free()

    def _kept(self, outputs: Sequence[Value]) -> dict[str, Tensor]:
        """Outputs for the log and for the next stage, by slot index as text: those that are views of parameters are
        copied, for the optimizer writes into those."""
        return {
            slot: tensor.clone() if tensor.untyped_storage().data_ptr() in self._own else tensor
            for slot, tensor in slots(outputs).items()
        }

    def _compute_forward(
        self, call: CallState, micro_batch: int, inputs: Sequence[Value], targets: Mapping[int, Tensor] | None
    ) -> ForwardPass:
        seeds = seed_for(self.place.seed, self.place.replica, call.step, call.call, micro_batch)
        loss = None
        if targets is not None and self._loss is not None:
            program, interpreter = self._loss
            loss = (interpreter, values(program.inputs.slots[program.num_outputs :], targets))
        interpreter = self._interpreters[call.training]
        return forward(interpreter, self.program.inputs, inputs, seeds, call.grad, loss, defer=self._defers(call))

    def _defers(self, call: CallState) -> bool:
        """Whether somebody waits for this stage's input gradients, or the schedule puts weight gradients elsewhere."""
        return bool(self._upstream_slots) or (call.order is not None and call.order.deferred > 1)

    def _send_outputs(self, delivery: Delivery, outputs: Mapping[str, Tensor]) -> None:
        to, type_ = ("user", "output") if self.is_last else ("next", "activation")
        for slot, tensor in outputs.items():
            self._port.send(to, delivery._replace(type=type_), int(slot), tensor)

    def _forward_done(self, call: CallState) -> None:
        if call.forward_done and call.type == "forward":
            self._port.done(call, "forward", 0, call.take_timeline())
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
        of_inputs = self._compute_backward(passed, gradients, state.retain, self.gradients)
        state.next += 1
        to = "previous" if self.place.stage else "user"
        for slot in self._upstream_slots:
            self._port.send(to, delivery, slot, of_inputs[slot])
        record = self.log.open.forwards[(call.call, m)]
        self._log_unit(delivery, UnitRecord(record, state.backward_pass, slots(arrived), slots(of_inputs)))
        if passed.deferred:
            self._executor.deferred.append((state, m))
        else:
            self._micro_batch_done(state, passed)

    def _weight_gradients(self) -> None:
        """What the oldest backward left for later."""
        state, m = self._executor.deferred.popleft()
        passed = state.call.passes[m]
        if passed.deferred is not None:
            self._compute_weight_gradients(passed.deferred, self.gradients)
        self._micro_batch_done(state, passed)

    def _micro_batch_done(self, state: BackwardState, passed: ForwardPass) -> None:
        state.finished += 1
        if passed.freed:
            state.call.held -= 1

    def _compute_weight_gradients(self, deferred: Deferred, into: GradientSum) -> None:
        deferred.compute(into.add)

    def _compute_backward(
        self, passed: ForwardPass, gradients: Mapping[int, Tensor], retain: bool, into: GradientSum
    ) -> dict[int, Tensor]:
        return backward(passed, gradients, self.parameters, retain, into)

    def _backward_done(self, state: BackwardState) -> None:
        if state.done:
            call = state.call
            type_ = "train_step" if call.type == "train_step" else "backward"
            prepared = self.squared_norm(call.step) if state.prepare and not self.tied.ties.others else None
            self._port.done(call, type_, state.backward_pass, call.take_timeline(), prepared)

    # -- the log ------------------------------------------------------------------------------------------------------

    def _log_forward(self, delivery: Delivery, record: ForwardRecord) -> None:
        self.log.open.forwards[(record.call, record.micro_batch)] = record
        groups = {"x": record.x, "y": record.y, "target": record.target, "loss": record.loss}
        record.digests = self._pool.submit(self._hashed, self.log.open, groups)
        self._inbox.remember(delivery, "x", record.digests)
        if record.target:
            self._inbox.remember(delivery._replace(type="target"), "target", record.digests)

    def _log_unit(self, delivery: Delivery, unit: UnitRecord) -> None:
        self.log.open.units.append(unit)
        unit.digests = self._pool.submit(self._hashed, self.log.open, {"gy": unit.gy, "gx": unit.gx})
        if unit.gy:
            self._inbox.remember(delivery, "gy", unit.digests)
        self.log.settle(unit)

    def _hashed(self, record: StepRecord, groups: dict[str, dict[str, Tensor]]) -> Digests:
        found = {name: digests(group) for name, group in groups.items()}
        self.log.put_away(record, groups.values())
        return found
