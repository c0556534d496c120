"""Which action a stage runs next. Event-driven: whatever is ready, backwards before forwards.

The order that matters for bits is kept whatever arrives when: forwards run in (call, micro-batch) order because
buffers are state, backwards in the order in which the user asked for them, micro-batch by micro-batch, because
gradients are added up in that order. No torch here: readiness is asked of the inbox.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from smartnodes_core.errors import ProtocolError
from tensorlink.pipeline.backward import ForwardPass
from tensorlink.pipeline.inbox import Delivery
from tensorlink.pipeline.schedule import RUNNABLE, generate, max_in_flight

#: As many as a user may ask for (`model.py`); schedules are made in full.
MAX_MICRO_BATCHES = 1024


@dataclass
class CallState:
    """One forward through the pipeline: what was announced, and how far this stage is."""

    step: int
    call: int
    num_micro_batches: int
    training: bool
    grad: bool
    type: str
    weights: list[float]
    cap: int
    passes: dict[int, ForwardPass] = field(default_factory=dict)
    next_forward: int = 0
    held: int = 0
    busy_s: float = 0.0

    @property
    def forward_done(self) -> bool:
        return self.next_forward == self.num_micro_batches


@dataclass
class BackwardState:
    """One backward through a call."""

    call: CallState
    backward_pass: int
    retain: bool
    next: int = 0
    busy_s: float = 0.0

    @property
    def done(self) -> bool:
        return self.next == self.call.num_micro_batches


@dataclass(frozen=True)
class Ready:
    """An action to run now: a forward where `backward` is None."""

    call: CallState
    micro_batch: int
    backward: BackwardState | None = None


Has = Callable[[str, Delivery], bool]


class Executor:
    """The calls of one stage. `has(kind, delivery)` tells whether the stage's inbox holds all slots of a delivery."""

    def __init__(self, stage: int, num_stages: int, has: Has) -> None:
        self._stage, self._num_stages, self._has = stage, num_stages, has
        self.calls: dict[tuple[int, int], CallState] = {}
        self.backwards: list[BackwardState] = []

    def begin(self, params: dict[str, Any]) -> CallState:
        """A call was announced. Raises ProtocolError for one that is malformed or announced twice."""
        call = self._parse(params)
        place = (call.step, call.call)
        old = self.calls.get(place)
        if old is not None and (old.grad or not old.forward_done):
            raise ProtocolError(f"call {call.call} of step {call.step} is under way and was announced again")
        self.calls[place] = call
        if call.type == "train_step":
            self.backwards.append(BackwardState(call, 0, retain=False))
        return call

    def begin_backward(self, params: dict[str, Any]) -> BackwardState:
        """A backward was asked for. Raises ProtocolError where there is no graph to go through."""
        call = self.calls.get((params["step"], params["call"]))
        if call is None or not call.grad or call.type != "forward":
            raise ProtocolError(
                f"backward through call {params['call']!r:.20} of step {params['step']!r:.20}: no such graph"
            )
        backward = BackwardState(call, int(params["backward_pass"]), bool(params.get("retain", False)))
        if any(b.call is call and b.backward_pass == backward.backward_pass for b in self.backwards):
            raise ProtocolError(f"backward pass {backward.backward_pass} of call {call.call} was asked for twice")
        self.backwards.append(backward)
        return backward

    def drop(self, step: int, call: int | None = None) -> None:
        """Forgets a call, or all calls up to `step`, and frees what they held."""
        gone = [place for place in self.calls if (place[0] <= step if call is None else place == (step, call))]
        for place in gone:
            dropped = self.calls.pop(place)
            for passed in dropped.passes.values():
                passed.free()
            self.backwards = [b for b in self.backwards if b.call is not dropped]

    def next(self) -> Ready | None:
        """The action to run now, or None where everything waits for tensors."""
        backward = next((b for b in self.backwards if not b.done), None)
        if backward is not None and backward.next < backward.call.next_forward:
            call = backward.call
            delivery = Delivery(call.step, call.call, backward.next, "activation_gradient", backward.backward_pass)
            ends_here = call.type == "train_step" and self._stage == self._num_stages - 1
            if ends_here or self._has("gradients", delivery):
                return Ready(call, backward.next, backward)
        call_or_none = next((c for c in self.calls.values() if not c.forward_done), None)
        if call_or_none is not None and call_or_none.held < call_or_none.cap:
            return self._forward(call_or_none)
        return None

    def _forward(self, call: CallState) -> Ready | None:
        delivery = Delivery(call.step, call.call, call.next_forward, "activation", 0)
        if not self._has("inputs", delivery):
            return None
        ends_here = call.type == "train_step" and self._stage == self._num_stages - 1
        if ends_here and not self._has("targets", delivery._replace(type="target")):
            return None
        return Ready(call, call.next_forward)

    def _parse(self, params: dict[str, Any]) -> CallState:
        num, kind, schedule = params["num_micro_batches"], params["type"], params.get("schedule", "gpipe")
        if type(num) is not int or not 0 < num <= MAX_MICRO_BATCHES:
            raise ProtocolError(f"{num!r:.20} micro-batches: 1 to {MAX_MICRO_BATCHES} are run")
        if kind not in ("forward", "train_step") or schedule not in RUNNABLE:
            raise ProtocolError(
                f"a call of type {kind!r:.20} with schedule {schedule!r:.20}: known are {sorted(RUNNABLE)}"
            )
        weights = [float.fromhex(weight) for weight in params.get("weights", [])]
        if kind == "train_step" and len(weights) != num:
            raise ProtocolError(f"{len(weights)} loss weights for {num} micro-batches")
        if any(type(params[name]) is not int or params[name] < 0 for name in ("step", "call")):
            raise ProtocolError("step and call are counted from 0")
        return CallState(
            step=params["step"],
            call=params["call"],
            num_micro_batches=num,
            training=bool(params["training"]),
            grad=bool(params["grad"]) or kind == "train_step",
            type=kind,
            weights=weights,
            cap=self._cap(kind, schedule, num),
        )

    def _cap(self, kind: str, schedule: str, num_micro_batches: int) -> int:
        if kind == "forward":
            return num_micro_batches
        return max_in_flight(generate(schedule, self._num_stages, num_micro_batches).of_stage(self._stage))
