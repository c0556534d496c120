"""When snapshots are fetched, and how long they are kept.

A step with which an interval of state begins can be fetched when every stage has committed to it: its commitment binds
the state, and the rig keeps it for auditors anyway. Every so many steps one is, in the background; how many is chosen
so that fetching takes at most its share of the time, as measured. Neighbours: `snapshots.py`, `recovery.py`.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from smartnodes_core.errors import SmartnodesError
from smartnodes_core.records import Commitment, NodeKey
from tensorlink.pipeline.driver import Driver
from tensorlink.program.graph import StageProgram
from tensorlink.recovery.snapshots import Snapshot, committed_root, fetch

logger = logging.getLogger(__name__)

#: Fetching snapshots may take this share of the time of training.
MOST_SHARE = 0.02
#: Steps whose commitments are waited for at once, and private states that are held for them.
MAX_WAITING = 64
#: So many snapshots are kept at least: the older one serves when the newer is damaged.
LEAST_KEPT = 2
#: Where a run may have to go back because of a fraud, snapshots are kept for this time at least: that of a verdict.
VERDICT_S = 60.0
STOP_TIMEOUT_S = 5.0

Private = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


class SnapshotKeeper:
    """The snapshots of one job, in a temporary folder that ends with it.

    `keep_steps`: so many steps are gone back at most when a fraud is found; 0 where none is. `step_s` gives the time of
    a step as measured. `on_kept` hears of each snapshot with the oldest step that is held still.
    """

    def __init__(
        self,
        driver: Driver,
        programs: Sequence[StageProgram],
        keep_steps: int,
        step_s: Callable[[], float | None],
        on_kept: Callable[[int], None],
    ) -> None:
        self._driver, self._programs, self._keep_steps = driver, programs, keep_steps
        self._step_s, self._on_kept = step_s, on_kept
        self._folder = Path(tempfile.mkdtemp(prefix="tensorlink-snapshots-"))
        self._lock = threading.Condition()
        self._roots: OrderedDict[int, dict[int, bytes]] = OrderedDict()
        self._private: OrderedDict[int, Private] = OrderedDict()
        self._kept: list[Snapshot] = []
        self._plan_version, self._workers = 0, list[NodeKey]()
        self._due: int | None = None
        self._next_step = 0
        self._fetch_s = 0.0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Nothing is fetched any more; the files are removed."""
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- what is heard ------------------------------------------------------------------------------------------------

    def begin_plan(self, version: int, workers: Sequence[NodeKey]) -> None:
        """What is fetched from now on is of this plan."""
        with self._lock:
            self._plan_version, self._workers = version, list(workers)
            self._roots.clear()
            self._due = None

    def hold_private(self, step: int, private: Callable[[], Private]) -> None:
        """The layers that stay here are about to take this step: should it be fetched, their state belongs to it."""
        with self._lock:
            if step >= self._next_step:
                self._private[step] = private()
                while len(self._private) > MAX_WAITING:
                    self._private.popitem(last=False)

    def committed(self, commitment: Commitment) -> None:
        """A stage has committed to a step. On a network's thread."""
        with self._lock:
            step = commitment.step
            if commitment.plan_version != self._plan_version or step < self._next_step or self._stopped:
                return
            if any(f"{part}_before" not in commitment.roots for part in ("weights", "optimizer", "buffers")):
                return
            of_step = self._roots.setdefault(step, {})
            of_step[commitment.stage] = committed_root(commitment.roots)
            while len(self._roots) > MAX_WAITING:
                self._roots.popitem(last=False)
            if len(of_step) == len(self._programs) and self._due is None:
                self._due = step
                self._lock.notify_all()

    # -- what is kept -------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> list[int]:
        """The steps before which a snapshot was taken."""
        with self._lock:
            return [one.step for one in self._kept]

    @property
    def interval_steps(self) -> int:
        """Steps from one snapshot to the next, as fetching them has cost so far."""
        step_s = self._step_s() or 0.0
        return max(1, math.ceil(self._fetch_s / (MOST_SHARE * step_s))) if step_s else 1

    def keep(self, snapshot: Snapshot) -> None:
        """A snapshot is whole. Those that nobody goes back to any more are removed."""
        with self._lock:
            self._kept = [one for one in self._kept if one.step != snapshot.step] + [snapshot]
            while len(self._kept) > LEAST_KEPT and self._is_old(self._kept[1], snapshot):
                self._kept.pop(0).remove()
            oldest = self._kept[0].step
        self._on_kept(oldest)

    def _is_old(self, snapshot: Snapshot, newest: Snapshot) -> bool:
        """Whether nobody goes back behind a snapshot any more."""
        age_s = newest.taken_at_s - snapshot.taken_at_s
        return snapshot.step <= newest.step - self._keep_steps and (age_s > VERDICT_S or not self._keep_steps)

    def newest(self, at_most: int | None = None) -> Snapshot | None:
        """The newest sound snapshot (of this step or before); those that are damaged are dropped."""
        while True:
            with self._lock:
                fitting = [one for one in self._kept if at_most is None or one.step <= at_most]
                if not fitting:
                    return None
            if fitting[-1].is_sound():
                return fitting[-1]
            logger.warning("the snapshot before step %d is damaged: an older one is taken", fitting[-1].step)
            self._drop([fitting[-1]])

    def forget_after(self, step: int) -> None:
        """What was taken after this step is void."""
        with self._lock:
            later = [one for one in self._kept if one.step > step]
            self._next_step = step + self.interval_steps
        self._drop(later)

    def forget_all(self, next_step: int) -> None:
        """The state was replaced: the next snapshot is that before `next_step`."""
        with self._lock:
            everything, self._next_step = list(self._kept), next_step
            self._due = None
            self._roots.clear()
        self._drop(everything)

    def _drop(self, snapshots: Sequence[Snapshot]) -> None:
        with self._lock:
            self._kept = [one for one in self._kept if one not in snapshots]
        for one in snapshots:
            one.remove()

    # -- fetching -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                while self._due is None and not self._stopped:
                    self._lock.wait()
                if self._stopped:
                    return
                step, version, workers = self._due or 0, self._plan_version, list(self._workers)
                roots = [self._roots[step][program.stage_index] for program in self._programs]
                private = self._private.pop(step, ({}, {}))
            began = time.monotonic()
            snapshot = self._fetched(step, version, workers, roots, private)
            with self._lock:
                is_of_now = version == self._plan_version and self._due == step
                self._due = None
                if snapshot is not None and is_of_now:
                    self._fetch_s = time.monotonic() - began
                    self._next_step = step + self.interval_steps
                    for waiting in (self._roots, self._private):
                        for earlier in [at for at in waiting if at < self._next_step]:
                            del waiting[earlier]
            if snapshot is not None:
                self.keep(snapshot) if is_of_now else snapshot.remove()

    def _fetched(
        self, step: int, version: int, workers: list[NodeKey], roots: list[bytes], private: Private
    ) -> Snapshot | None:
        folder = self._folder / f"{version}-{step}"
        try:
            folder.mkdir(exist_ok=True)
            stages = [
                fetch(self._driver, program, step, folder / f"stage-{program.stage_index}")
                for program in self._programs
            ]
        except (SmartnodesError, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            logger.info("no snapshot before step %d, the next one is tried: %s", step, error)
            return None
        return Snapshot(step, version, workers, stages, roots, private, folder)
