"""What crosses between the user's machine and the workers, one micro-batch at a time, private layers on the way.

Neighbours: `calls.py` and `train_step.py` say when, `pipeline/driver.py` moves, `private.py` computes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tensorlink.audit.commitments import input_root
from tensorlink.ordered_data import Place, step_root
from tensorlink.pipeline.driver import Call
from tensorlink.placement import Placement


class Crossing:
    """Both directions at both ends. `input_roots` and `target_roots` are the roots of what was sent to the first stage
    and, as targets, to the last since the last step.
    """

    def __init__(self, placement: Placement):
        self._driver, self._private = placement.driver, placement.private
        self.input_roots: dict[Place, bytes] = {}
        self.target_roots: dict[Place, bytes] = {}
        first, last = placement.programs[0].inputs.slots, placement.programs[-1].outputs.slots
        self._outputs = range(len(last))  # slots that come from the last stage
        self._gradients = [at for at, slot in enumerate(last) if slot.requires_grad]  # that the last stage waits for
        self._input_gradients = [at for at, slot in enumerate(first) if slot.requires_grad]  # that the first sends

    def send_inputs(self, call: Call, micro_batch: int, piece: Sequence[Any]) -> None:
        """Send a micro-batch to the first stage."""
        inputs = self._private.forward_head(call, micro_batch, piece)
        tensors = {slot: x.detach() if isinstance(x, Tensor) else torch.tensor(x) for slot, x in enumerate(inputs)}
        for slot, tensor in tensors.items():
            self._driver.send(0, call, micro_batch, slot, tensor, type="activation")
        self.input_roots[Place(call.index, micro_batch)] = input_root(tensors)

    def send_targets(self, call: Call, micro_batch: int, targets: Sequence[Tensor]) -> None:
        """Send a micro-batch's targets to the last stage."""
        for slot, tensor in enumerate(targets):
            self._driver.send(self._driver.num_stages - 1, call, micro_batch, slot, tensor, type="target")
        if targets:
            self.target_roots[Place(call.index, micro_batch)] = input_root(dict(enumerate(targets)))

    def roots(self, calls: Container[int]) -> tuple[bytes, bytes]:
        """What an order binds of the data of these calls: the root of inputs, and that of targets."""
        inputs, targets = (
            step_root({place: root for place, root in roots.items() if place.call in calls})
            for roots in (self.input_roots, self.target_roots)
        )
        return inputs, targets

    def forget_roots(self) -> None:
        """The step is over."""
        self.input_roots.clear()
        self.target_roots.clear()

    def has_outputs(self, call: Call, micro_batch: int) -> bool:
        """Whether everything has come from the last stage."""
        return all((micro_batch, slot) in call.outputs for slot in self._outputs)

    def take_outputs(self, call: Call, micro_batch: int) -> list[Tensor]:
        """The model's outputs, by slot."""
        return self._private.forward_tail(call, micro_batch, self.take_arrived(call, micro_batch))

    def take_arrived(self, call: Call, micro_batch: int) -> list[Tensor]:
        """What has come from the last stage, by slot."""
        return [call.outputs.pop((micro_batch, slot)) for slot in self._outputs]

    def send_gradients(
        self, call: Call, micro_batch: int, backward_pass: int, gradients: Mapping[int, Tensor], retain: bool
    ) -> None:
        """Send the gradients of a micro-batch's outputs (or of its loss in private layers) to the last stage."""
        found = self._private.backward_tail(call, micro_batch, gradients, retain)
        last = self._driver.num_stages - 1
        for slot in self._gradients:
            place: dict[str, Any] = {"type": "activation_gradient", "backward_pass": backward_pass}
            self._driver.send(last, call, micro_batch, slot, found[slot], **place)

    def has_input_gradients(self, call: Call, micro_batch: int, backward_pass: int) -> bool:
        """Whether the first stage has sent back every gradient."""
        return all((backward_pass, micro_batch, slot) in call.input_gradients for slot in self._input_gradients)

    def take_input_gradients(self, call: Call, micro_batch: int, backward_pass: int, retain: bool) -> dict[int, Tensor]:
        """The gradients of the model's inputs, by slot."""
        arrived = {slot: call.input_gradients.pop((backward_pass, micro_batch, slot)) for slot in self._input_gradients}
        return self._private.backward_head(call, micro_batch, arrived, retain)
