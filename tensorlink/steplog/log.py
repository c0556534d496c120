"""What crossed a stage's links, per step and unit, and the states from which steps follow: one log for audit and
recovery.

The state is kept and committed to where an interval of steps begins and where it ends; the steps between follow from
it and their gradients (`audit/interval.py`). Bounded: intervals outside the window are dropped, and tensors that still
lie in the node's shared memory move to this process's own once they hold more than their share of it. Digests are
computed by a thread of the stage's; the log keeps the futures. Neighbours: `pipeline/stage.py` writes it,
`audit/commitments.py` hashes it, `audit/opening.py` reads it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tensorlink.steplog.shelf import Shelf, Shelved, given_back, onto
from tensorlink.steplog.snapshots import Snapshot

Digests = dict[str, dict[str, bytes]]


@dataclass
class ForwardRecord:
    """One micro-batch forward: what came in, what went out, the buffers it began with. `x`, `y` by slot index as
    text."""

    call: int
    micro_batch: int
    training: bool
    type: str
    x: dict[str, Tensor]
    y: dict[str, Tensor]
    buffers: Mapping[str, Tensor]
    target: dict[str, Tensor] = field(default_factory=dict)
    loss: dict[str, Tensor] = field(default_factory=dict)
    loss_weight: float | None = None
    digests: Future[Digests] | None = None


@dataclass
class UnitRecord:
    """One backward through a forward (`backward_pass` -1: the forward alone)."""

    forward: ForwardRecord
    backward_pass: int
    gy: dict[str, Tensor] = field(default_factory=dict)
    gx: dict[str, Tensor] = field(default_factory=dict)
    digests: Future[Digests] | None = None


@dataclass
class StepRecord:
    """One step of a stage. `committed` and what follows are set when the step commits."""

    step: int
    forwards: dict[tuple[int, int], ForwardRecord] = field(default_factory=dict)
    units: list[UnitRecord] = field(default_factory=list)
    committed: bool = False
    before: Snapshot | None = None  # only where an interval begins
    ends_interval: bool = False
    after: Snapshot | None = None  # only where an interval ends and the state then changed other than by the next step
    buffers_before: dict[str, Tensor] = field(default_factory=dict)
    buffers_after: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    sent_sums: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # of tied parameters, by receiving stage
    received_sums: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by sending stage
    squared_norm: float = 0.0
    clip_coefficient: float = 1.0
    order: bytes = b""
    options: list[dict[str, Any]] = field(default_factory=list)
    dropped: bool = False  # nothing of it goes on the shelf any more

    def mapped(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> StepRecord:
        """The same with every map of tensors changed, but for those of buffers: they are shared with the stage."""
        forwards = {
            place: replace(one, x=change(one.x), y=change(one.y), target=change(one.target), loss=change(one.loss))
            for place, one in self.forwards.items()
        }
        units = [
            replace(
                unit,
                forward=forwards[(unit.forward.call, unit.forward.micro_batch)],
                gy=change(unit.gy),
                gx=change(unit.gx),
            )
            for unit in self.units
        ]
        before = self.before and self.before.mapped(change)
        after = self.after and self.after.mapped(change)
        return replace(self, forwards=forwards, units=units, before=before, after=after, gradient=change(self.gradient))

    def all_units(self) -> list[UnitRecord]:
        """Units as they are committed: backwards in the order of their addition, then forwards that had none."""
        used = {(unit.forward.call, unit.forward.micro_batch) for unit in self.units}
        alone = [UnitRecord(self.forwards[place], -1) for place in sorted(self.forwards) if place not in used]
        return [*self.units, *alone]


class StepLog:
    """The open step and the last `window_steps` committed ones, with the rest of their intervals: the newest in memory,
    older ones on the shelf where there is one.
    """

    def __init__(self, window_steps: int, shared_bytes: int, shelf: Shelf | None = None) -> None:
        """`shared_bytes`: how much of the node's shared memory the log may keep before it copies."""
        self._window_steps = max(1, window_steps)
        self._shared_bytes = shared_bytes
        self._held_bytes = 0
        self._committed: OrderedDict[int, StepRecord] = OrderedDict()
        self._shelf = shelf
        self._shelved: set[int] = set()
        self._spare: Snapshot | None = None
        self._lock = threading.Lock()
        self.open = StepRecord(0)

    def begin(self, step: int) -> None:
        """Drops what the open step gathered and opens `step`."""
        self._drop(self.open)
        self._open(step)

    def _open(self, step: int) -> None:
        self.open = StepRecord(step)
        self._count()

    def put_away(self, record: StepRecord, groups: Iterable[dict[str, Any]]) -> None:
        """Tensors of an open step's record that are hashed, by slot: they leave memory where there is a shelf.

        Any thread may call it. Among activations, which come and go, what stays would besides keep the memory between
        from being used again.
        """
        if self._shelf is None:
            return
        put = onto(self._shelf)
        for group in groups:
            shelved = put(dict(group))
            with self._lock:
                if not record.dropped:
                    group.update(shelved)
                    continue
            given_back()(shelved)

    def make_room(self, begins_interval: bool) -> Snapshot | None:
        """Drops the intervals that a further committed step pushes out of the window, and shelves the newest step; a
        snapshot whose memory may be used again. Nobody may be reading committed steps meanwhile."""
        while self._committed:
            records = list(self._committed.values())
            starts = [at for at, record in enumerate(records) if record.before is not None]
            end = starts[1] if len(starts) > 1 else len(records)
            continues = end == len(records) and not begins_interval
            if continues or len(records) - end + 1 < self._window_steps:
                break
            for oldest in records[:end]:
                del self._committed[oldest.step]
                self._drop(oldest)
            if self._shelf is None and records[0].before is not None and not records[0].before.readers:
                self._spare = records[0].before
        last = self.last()
        if last is not None:
            self.shelve(last.step)
        spare, self._spare = self._spare, None
        return spare

    def put_gradient_away(self, record: StepRecord) -> dict[str, Tensor]:
        """The gradient of a committed step is hashed: it leaves memory where there is a shelf. Returns what it stood in
        and does no more. As `put_away`."""
        gradient = dict(record.gradient)
        self.put_away(record, [record.gradient])
        exchanged = [*record.sent_sums.values(), *record.received_sums.values()]  # these stay, and may be the total
        kept = {tensor.data_ptr() for sums in exchanged for tensor in sums.values()}
        return {
            name: tensor
            for name, tensor in gradient.items()
            if isinstance(record.gradient[name], Shelved)
            and isinstance(tensor, Tensor)
            and tensor.data_ptr() not in kept
        }

    def shelve(self, step: int) -> None:
        """Puts what is left of a committed step on the shelf, if there is one.

        It may run beside the next step's work, but for what reads or drops committed steps.
        """
        record = self._committed.get(step)
        if self._shelf is not None and record is not None:
            self._committed[step] = record.mapped(onto(self._shelf))
            self._shelved.add(step)

    def copy(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> Snapshot | None:
        """A state on the shelf, without its buffers; None where there is no shelf or it is full."""
        if self._shelf is None:
            return None
        copy = Snapshot(dict(weights), {}, dict(optimizer)).mapped(onto(self._shelf))
        if copy.is_all(Shelved):
            return copy
        self.give_up(copy)
        return None

    def give_up(self, copy: Snapshot) -> None:
        """The shelf's room for a copy is free again."""
        copy.mapped(given_back())

    def close(self) -> None:
        """Drops all steps."""
        self.begin(self.open.step)
        while self._committed:
            self._drop(self._committed.popitem()[1])

    def _drop(self, record: StepRecord) -> None:
        with self._lock:
            record.dropped = True
        self._shelved.discard(record.step)
        record.mapped(given_back())

    def commit(self, next_step: int) -> StepRecord:
        """Closes the open step, keeps it, and opens the next."""
        record = self.open
        record.committed = True
        self._committed[record.step] = record
        self._open(next_step)
        return record

    def committed(self, step: int) -> StepRecord | None:
        """A step within the window, or None; in the place of tensors that lie on the shelf it has `Shelved` ones."""
        return self._committed.get(step)

    def interval(self, step: int) -> list[StepRecord]:
        """A step within the window after those from which its state follows, as `committed` has them; empty where it is
        not held."""
        found: list[StepRecord] = []
        for record in self._committed.values():
            found = [record] if record.before is not None else [*found, record]
            if record.step == step:
                return found
        return []

    def last(self) -> StepRecord | None:
        """The newest committed step, or None."""
        return next(reversed(self._committed.values()), None)

    def state_after(self, step: int) -> Snapshot | None:
        """The state that the next committed step began with, as `committed` has it, or None where there is no later
        one. Of a step that ends its interval."""
        later = next((number for number in self._committed if number > step), None)
        return None if later is None else self._committed[later].before

    def steps(self) -> list[int]:
        """The committed steps held, oldest first."""
        return list(self._committed)

    def settle(self, unit: UnitRecord) -> None:
        """A unit is computed: leaves its tensors where they are, or copies them out of shared memory when that runs
        short."""
        groups = (unit.forward.x, unit.forward.target, unit.gy)
        with self._lock:
            self._held_bytes += sum(_held(tensor) for group in groups for tensor in group.values())
            if self._held_bytes > self._shared_bytes:
                for group in groups:
                    group.update({name: tensor.clone() for name, tensor in group.items() if _held(tensor)})

    def _count(self) -> None:
        self._held_bytes = sum(
            _held(tensor)
            for step, record in list(self._committed.items())
            if step not in self._shelved
            for unit in record.units
            for group in (unit.forward.x, unit.forward.target, unit.gy)
            for tensor in group.values()
        )


def _held(tensor: Tensor | Shelved) -> int:
    """The bytes that a tensor of the log takes in memory."""
    return 0 if isinstance(tensor, Shelved) else tensor.numel() * tensor.element_size()
