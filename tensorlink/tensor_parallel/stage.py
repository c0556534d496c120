"""A stage over the devices of one rig: what `Stage` does, each action by all ranks at once.

Everything around it sees whole tensors on the CPU: the inbox, the log, what is hashed, opened and saved. Neighbours:
`plan.py` (what is split), `ranks.py` (the threads), `weights.py`, `gradients.py`, `optimizer.py` (the state).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tensorlink.pipeline.arrivals import values
from tensorlink.pipeline.backward import ForwardPass, GradientSum, Value, backward, forward
from tensorlink.pipeline.executor import CallState
from tensorlink.pipeline.seeds import seed_for
from tensorlink.pipeline.stage import Stage
from tensorlink.program.admission import Admission, Bounds
from tensorlink.program.deferred import Deferred
from tensorlink.program.graph import LossProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.loss import constants_of
from tensorlink.stage_optimizer import StageOptimizer
from tensorlink.tensor_parallel.gradients import ShardedGradientSum
from tensorlink.tensor_parallel.group import Group
from tensorlink.tensor_parallel.optimizer import make_optimizer
from tensorlink.tensor_parallel.plan import plan
from tensorlink.tensor_parallel.ranks import Ranks
from tensorlink.tensor_parallel.shard_interpreter import ShardInterpreter
from tensorlink.tensor_parallel.weights import ShardedWeights


class ShardedDeferred(Deferred):
    """What each rank's backward has left for later."""

    def __init__(self, each: Sequence[Deferred]) -> None:
        super().__init__()
        self.each = each

    def __len__(self) -> int:
        return max(len(one) for one in self.each)


class ShardedPass(ForwardPass):
    """A forward on all ranks: `each` keeps a rank's graph, outputs and loss are the first rank's, on the CPU."""

    def __init__(self, each: Sequence[ForwardPass]) -> None:
        first = each[0]
        deferred = [one.deferred for one in each if one.deferred is not None]
        super().__init__(
            inputs=[],
            outputs=[_on_host(value) for value in first.outputs],
            loss=None if first.loss is None else first.loss.detach().cpu(),
            deferred=ShardedDeferred(deferred) if deferred else None,
        )
        self.each = each

    def free(self) -> None:
        super().free()
        for one in self.each:
            one.free()


class TensorParallelStage(Stage):
    """As `Stage`; `ranks` are those of the process, which its stages share. Further arguments as there."""

    def __init__(self, ranks: Ranks, batch: int, *args: Any, **options: Any) -> None:
        self._ranks, self._batch = ranks, batch
        super().__init__(*args, **options)

    def _begin(self, parameters: dict[str, Tensor], bounds: Bounds | None) -> None:
        self.plan = plan(self.program, self._ranks.num_devices, self._batch)
        self.weights = ShardedWeights(parameters, self.plan, self._ranks)
        self.parameters = self.weights
        self._own = {part.untyped_storage().data_ptr() for part in self.weights.parts[0].values()}
        self.gradients = ShardedGradientSum(self.weights)
        #: Buffers on each rank, and the whole ones that they are copies of.
        self._rank_buffers: list[dict[str, Tensor]] = [{} for _ in self._ranks.groups]
        self._sent_buffers: list[dict[str, Tensor]] = [{} for _ in self._ranks.groups]
        for group in self._ranks.groups:
            self._send_buffers(group)
        self._rank_interpreters = {training: self._each_interpreter(training, bounds) for training in (True, False)}
        self._rank_losses: list[Interpreter] = []

    def _each_interpreter(self, training: bool, bounds: Bounds | None) -> list[Interpreter]:
        admission = None if bounds is None else Admission.of_stage(self.program, training, bounds)
        made: list[Interpreter] = []
        for group, parts, buffers in zip(self._ranks.groups, self.weights.parts, self._rank_buffers, strict=True):
            made.append(ShardInterpreter(self.plan.of(training), parts, buffers, group))
            made[-1].admit = self._one_by_one(admission)
        return made

    def _one_by_one(self, admission: Admission | None) -> Any:
        """The check of sizes for ranks that come to it at once: the first measures, the others find it measured."""
        if admission is None:
            return None

        def admit(inputs: Sequence[Value]) -> None:
            with self._ranks.lock:
                admission(inputs)

        return admit

    def set_loss(self, program: LossProgram) -> None:
        super().set_loss(program)
        constants, admission = constants_of(program), None
        if self._bounds is not None:
            admission = Admission.of_loss(program, self._bounds)
        self._rank_losses = []
        for group in self._ranks.groups:
            here = {name: tensor.to(group.device) for name, tensor in constants.items()}
            self._rank_losses.append(Interpreter(program.graph, {}, here, device=group.device))
            self._rank_losses[-1].admit = self._one_by_one(admission)

    # -- what is computed ---------------------------------------------------------------------------------------------

    def _compute_forward(
        self, call: CallState, micro_batch: int, inputs: Sequence[Value], targets: Mapping[int, Tensor] | None
    ) -> ForwardPass:
        seeds = seed_for(self.place.seed, self.place.replica, call.step, call.call, micro_batch)
        wanted: list[Value] | None = None
        if targets is not None and self._loss is not None:
            program, _ = self._loss
            wanted = values(program.inputs.slots[program.num_outputs :], targets)

        def run(group: Group) -> ForwardPass:
            interpreter = self._rank_interpreters[call.training][group.rank]
            here = [_on_device(value, group) for value in inputs]
            loss = None
            if wanted is not None:
                loss = (self._rank_losses[group.rank], [_on_device(value, group) for value in wanted])
            return forward(interpreter, self.program.inputs, here, seeds, call.grad, loss, defer=self._defers(call))

        for group in self._ranks.groups:
            self._send_buffers(group)
        before = dict(self._rank_buffers[0])
        passed = ShardedPass(self._ranks.each(run))
        self._buffers_ran(before)
        return passed

    def _compute_backward(
        self, passed: ForwardPass, gradients: Mapping[int, Tensor], retain: bool, into: GradientSum
    ) -> dict[int, Tensor]:
        assert isinstance(passed, ShardedPass)
        assert isinstance(into, ShardedGradientSum)

        def run(group: Group) -> dict[int, Tensor]:
            here = {slot: gradient.to(group.device) for slot, gradient in gradients.items()}
            parts = self.weights.parts[group.rank]
            return backward(passed.each[group.rank], here, parts, retain, into.on(group.rank))

        of_inputs = self._ranks.each(run)[0]
        if not retain:
            passed.free()
        return {slot: gradient.cpu() for slot, gradient in of_inputs.items()}

    def _compute_weight_gradients(self, deferred: Deferred, into: GradientSum) -> None:
        assert isinstance(deferred, ShardedDeferred)
        assert isinstance(into, ShardedGradientSum)
        self._ranks.each(lambda group: deferred.each[group.rank].compute(into.on(group.rank).add))

    # -- state --------------------------------------------------------------------------------------------------------

    def _make_optimizer(self, name: str, groups: Sequence[Mapping[str, Any]]) -> StageOptimizer:
        return make_optimizer(name, groups, self.weights, self._ranks)

    def _replace_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        self.weights.replace(parameters)

    def _send_buffers(self, group: Group) -> None:
        """A rank computes with the buffers that the stage has now."""
        sent, here = self._sent_buffers[group.rank], self._rank_buffers[group.rank]
        for name, tensor in self.buffers.items():
            if sent.get(name) is not tensor:
                sent[name], here[name] = tensor, tensor.to(group.device)

    def _buffers_ran(self, before: Mapping[str, Tensor]) -> None:
        """A forward has run: the buffers that it replaced, the same on all ranks, are the stage's."""
        for name, tensor in self._rank_buffers[0].items():
            if tensor is not before[name]:
                self.buffers[name] = tensor.cpu()
                for sent in self._sent_buffers:
                    sent[name] = self.buffers[name]

    def shards(self) -> dict[str, Any]:
        return {"plan": str(self.plan), "num_bytes": self.shard_bytes()}

    def shard_bytes(self) -> list[int]:
        """Bytes of parameters and optimizer state that each rank holds."""
        return [
            sum(tensor.numel() * tensor.element_size() for tensor in (*parts.values(), *state.values()))
            for parts, state in zip(self.weights.parts, self._rank_states(), strict=True)
        ]

    def _rank_states(self) -> list[dict[str, Tensor]]:
        each = getattr(self.optimizer, "each", ())
        return [one.state_tensors() for one in each] or [{} for _ in self._ranks.groups]


def _on_device(value: Value, group: Group) -> Value:
    return value.to(group.device) if isinstance(value, Tensor) else value


def _on_host(value: Value) -> Value:
    return value.detach().cpu() if isinstance(value, Tensor) else value
