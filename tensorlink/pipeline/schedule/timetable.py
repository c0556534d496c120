"""When everything ran, simulated or recorded: makespan, who was busy, and a grid of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tensorlink.pipeline.schedule.actions import Action, Kind


@dataclass(frozen=True, slots=True)
class Run:
    """One action from `start` to `end`."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timetable:
    """What ran when, in any order; `placement[stage]` is the worker of a stage. Times in one unit of any kind."""

    runs: tuple[Run, ...]
    placement: tuple[int, ...]

    @classmethod
    def recorded(
        cls, records: Iterable[tuple[int, Kind, int, float, float]], placement: Sequence[int] | None = None
    ) -> Timetable:
        """Of what really happened: (stage, kind, micro-batch, start, end), times in seconds on one clock, counted here
        from the first start. Without a `placement` every stage has a worker of its own.
        """
        found = [Run(Action(stage, kind, micro_batch), start, end) for stage, kind, micro_batch, start, end in records]
        first = min((run.start for run in found), default=0.0)
        if placement is None:
            placement = range(1 + max((run.action.stage for run in found), default=-1))
        return cls(tuple(Run(run.action, run.start - first, run.end - first) for run in found), tuple(placement))

    @property
    def num_workers(self) -> int:
        return 1 + max(self.placement, default=-1)

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max((run.end for run in self.runs), default=0.0) - min((run.start for run in self.runs), default=0.0)

    @property
    def busy(self) -> list[float]:
        """Share of the makespan in which each worker computes."""
        used = [0.0] * self.num_workers
        for run in self.runs:
            used[self.placement[run.action.stage]] += run.end - run.start
        return [time / self.makespan if self.makespan else 0.0 for time in used]

    @property
    def bubble(self) -> float:
        """Share of all workers' time in which nothing is computed."""
        return 1 - sum(self.busy) / self.num_workers if self.num_workers else 0.0

    def __str__(self) -> str:
        """A grid: a row per worker, a column per moment at which something starts."""
        moments = sorted({run.start for run in self.runs})
        width = max((len(str(run.action)) for run in self.runs), default=0) + 1
        rows = []
        for worker in range(self.num_workers):
            at = {run.start: str(run.action) for run in self.runs if self.placement[run.action.stage] == worker}
            rows.append("".join(at.get(moment, ".").ljust(width) for moment in moments).rstrip())
        return "\n".join(rows)
