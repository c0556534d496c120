"""Layers that stay on the user's own machine, before and behind those of the workers.

They compute as a stage does, with the same functions, so that training is bit for bit what it would be without them:
`forward_head` → the workers → `forward_tail`, `backward_tail` → the workers → `backward_head`, each micro-batch by
itself and each direction in the order of the micro-batches. A parameter that both ends use gets the sum of both
gradients micro-batch by micro-batch, as in one process. Neighbours: `calls.py` and `train_step.py` say what runs when,
`steps.py` when a step is committed, `sharding/private.py` where the model is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tensorlink.pipeline.backward import ForwardPass, GradientSum, backward, forward
from tensorlink.pipeline.driver import Call
from tensorlink.pipeline.seeds import seed_for
from tensorlink.pipeline.state import clipped
from tensorlink.program.alignment import aligned
from tensorlink.program.graph import StageProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.stage_optimizer import StageOptimizer

#: The slot under which `backward` takes the gradient of the loss.
LOSS = -1


class PrivateLayers:
    """The layers at both ends, either or none of which may be there, with one optimizer for them.

    `state` holds the tensors they begin with, which are copied. `seed` is the one in the job record.
    """

    def __init__(self, head: StageProgram | None, tail: StageProgram | None, state: Mapping[str, Tensor], seed: int):
        self.programs = programs = [program for program in (head, tail) if program is not None]
        self.parameters = {
            name: state[name].clone().requires_grad_(spec.requires_grad and state[name].is_floating_point())
            for program in programs
            for name, spec in program.parameters.items()
        }
        self.buffers = {name: state[name].clone() for program in programs for name in program.buffers}
        self.expected_state = {name: spec for program in programs for name, spec in program.expected_state().items()}
        self.has_tail = tail is not None
        self._head = None if head is None else _End(head, self.parameters, self.buffers, seed)
        self._tail = None if tail is None else _End(tail, self.parameters, self.buffers, seed)
        self._at_both_ends = head.parameters.keys() & tail.parameters.keys() if head and tail else set()
        self._of_tail: dict[int, dict[str, Tensor]] = {}  # gradients that wait for the head's, by micro-batch
        self._gradients = GradientSum()
        self._optimizer: StageOptimizer | None = None
        self._buffers_at_start = dict(self.buffers)

    def __bool__(self) -> bool:
        return self._head is not None or self._tail is not None

    # -- micro-batches ------------------------------------------------------------------------------------------------

    def forward_head(self, call: Call, micro_batch: int, inputs: Sequence[Any]) -> list[Any]:
        """What the first worker gets for a micro-batch with these inputs."""
        return list(inputs) if self._head is None else self._head.forward(call, micro_batch, inputs).outputs

    def forward_tail(self, call: Call, micro_batch: int, arrived: Sequence[Tensor]) -> list[Tensor]:
        """The model's outputs for what came from the last worker."""
        if self._tail is None:
            return list(arrived)
        return [output.detach() for output in self._tail.forward(call, micro_batch, arrived).outputs]  # type: ignore[union-attr]

    def forward_loss(
        self, call: Call, micro_batch: int, arrived: Sequence[Tensor], loss: Interpreter, targets: Sequence[Tensor]
    ) -> Tensor:
        """The loss of a micro-batch, not weighted, whose gradient `backward_tail` takes under `LOSS`; needs a tail."""
        assert self._tail is not None
        passed = self._tail.forward(call, micro_batch, arrived, (loss, targets))
        assert passed.loss is not None
        return passed.loss.detach()

    def backward_tail(
        self, call: Call, micro_batch: int, gradients: Mapping[int, Tensor], retain: bool
    ) -> dict[int, Tensor]:
        """The gradients that the last worker gets, from those of the model's outputs (or of the loss) by slot."""
        if self._tail is None:
            return dict(gradients)
        of_inputs, of_parameters = self._tail.backward(call, micro_batch, gradients, retain)
        both = {name: of_parameters.pop(name) for name in self._at_both_ends & of_parameters.keys()}
        self._of_tail[micro_batch] = both
        self._gradients.add(of_parameters)
        return of_inputs

    def backward_head(
        self, call: Call, micro_batch: int, gradients: Mapping[int, Tensor], retain: bool
    ) -> dict[int, Tensor]:
        """The gradients of the model's inputs, from those that the first worker sent, by slot."""
        if self._head is None:
            return dict(gradients)
        of_inputs, of_parameters = self._head.backward(call, micro_batch, gradients, retain)
        for name, gradient in self._of_tail.pop(micro_batch, {}).items():
            of_parameters[name] = gradient + of_parameters[name] if name in of_parameters else gradient
        self._gradients.add(of_parameters)
        return of_inputs

    def forget(self, call: Call) -> None:
        """Lets go of what the backwards through a call would need."""
        for end in (self._head, self._tail):
            if end is not None:
                end.passes.pop(call, None)

    # -- steps --------------------------------------------------------------------------------------------------------

    def set_optimizer(self, name: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """The optimizer, with fresh state; groups and options as they travel. Raises OptimizerError."""
        self._optimizer = StageOptimizer(name, groups, self.parameters)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Copies under `parameter/state name`."""
        state = {} if self._optimizer is None else self._optimizer.state_tensors()
        return {name: tensor.clone() for name, tensor in state.items()}

    def set_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes copies, parameter by parameter; `set_optimizer` came before. Raises OptimizerError before anything is
        changed."""
        assert self._optimizer is not None
        self._optimizer.load_state_tensors(tensors)

    def squared_norm(self) -> tuple[float, str]:
        """Of the gradients added so far, and the name of the first that is not finite ("" for none)."""
        return self._gradients.squared_norm()

    def commit(self, clip_coefficient: float, options: Sequence[Mapping[str, Any]]) -> None:
        """Updates the parameters with the gradients added so far."""
        assert self._optimizer is not None
        self._optimizer.step(clipped(self._gradients.take(), clip_coefficient), options)
        self._buffers_at_start = dict(self.buffers)

    def abort(self) -> None:
        """Drops the gradients; buffers are again what they were when the step began."""
        self.buffers.update(self._buffers_at_start)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drops the gradients; buffers keep what forwards did."""
        self._gradients.take()
        self._of_tail.clear()
        self._buffers_at_start = dict(self.buffers)

    # -- values -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Copies of parameters, buffers and constants by name."""
        return {name: tensor.detach().clone() for name, tensor in (self.parameters | self.buffers).items()}

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` holds; names, dtypes and shapes are those of `expected_state`."""
        with torch.no_grad():
            for name, tensor in state.items():
                if name in self.parameters:
                    self.parameters[name].copy_(tensor)
                else:
                    self.buffers[name] = tensor.clone()
        self._buffers_at_start = dict(self.buffers)

    def begin_anew(self, state: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Goes back to the state of an earlier step, with the optimizer's where one was set anew; what was under way is
        dropped."""
        for end in (self._head, self._tail):
            if end is not None:
                end.passes.clear()
        self.zero_grad()
        self.set_state(state)
        if moments:
            self.set_optimizer_state(moments)


class _End:
    """The layers at one end: forwards and backwards of micro-batches."""

    def __init__(self, program: StageProgram, parameters: dict[str, Tensor], buffers: dict[str, Tensor], seed: int):
        self.program = program
        self.passes: dict[Call, dict[int, ForwardPass]] = {}
        self._own = {name: parameters[name] for name in program.parameters}
        self._seed = seed
        self._interpreters = {mode: Interpreter(program.graph(mode), parameters, buffers) for mode in (True, False)}

    def forward(
        self,
        call: Call,
        micro_batch: int,
        inputs: Sequence[Any],
        loss: tuple[Interpreter, Sequence[Tensor]] | None = None,
    ) -> ForwardPass:
        seeds = seed_for(self._seed, 0, call.step, call.index, micro_batch)
        passed = forward(self._interpreters[call.training], self.program.inputs, inputs, seeds, call.grad, loss)
        if call.grad:
            self.passes.setdefault(call, {})[micro_batch] = passed
        return passed

    def backward(
        self, call: Call, micro_batch: int, gradients: Mapping[int, Tensor], retain: bool
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        given = {slot: aligned(gradient) for slot, gradient in gradients.items()}
        of_parameters = GradientSum()
        of_inputs = backward(self.passes[call][micro_batch], given, self._own, retain, of_parameters)
        return of_inputs, of_parameters.take()
