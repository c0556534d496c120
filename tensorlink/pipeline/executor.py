"""Which action a stage runs next. Event-driven: of what is ready, what its schedule puts first.

The order that matters for bits is kept whatever arrives when: forwards run in (call, micro-batch) order because
buffers are state, backwards in the order in which the user asked for them, micro-batch by micro-batch, because
gradients are added up in that order; so are the weight gradients that backwards left for later. No torch here:
readiness is asked of the inbox.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from smartnodes_core.errors import ProtocolError
from tensorlink.pipeline.backward import ForwardPass
from tensorlink.pipeline.inbox import Delivery
from tensorlink.pipeline.orders import StageOrder, stage_order
from tensorlink.pipeline.schedule import GENERATORS

#: As many as a user may ask for (`model.py`); schedules are made in full.
MAX_MICRO_BATCHES = 1024
#: Stages times micro-batches of a schedule: making a longer one would keep a worker busy for seconds.
MAX_SCHEDULED = 1 << 15


#: What ran when: (kind, micro-batch, begin, end), in nanoseconds since 1970 by the clock of the machine it ran on.
Timeline = list[tuple[str, int, int, int]]


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
    order: StageOrder | None
    passes: dict[int, ForwardPass] = field(default_factory=dict)
    next_forward: int = 0
    held: int = 0
    timeline: Timeline = field(default_factory=list)

    @property
    def forward_done(self) -> bool:
        return self.next_forward == self.num_micro_batches

    def ran(self, ready: Ready, began_ns: int, ended_ns: int) -> None:
        """Notes when an action ran, by this machine's clock."""
        self.timeline.append((ready.kind, ready.micro_batch, began_ns, ended_ns))

    def take_timeline(self) -> Timeline:
        """What ran since this was asked last."""
        taken, self.timeline = self.timeline, []
        return taken

    @property
    def max_held(self) -> int:
        """How many forwards may wait for the end of their backward."""
        return self.num_micro_batches if self.order is None else self.order.held

    @property
    def max_deferred(self) -> int:
        """How many backwards may wait for their weight gradients."""
        return 1 if self.order is None else self.order.deferred


@dataclass
class BackwardState:
    """One backward through a call."""

    call: CallState
    backward_pass: int
    retain: bool
    prepare: bool = False  # the stage says at its end what a prepare would ask
    next: int = 0
    finished: int = 0

    @property
    def walked(self) -> bool:
        """Every micro-batch's input gradients are computed."""
        return self.next == self.call.num_micro_batches

    @property
    def done(self) -> bool:
        """Every micro-batch's gradients are in the sum."""
        return self.finished == self.call.num_micro_batches


@dataclass(frozen=True)
class Ready:
    """An action that can run now; the one with the least `rank` among a worker's stages is to run."""

    call: CallState
    micro_batch: int
    kind: Literal["F", "B", "W"]
    rank: tuple[int, ...]
    backward: BackwardState | None = None


Has = Callable[[str, Delivery], bool]


class Executor:
    """The calls of one stage. `has(kind, delivery)` tells whether the stage's inbox holds all slots of a delivery."""

    def __init__(self, stage: int, num_stages: int, has: Has) -> None:
        self._stage, self._num_stages, self._has = stage, num_stages, has
        self.calls: dict[tuple[int, int], CallState] = {}
        self.backwards: list[BackwardState] = []
        self.deferred: deque[tuple[BackwardState, int]] = deque()  # micro-batches whose weight gradients wait

    def begin(self, params: dict[str, Any]) -> CallState:
        """A call was announced. Raises ProtocolError for one that is malformed or announced twice."""
        call = self._parse(params)
        place = (call.step, call.call)
        old = self.calls.get(place)
        if old is not None and (old.grad or not old.forward_done):
            raise ProtocolError(f"call {call.call} of step {call.step} is under way and was announced again")
        self.calls[place] = call
        if call.type == "train_step":
            self.backwards.append(BackwardState(call, 0, retain=False, prepare=bool(params.get("prepare", False))))
        return call

    def begin_backward(self, params: dict[str, Any]) -> BackwardState:
        """A backward was asked for. Raises ProtocolError where there is no graph to go through."""
        call = self.calls.get((params["step"], params["call"]))
        if call is None or not call.grad or call.type != "forward":
            raise ProtocolError(
                f"backward through call {params['call']!r:.20} of step {params['step']!r:.20}: no such graph"
            )
        retain, prepare = (bool(params.get(name, False)) for name in ("retain", "prepare"))
        backward = BackwardState(call, int(params["backward_pass"]), retain, prepare)
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
            self.deferred = deque((b, m) for b, m in self.deferred if b.call is not dropped)

    def next(self) -> Ready | None:
        """The action to run now, or None where everything waits for tensors."""
        found = [ready for ready in (self._backward(), self._forward(), self._weight()) if ready is not None]
        return min(found, key=lambda ready: ready.rank, default=None)

    def _backward(self) -> Ready | None:
        state = next((b for b in self.backwards if not b.walked), None)
        if state is None or state.next >= state.call.next_forward:
            return None
        call, m = state.call, state.next
        if len(self.deferred) >= call.max_deferred:
            return None
        ends_here = call.type == "train_step" and self._stage == self._num_stages - 1
        delivery = Delivery(call.step, call.call, m, "activation_gradient", state.backward_pass)
        if not ends_here and not self._has("gradients", delivery):
            return None
        return Ready(call, m, "B", self._rank(call, "B", m), state)

    def _forward(self) -> Ready | None:
        call = next((c for c in self.calls.values() if not c.forward_done), None)
        if call is None or call.held >= call.max_held:
            return None
        m = call.next_forward
        delivery = Delivery(call.step, call.call, m, "activation", 0)
        if not self._has("inputs", delivery):
            return None
        ends_here = call.type == "train_step" and self._stage == self._num_stages - 1
        if ends_here and not self._has("targets", delivery._replace(type="target")):
            return None
        return Ready(call, m, "F", self._rank(call, "F", m))

    def _weight(self) -> Ready | None:
        if not self.deferred:
            return None
        state, m = self.deferred[0]
        return Ready(state.call, m, "W", self._rank(state.call, "W", m), state)

    def _rank(self, call: CallState, kind: Literal["F", "B", "W"], micro_batch: int) -> tuple[int, ...]:
        """By the schedule; in the drop-in loop backwards first, weight gradients last, later stages before earlier
        ones."""
        if call.order is None:
            return ("BFW".index(kind), -self._stage)
        ranks = {"F": call.order.forward, "B": call.order.backward, "W": call.order.weight}[kind]
        return (0, ranks[micro_batch])

    def _parse(self, params: dict[str, Any]) -> CallState:
        num, kind, schedule = params["num_micro_batches"], params["type"], params.get("schedule", "gpipe")
        if type(num) is not int or not 0 < num <= MAX_MICRO_BATCHES:
            raise ProtocolError(f"{num!r:.20} micro-batches: 1 to {MAX_MICRO_BATCHES} are run")
        if kind not in ("forward", "train_step") or schedule not in GENERATORS:
            raise ProtocolError(
                f"a call of type {kind!r:.20} with schedule {schedule!r:.20}: known are {sorted(GENERATORS)}"
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
            order=self._order(schedule, params, num) if kind == "train_step" else None,
        )

    def _order(self, schedule: str, params: dict[str, Any], num_micro_batches: int) -> StageOrder:
        num_workers = params.get("num_workers", self._num_stages)
        if type(num_workers) is not int or not 0 < num_workers <= self._num_stages:
            raise ProtocolError(f"{num_workers!r:.20} workers for {self._num_stages} stages")
        if self._num_stages * num_micro_batches > MAX_SCHEDULED:
            raise ProtocolError(
                f"{num_micro_batches} micro-batches through {self._num_stages} stages: a training step takes at most "
                f"{MAX_SCHEDULED // self._num_stages}"
            )
        return stage_order(schedule, num_workers, self._num_stages, self._stage, num_micro_batches)
