"""A stage's way out of the computing process: results as events, tensors through the outbound arena."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smartnodes_core.sandbox_child import ChildChannel
from tensorlink.pipeline.backward import Norm
from tensorlink.pipeline.executor import CallState, Timeline
from tensorlink.pipeline.headers import SHARED
from tensorlink.pipeline.inbox import Delivery
from tensorlink.pipeline.tied import SumId
from tensorlink.program.values import DTYPE_NAMES

if TYPE_CHECKING:
    from tensorlink.pipeline.stage import Stage

#: How long a stage waits for the node to have sent what fills the arena: the pace of the slowest link.
SEND_TIMEOUT_S = 120.0
#: What ran when is told in a frame's header, which is small: a longer list is not told.
MAX_TIMELINE = 1024


class ChannelPort:
    """A `pipeline.stage.Port` over the pipe; `neighbour("next")` or `neighbour(2)` gives a stage that is in this
    process, which then takes tensors as they are.
    """

    def __init__(
        self, channel: ChildChannel, key: str, stage: int, neighbour: Callable[[str | int], Stage | None]
    ) -> None:
        self._channel = channel
        self._key, self._stage = key, stage
        self._neighbour = neighbour

    def send(self, to: str, delivery: Delivery, slot: int, tensor: Tensor) -> None:
        """Copies the tensor, contiguous, into the arena and names it to the node."""
        here = self._neighbour(to)
        if here is not None:
            here.receive(delivery, slot, tensor.detach().contiguous())
        else:
            self._send(to, {**delivery._asdict(), "slot": slot}, tensor)

    def share(self, to: int, id: SumId, slot: int, tensor: Tensor) -> None:
        """See `Port`."""
        here = self._neighbour(to)
        if here is not None:
            here.receive_sum(id, self._stage, slot, tensor.detach().contiguous())
        else:
            self._send(to, {**id._asdict(), "type": SHARED, "from_stage": self._stage, "slot": slot}, tensor)

    def _send(self, to: str | int, place: dict[str, Any], tensor: Tensor) -> None:
        piece = put_tensor(self._channel, tensor, SEND_TIMEOUT_S)
        described = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        self._channel.event("send", {"key": self._key, "to": to, **place, **described, **piece})

    def loss(self, call: CallState, micro_batch: int, value: float) -> None:
        """See `Port`."""
        place = {"key": self._key, "step": call.step, "call": call.call, "micro_batch": micro_batch}
        self._channel.event("loss", {**place, "value": value.hex()}, hold=True)

    def done(
        self, call: CallState, type: str, backward_pass: int, timeline: Timeline, prepared: Norm | None = None
    ) -> None:
        """See `Port`."""
        place = {"key": self._key, "step": call.step, "call": call.call, "backward_pass": backward_pass}
        busy_s = sum(ended - began for _, _, began, ended in timeline) / 1e9
        told = timeline if len(timeline) <= MAX_TIMELINE else []
        norm = {} if prepared is None else {"squared_norm": prepared[0].hex(), "non_finite": prepared[1]}
        self._channel.event(
            "done", {**place, "type": type, "busy_s": busy_s.hex(), "timeline": told, **norm}, hold=True
        )


def put_tensor(channel: ChildChannel, tensor: Tensor, timeout_s: float) -> dict[str, int]:
    """Copies a tensor's contiguous bytes into the outbound arena. Raises BusyError when the node does not free it in
    time."""
    num_bytes = tensor.numel() * tensor.element_size()
    piece = channel.outbound.allocate(num_bytes, timeout_s)
    if num_bytes:
        target = torch.frombuffer(piece.view, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)
        target.copy_(tensor.detach())
    return {"offset": piece.offset, "num_bytes": num_bytes}


def put(channel: ChildChannel, data: bytes, timeout_s: float) -> dict[str, Any]:
    """Copies bytes into the outbound arena."""
    piece = channel.outbound.allocate(len(data), timeout_s)
    piece.view[:] = data
    return {"offset": piece.offset, "num_bytes": len(data)}
