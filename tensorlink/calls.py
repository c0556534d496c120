"""Forwards and backwards through the pipeline, as one node of the user's autograd graph.

`forward` cuts a batch into micro-batches, sends them to the first stage and joins what comes from the last;
`loss.backward()` enters `_Pipeline.backward`, which sends gradients the other way. Neighbours: `crossing.py` sends and
takes a micro-batch, `pipeline/driver.py` moves and waits, `steps.py` closes what is counted here.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smartnodes_core.errors import JobError
from tensorlink.crossing import Crossing
from tensorlink.lanes import Lane, at_once, run_lanes
from tensorlink.pipeline.batching import check_finite, divided, flat_inputs, joined, micro_batches
from tensorlink.pipeline.driver import Call
from tensorlink.placement import Placement
from tensorlink.program.inputs import unflatten_outputs


class Calls:
    """All calls of the open step.

    `step_index` counts committed steps, `num_calls` forwards since the last one (evaluation too): an index is never
    used twice, so that a late tensor is never taken for another's.
    """

    def __init__(self, placement: Placement, num_micro_batches: int):
        self.driver, self.traced = placement.driver, placement.traced
        self.crossing = Crossing(placement)
        self._private = placement.private
        self.step_index = 0
        self.num_calls = 0
        self.dirty = False  # gradients were sent to stages since the last step
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

    def open(self, samples: list[int], options: dict[str, Any]) -> Call:
        """Announce a call to every stage."""
        self.free_dropped()
        call = Call(self.step_index, self.num_calls, samples, training=options["training"], grad=options["grad"])
        self.num_calls += 1
        self._open.append(call)
        self.driver.begin(call, options)
        return call

    def begin_backward(self, call: Call, retain: bool, prepare: bool = False) -> int:
        """Announce a backward to every stage; returns the number of the pass. With `prepare` a step follows it, and
        stages say with its end what a prepare would ask.
        """
        backward_pass, call.num_backwards, call.freed = call.num_backwards, call.num_backwards + 1, not retain
        self.dirty = True
        place = {"step": call.step, "call": call.index, "backward_pass": backward_pass}
        options = {"num_micro_batches": call.num_micro_batches, "retain": retain, "prepare": prepare}
        self.driver.tell_all("backward", {**place, **options})
        return backward_pass

    def data_roots(self) -> tuple[bytes, bytes]:
        """The roots of inputs and targets of what goes into the open step: calls that went backwards."""
        return self.crossing.roots({call.index for call in self._open if call.num_backwards})

    def end(self, committed: bool) -> None:
        """The step was committed on every stage, or its gradients were dropped."""
        for call in self._open:
            self._forget(call)
        self._open.clear()
        self.dirty = False
        if committed:
            self.step_index += 1
            self.num_calls = 0
            self.crossing.forget_roots()

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
                self._private.forget(call)
                call.freed = True

    def _forget(self, call: Call) -> None:
        """Nothing goes backwards through this call any more."""
        self.driver.forget(call)
        self._private.forget(call)
        call.freed = True

    # -- for autograd -------------------------------------------------------------------------------------------------

    def run_forward(self, flat: list[Any], training: bool, grad: bool) -> tuple[Call, list[Tensor]]:
        """Send a batch through; returns the outputs by slot."""
        pieces, samples = self.split(flat)
        options = {"type": "forward", "training": training, "grad": grad, "weights": [], "schedule": "gpipe"}
        call = self.open(samples, options)
        crossing = self.crossing
        found: list[list[Tensor]] = []
        lanes = [
            Lane(lambda m: crossing.has_outputs(call, m), lambda m: found.append(crossing.take_outputs(call, m))),
            Lane(at_once, lambda m: crossing.send_inputs(call, m, pieces[m])),
        ]
        run_lanes(self.driver, call.num_micro_batches, lanes, "the outputs of a forward pass")
        by_slot = list(zip(*found, strict=True))
        call.shapes = [[piece.shape for piece in pieces] for pieces in by_slot]
        if not grad:
            self._open.remove(call)
            self.driver.forget(call)
        slots = self.traced.outputs.slots
        return call, [joined(slot, pieces, samples) for slot, pieces in zip(slots, by_slot, strict=True)]

    def run_backward(self, call: Call, gradients: Sequence[Tensor | None], retain: bool) -> dict[int, Tensor]:
        """Send the outputs' gradients through the stages; returns those of the inputs that want one, by slot."""
        if call.step != self.step_index or call not in self._open:
            raise JobError(
                "backward through a forward from before the last step() or zero_grad(): its activations are gone, run "
                "the forward again"
            )
        if call.freed:
            raise JobError("a second backward through the same forward: pass retain_graph=True to the first")
        backward_pass = self.begin_backward(call, retain)
        slots = self.traced.outputs.slots
        split = {
            slot: divided(slots[slot], gradient, call.shapes[slot], call.samples)
            for slot, gradient in enumerate(gradients)
            if gradient is not None and self.differentiable(slot)
        }
        found: list[dict[int, Tensor]] = []

        def send(micro_batch: int) -> None:
            pieces = {slot: pieces[micro_batch] for slot, pieces in split.items()}
            self.crossing.send_gradients(call, micro_batch, backward_pass, pieces, retain)

        def may_take(micro_batch: int) -> bool:
            return micro_batch < sending.next and self.crossing.has_input_gradients(call, micro_batch, backward_pass)

        def take(micro_batch: int) -> None:
            found.append(self.crossing.take_input_gradients(call, micro_batch, backward_pass, retain))

        sending = Lane(at_once, send)
        lanes = [Lane(may_take, take), sending]
        run_lanes(self.driver, call.num_micro_batches, lanes, "a backward pass")
        num_stages = self.driver.num_stages
        self.driver.wait_for(lambda: call.is_done("backward", backward_pass, num_stages), "a backward pass")
        wanted = [index for index, slot in enumerate(self.traced.inputs.slots) if slot.requires_grad]
        return {slot: self._join(slot, [pieces[slot] for pieces in found]) for slot in wanted}

    def _join(self, slot: int, pieces: list[Tensor]) -> Tensor:
        """The gradient of a whole input: its pieces one after the other, or their sum where each had all of it."""
        return torch.cat(pieces) if self.traced.binding.dynamic[slot] else sum(pieces[1:], pieces[0])

    def drop_when_gone(self, graph: object, call: Call) -> None:
        """`graph` lives as long as the user may go backwards through `call`.

        The garbage collector runs anywhere: all it does is to note the call, which `free_dropped` sees to.
        """
        weakref.finalize(graph, self._dropped.put, call).atexit = False

    def differentiable(self, slot: int) -> bool:
        """Whether a gradient can come for this output."""
        return self.traced.outputs.slots[slot].requires_grad


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
