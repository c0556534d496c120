"""Forwards and backwards through the pipeline, as one node of the user's autograd graph.

`forward` cuts a batch into micro-batches, sends them to the first stage and joins what comes from the last;
`loss.backward()` enters `_Pipeline.backward`, which sends gradients the other way. Neighbours: `pipeline/driver.py`
moves and waits, `steps.py` closes what is counted here.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smartnodes_core.errors import JobError
from tensorlink.audit.commitments import input_root
from tensorlink.pipeline.batching import boundaries, check_finite, flat_inputs, micro_batches
from tensorlink.pipeline.driver import Call, Driver
from tensorlink.program.inputs import unflatten_outputs
from tensorlink.program.trace import TracedModel
from tensorlink.records import Cut


class Calls:
    """All calls of the open step. `outputs` is the cut at the pipeline's end.

    `step_index` counts committed steps, `num_calls` forwards since the last one (evaluation too): an index is never
    used twice, so that a late tensor is never taken for another's.
    """

    def __init__(self, driver: Driver, traced: TracedModel, outputs: Cut, num_micro_batches: int):
        self.driver, self.traced = driver, traced
        self.step_index = 0
        self.num_calls = 0
        self.input_roots: dict[str, bytes] = {}
        self.dirty = False  # gradients were sent to stages since the last step
        self._outputs = outputs
        self._num_micro_batches = num_micro_batches
        self._open: list[Call] = []
        self._dropped: queue.SimpleQueue[Call] = queue.SimpleQueue()

    # -- for the model ------------------------------------------------------------------------------------------------

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], training: bool) -> Any:
        """The model's output for a batch, with a graph behind it where gradients are on."""
        flat = flat_inputs(self.traced, args, kwargs)
        check_finite(flat, [f"input {name!r}" for name in self.traced.input_names])
        grad = torch.is_grad_enabled()
        anchor = torch.zeros((), requires_grad=grad)  # every parameter is elsewhere, and autograd must call us
        outputs = _Pipeline.apply(self, flat, training, anchor, *[x for x in flat if _wants_grad(x)])
        return unflatten_outputs(self.traced, list(outputs))

    @property
    def num_units(self) -> int:
        """Backwards of single micro-batches since the last step."""
        return sum(call.num_micro_batches * call.num_backwards for call in self._open)

    def split(self, flat: Sequence[Tensor]) -> tuple[list[list[Tensor]], list[int]]:
        """A batch as micro-batches, and their sizes."""
        return micro_batches(self.traced, flat, self._num_micro_batches)

    def open(self, pieces: Sequence[Sequence[Any]], samples: list[int], options: dict[str, Any]) -> Call:
        """Announce a call to every stage and send its inputs to the first."""
        self.free_dropped()
        call = Call(self.step_index, self.num_calls, samples)
        self.num_calls += 1
        self._open.append(call)
        self.driver.begin(call, options)
        for micro_batch, piece in enumerate(pieces):
            tensors = {slot: x if isinstance(x, Tensor) else torch.tensor(x) for slot, x in enumerate(piece)}
            for slot, tensor in tensors.items():
                self.driver.send(0, call, micro_batch, slot, tensor, type="activation")
            self.input_roots[f"{call.index}.{micro_batch}"] = input_root(tensors)
        return call

    def end(self, committed: bool) -> None:
        """The step was committed on every stage, or its gradients were dropped."""
        for call in self._open:
            self.driver.forget(call)
            call.freed = True
        self._open.clear()
        self.dirty = False
        if committed:
            self.step_index += 1
            self.num_calls = 0
            self.input_roots.clear()

    def resume(self, step_index: int, num_calls: int) -> None:
        """Count on from where a checkpoint was made, so that dropout masks go on as they would have; never
        backwards."""
        place = max((self.step_index, self.num_calls), (step_index, num_calls))
        self.step_index, self.num_calls = place

    def free_dropped(self) -> None:
        """Have the stages free the activations of forwards whose graph the user let go of."""
        while not self._dropped.empty():
            call = self._dropped.get()
            if call in self._open and not call.freed:
                # what has been through a backward counts for the step; only its activations go
                if not call.num_backwards:
                    self._open.remove(call)
                    self.driver.forget(call)
                    self.driver.tell_all("drop_call", {"step": call.step, "call": call.index})
                call.freed = True

    # -- for autograd -------------------------------------------------------------------------------------------------

    def run_forward(self, flat: list[Any], training: bool, grad: bool) -> tuple[Call, list[Tensor]]:
        """Send a batch through; returns the outputs by slot."""
        pieces, samples = self.split(flat)
        options = {"type": "forward", "training": training, "grad": grad, "weights": [], "schedule": "gpipe"}
        call = self.open(pieces, samples, options)
        num_slots = len(self._outputs.slots)
        wanted = len(samples) * num_slots
        self.driver.wait_for(lambda: len(call.outputs) == wanted, "the outputs of a forward pass")
        pieces_of = [[call.outputs[(i, slot)] for i in range(len(samples))] for slot in range(num_slots)]
        call.sizes = [[len(piece) for piece in pieces] for pieces in pieces_of]
        outputs = [torch.cat(pieces) for pieces in pieces_of]
        call.outputs.clear()
        if not grad:
            self._open.remove(call)
            self.driver.forget(call)
        return call, outputs

    def run_backward(self, call: Call, gradients: Sequence[Tensor | None], retain: bool) -> dict[int, Tensor]:
        """Send the outputs' gradients through the stages; returns those of the inputs that want one, by slot."""
        if call.step != self.step_index or call not in self._open:
            raise JobError(
                "backward through a forward from before the last step() or zero_grad(): its activations are gone, run "
                "the forward again"
            )
        if call.freed:
            raise JobError("a second backward through the same forward: pass retain_graph=True to the first")
        backward_pass, call.num_backwards, call.freed = call.num_backwards, call.num_backwards + 1, not retain
        self.dirty = True
        place = {"step": call.step, "call": call.index, "backward_pass": backward_pass}
        self.driver.tell_all("backward", {**place, "num_micro_batches": call.num_micro_batches, "retain": retain})
        last = self.driver.num_stages - 1
        for slot, gradient in enumerate(gradients):
            if gradient is None or not self._outputs.slots[slot].requires_grad:
                continue
            for micro_batch, piece in enumerate(torch.tensor_split(gradient, boundaries(call.sizes[slot]))):
                self.driver.send(
                    last, call, micro_batch, slot, piece, type="activation_gradient", backward_pass=backward_pass
                )
        slots = [index for index, slot in enumerate(self.traced.inputs.slots) if slot.requires_grad]
        wanted = {(backward_pass, i, slot) for i in range(call.num_micro_batches) for slot in slots}
        self.driver.wait_for(
            lambda: call.is_done("backward", backward_pass, last + 1) and call.input_gradients.keys() >= wanted,
            "a backward pass",
        )
        return {slot: self._join(slot, call, backward_pass) for slot in slots}

    def _join(self, slot: int, call: Call, backward_pass: int) -> Tensor:
        """The gradient of a whole input: its pieces one after the other, or their sum where each had all of it."""
        pieces = [call.input_gradients.pop((backward_pass, i, slot)) for i in range(call.num_micro_batches)]
        return torch.cat(pieces) if self.traced.binding.dynamic[slot] else sum(pieces[1:], pieces[0])

    def drop_when_gone(self, graph: object, call: Call) -> None:
        """`graph` lives as long as the user may go backwards through `call`.

        The garbage collector runs anywhere: all it does is to note the call, which `free_dropped` sees to.
        """
        weakref.finalize(graph, self._dropped.put, call).atexit = False

    def differentiable(self, slot: int) -> bool:
        """Whether a gradient can come for this output."""
        return self._outputs.slots[slot].requires_grad


class _Graph:
    """Held by the autograd node alone: gone with it."""


class _Pipeline(torch.autograd.Function):
    """The pipeline as one node of the user's autograd graph."""

    @staticmethod
    def forward(ctx: Any, calls: Calls, flat: list[Any], training: bool, anchor: Tensor, *wanting: Any) -> Any:
        grad = anchor.requires_grad
        call, outputs = calls.run_forward(flat, training, grad)
        if grad:
            ctx.calls, ctx.call, ctx.graph = calls, call, _Graph()
            calls.drop_when_gone(ctx.graph, call)
        ctx.slots = [slot for slot, value in enumerate(flat) if _wants_grad(value)]
        ctx.mark_non_differentiable(*[o for slot, o in enumerate(outputs) if not calls.differentiable(slot)])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        retain = torch._C._autograd._get_current_graph_task_keep_graph()
        found = ctx.calls.run_backward(ctx.call, gradients, retain)
        return (None, None, None, None, *[found[slot] for slot in ctx.slots])


def _wants_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
