"""A worker is lost, and the run goes on as if it had not been.

`run` does what the user asks of the stages. Where a worker is lost on the way, or was found to cheat: a snapshot from
before is chosen, the job planned anew with other rigs in place of those that are gone, every stage brought to the
snapshot's state (rigs that go on have it themselves, others get it from here), and what the journal holds since is done
again. All stages do it again together, not the lost one alone: what a stage took in is tens of times larger than what
the user sent to the first one, and a pipeline does a step in about the time in which one stage would catch up with it.
The same calls with the same tensors give the same bits; a newer plan's stages have other keys, so that nothing of the
old plan is ever counted.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from smartnodes_core.errors import (
    ConnectionLostError,
    DeadlineError,
    JobError,
    NoWorkersError,
    PeerFault,
    PeerUnreachableError,
    SandboxError,
    SmartnodesError,
    Unavailable,
    WorkerLostError,
)
from smartnodes_core.records import Announcement, Assignment, NodeKey, Plan, Verdict
from smartnodes_core.remote_errors import raised_by
from smartnodes_core.rpc import PendingCall
from tensorlink.errors import FraudError, NonFiniteError
from tensorlink.recovery.accusations import Accusations
from tensorlink.recovery.heartbeat import Heartbeat
from tensorlink.recovery.journal import Entry, Journal
from tensorlink.recovery.keeper import SnapshotKeeper
from tensorlink.recovery.rigs import replacements
from tensorlink.recovery.snapshots import Snapshot
from tensorlink.weight_sending import replace_state, send_parts

if TYPE_CHECKING:
    from tensorlink.calls import Calls
    from tensorlink.placement import Placement
    from tensorlink.steps import Steps

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

#: What another rig can mend.
LOST = (WorkerLostError, ConnectionLostError, PeerUnreachableError, DeadlineError, SandboxError)
#: So many attempts to get over one loss are the end.
MAX_ATTEMPTS = 5
#: How long a rig is waited for where none is free, looking again so often.
WAIT_FOR_RIG_S, LOOK_AGAIN_S = 600.0, 0.5
#: A rig that was lost takes no stage for so long, unless the recovery has ended before.
AVOID_S = 10.0


@dataclass(frozen=True)
class Recovered:
    """One recovery, for `report()`: why, which stages went to which workers, the losses of the training steps that were
    done again (as they are now, should the first have been false), and how long its parts took."""

    reason: str
    plan_version: int
    first_step: int
    num_done_again: int
    moved: dict[int, str]
    losses: dict[int, float]
    planning_s: float
    loading_s: float
    again_s: float


class Recovery:
    """Of one job. All but what is heard runs on the user's thread.

    `on_fraud` is "rollback" (the run goes back a whole audit window before the step that was found false: what a cheat
    did in it is not looked for, it is done again) or "continue" (the worker is replaced, what it did stays).
    """

    def __init__(self, placement: Placement, calls: Calls, steps: Steps, on_fraud: str = "rollback") -> None:
        self._placement, self._calls, self._steps, self._on_fraud = placement, calls, steps, on_fraud
        self._driver, self._network = placement.driver, placement.network
        self._window_steps = placement.job.record.audit.window_steps
        self.recovered: list[Recovered] = []
        #: Called when stages begin anew: what they were told outside of the journal has to be told again.
        self.on_begun: list[Callable[[], None]] = []
        self._journal = Journal()
        self._version = 0
        self._busy = False
        self._frauds: dict[NodeKey, Verdict] = {}
        self._cheats: set[NodeKey] = set()
        self._told: set[NodeKey] = set()  # cheats of which the user has heard, or which left nothing
        self._lost_at_s: dict[NodeKey, float] = {}  # on the monotonic clock
        self._lock = threading.Lock()
        self._keeper = SnapshotKeeper(
            self._driver,
            placement.programs,
            2 * self._window_steps
            if on_fraud == "rollback"
            else 0,  # a verdict comes within a window, and goes one back
            lambda: self._driver.tally.step_s,
            self._journal.forget_before,
        )
        self._heartbeat = Heartbeat(
            lambda: self._workers,
            self._ask,
            self._give_up,
            max(placed.micro_batch_s for placed in placement.table.stages),
            self._network.heartbeat_s,
        )
        self._accusations = Accusations(self._network.is_fraud, self._convict)
        self._driver.on_committed, self._driver.on_found = self._keeper.committed, self._accusations.hear
        self._keeper.begin_plan(0, self._workers)
        self._keeper.keep(placement.beginning)
        self._keeper.start()
        self._accusations.start()
        self._heartbeat.start()

    def stop(self) -> None:
        """The job is closed."""
        self._heartbeat.stop()
        self._accusations.stop()
        self._keeper.stop()

    @property
    def _workers(self) -> list[NodeKey]:
        job = self._placement.job
        return [job.worker_of(stage) for stage in range(job.record.num_stages)]

    # -- doing, and doing again ---------------------------------------------------------------------------------------

    def run(
        self,
        act: Callable[[], Result],
        again: Callable[[Result], Callable[[], object]] | None = None,
        depends_on_outputs: bool = False,
    ) -> Result:
        """Do something with the stages; where a worker is lost meanwhile, do it again on others.

        `again` makes what the journal keeps, from the result; without it nothing has changed that would have to be done
        again. What is run within is part of it.
        """
        if self._busy:
            return act()
        place = self._calls.step_index, self._calls.num_calls
        self._busy = True
        try:
            while True:
                try:
                    self._see_to_frauds()
                    self._calls.resume_at(*place)
                    result = act()
                    break
                except LOST as error:
                    lost = self._lost_by(error)
                    if not self._see_to_frauds():  # the chain may have shut out a cheat before it was seen to here
                        self._recover(error, lost, None)
                except NonFiniteError as error:  # that the step is dropped is part of what has to be done again
                    if again is not None:
                        self._journal.add(Entry(*place, _dropped(act), depends_on_outputs))
                    raise error
            if again is not None:
                self._journal.add(Entry(*place, again(result), depends_on_outputs))
            return result
        finally:
            self._busy = False

    def replace(self, act: Callable[[], Result], is_fresh_optimizer: bool = False) -> Result:
        """Replace the stages' state from outside, after which nobody goes back behind this."""
        if self._busy:
            return act()
        result = self.run(act)
        if not (is_fresh_optimizer and self._calls.step_index == 0 and self._keeper.steps == [0]):
            self._journal.start_at(self._calls.step_index)
            self._keeper.forget_all(self._calls.step_index)
        return result

    def hold_private(self) -> None:
        """The open step is about to be committed."""
        private = self._placement.private
        if private:
            self._keeper.hold_private(self._calls.step_index, lambda: (private.state(), private.optimizer_state()))

    # -- what is lost -------------------------------------------------------------------------------------------------

    def _ask(self, worker: NodeKey, timeout_s: float) -> PendingCall:
        for stage in self._driver.stages:
            if stage.job.worker_of(stage.stage) == worker:
                return self._network.user.begin_call(stage, "usage", {}, timeout_s=timeout_s)
        raise JobError("a worker that has no stage any more")

    def _give_up(self, worker: NodeKey, reason: str) -> None:
        logger.warning("worker %s is given up: %s", worker.hex()[:8], reason)
        self._avoid([worker])
        self._network.drop(worker, reason)

    def _convict(self, verdict: Verdict) -> None:
        """A worker cheated. On the thread of accusations."""
        with self._lock:
            earlier = self._frauds.get(verdict.worker)
            if earlier is None or verdict.step < earlier.step:
                self._frauds[verdict.worker] = verdict

    def _is_undone(self, verdict: Verdict) -> bool:
        """Whether what a cheat did was done again since."""
        back_to = max(0, verdict.step - self._window_steps)
        return any(one.plan_version > verdict.plan_version and one.first_step <= back_to for one in self.recovered)

    def _see_to_frauds(self) -> bool:
        """Workers that were found to cheat are replaced, before anything more is asked of the stages; whether any was.

        Raises FraudError where the run cannot go back by itself: gradients that were computed here from false outputs
        cannot be computed again.
        """
        self._accusations.wait()
        with self._lock:
            frauds, self._frauds = self._frauds, {}
            self._cheats.update(frauds)
        lost = [stage for stage, worker in enumerate(self._workers) if worker in frauds]
        if not lost and all(self._is_undone(verdict) for verdict in frauds.values()):
            return False
        first = min(frauds.values(), key=lambda verdict: verdict.step)
        error = WorkerLostError(f"the worker of stage {first.stage} cheated at step {first.step}: {first.reason}")
        back, at_most = self._on_fraud == "rollback", None
        oldest = min(self._keeper.steps, default=first.step + 1)
        trusted = max(oldest, first.step - self._window_steps)
        is_repeatable = not any(entry.depends_on_outputs for entry in self._journal.since(trusted))
        if back and is_repeatable and oldest <= first.step:
            at_most = trusted
        self._recover(error, lost, at_most)
        is_told = first.worker in self._told
        self._told.update(frauds)
        if back and at_most is None and not is_told:
            raise FraudError(
                f"{error}. It was replaced, and what it did since is still in the weights, because "
                + ("no snapshot from before is kept" if is_repeatable else "gradients came from outside the pipeline")
                + f": load a checkpoint of step {first.step} or before (train_step goes back by itself)"
            )
        return True

    def _lost_by(self, cause: SmartnodesError) -> list[int]:
        """The stages whose workers do not answer any more; where all do, the one of which the error speaks."""
        asked: list[tuple[int, PendingCall | None]] = []
        for stage in self._driver.stages:
            try:
                worker = stage.job.worker_of(stage.stage)
                asked.append((stage.stage, self._ask(worker, self._heartbeat.patience_s(worker))))
            except SmartnodesError:
                asked.append((stage.stage, None))
        lost = [stage for stage, call in asked if call is None or not _answers(call)]
        unwanted = self._unwanted()
        lost += [stage for stage, worker in enumerate(self._workers) if worker in unwanted]
        sinner = raised_by(cause) if isinstance(cause, PeerFault) else None
        lost += [stage for stage, worker in enumerate(self._workers) if worker == sinner]
        named = re.search(r"worker of stage (\d+)", str(cause))
        if not lost and isinstance(cause, WorkerLostError) and named is not None:
            lost = [int(named[1])]  # as a neighbour that does not reach it says
        self._avoid(self._workers[stage] for stage in lost)
        return sorted(set(lost))

    # -- recovering ---------------------------------------------------------------------------------------------------

    def _recover(self, cause: SmartnodesError, lost: Sequence[int], at_most: int | None) -> None:
        """Bring the stages to where they were, on other rigs in place of those of the `lost` stages.

        `at_most`: the last step that can be trusted. Raises the cause where there is no snapshot, or no way for now:
        the next operation tries again.
        """
        try:
            self._recover_from(cause, lost, at_most)
        except SmartnodesError as error:
            self._driver.fail(error)
            raise

    def _recover_from(self, cause: SmartnodesError, lost: Sequence[int], at_most: int | None) -> None:
        if self._placement.closed:
            raise cause
        began_s, attempts = time.monotonic(), 0
        while True:
            self._driver.restart()
            snapshot = self._keeper.newest(at_most)
            if snapshot is None or snapshot.step < self._journal.begin:
                raise cause
            attempts += 1
            try:
                moved = self._plan_anew(cause, lost, snapshot)
                planned_s = time.monotonic()
                self._load(snapshot)
                loaded_s = time.monotonic()
                num_done_again, losses = self._do_again(snapshot)
                break
            except _NoRigError as error:
                raise cause from error
            except (*LOST, _RefusedError, JobError, PeerFault) as error:
                logger.warning("going on after a loss: %s", error)
                if attempts >= MAX_ATTEMPTS or self._placement.closed:
                    raise cause from error
                lost = lost if isinstance(error, _RefusedError) else self._lost_by(error)
        done = Recovered(
            reason=str(cause),
            plan_version=self._placement.job.plan.version,
            first_step=snapshot.step,
            num_done_again=num_done_again,
            moved=moved,
            losses=losses,
            planning_s=planned_s - began_s,
            loading_s=loaded_s - planned_s,
            again_s=time.monotonic() - loaded_s,
        )
        self.recovered.append(done)
        with self._lock:
            self._lost_at_s.clear()
        logger.warning(
            "went on from step %d under plan %d (%s): planned in %.2f s, loaded in %.2f s, done again in %.2f s",
            done.first_step,
            done.plan_version,
            done.reason,
            done.planning_s,
            done.loading_s,
            done.again_s,
        )

    def _plan_anew(self, cause: SmartnodesError, lost: Sequence[int], snapshot: Snapshot) -> dict[int, str]:
        placement = self._placement
        running = {p.stage: p.worker for p in placement.table.stages if p.stage not in lost}
        takers = self._wait_for_rigs(lost, running)
        placement.move(takers)
        job = placement.job
        self._version += 1  # also where the last one was not taken by all
        plan = Plan(
            job=job.id,
            version=self._version,
            first_step=snapshot.step,
            state_roots=list(snapshot.roots),
            assignments=[
                Assignment(stage=p.stage, replica=0, worker=p.worker.node_key, endpoint=p.worker.endpoints[0])
                for p in placement.table.stages
            ],
            spares=[],
            validators=self._validators(),
            reason=f"from step {snapshot.step}: {cause}"[:200],
        )
        try:
            placement.job = self._network.user.replan(job, plan)
        except (NoWorkersError, JobError, PeerFault) as error:
            self._avoid(rig.node_key for rig in takers.values())
            raise _RefusedError(f"no plan with the rigs that were chosen: {error}") from error
        self._driver.attach(placement.job)
        self._keeper.begin_plan(plan.version, self._workers)
        return {stage: rig.node_key.hex()[:8] for stage, rig in takers.items()}

    def _validators(self) -> list[NodeKey]:
        """Those of the job, who audit it, unless all of them are gone."""
        job, live = self._placement.job, self._network.validators()
        may_audit = job.record.audit.auditors
        planned = [key for key in job.plan.validators if key in live]
        return planned or [key for key in live if not may_audit or key in may_audit] or list(job.plan.validators)

    def _wait_for_rigs(self, lost: Sequence[int], running: dict[int, Announcement]) -> dict[int, Announcement]:
        needs = {p.stage: p.memory.total for p in self._placement.table.stages}
        deadline_s, said, pause = time.monotonic() + WAIT_FOR_RIG_S, False, threading.Event()
        while True:
            announced = self._network.announced_workers()
            found = replacements(lost, running, needs, announced, self._unwanted(), self._network.reaches)
            if found is not None:
                return found
            if time.monotonic() >= deadline_s or self._placement.closed:
                raise _NoRigError(
                    f"found no rig for stages {list(lost)} in {WAIT_FOR_RIG_S:.0f} s: start one with tensorlink-worker"
                )
            if not said:
                said = True
                logger.warning("no rig is free for stages %s: the run waits until one joins", list(lost))
            pause.wait(LOOK_AGAIN_S)

    def _unwanted(self) -> set[NodeKey]:
        """Who cheated, and who was lost just now: a rig may come back."""
        since_s = time.monotonic() - AVOID_S
        with self._lock:
            return self._cheats | {worker for worker, at_s in self._lost_at_s.items() if at_s > since_s}

    def _avoid(self, workers: Iterable[NodeKey]) -> None:
        with self._lock:
            self._lost_at_s.update(dict.fromkeys(workers, time.monotonic()))

    def _load(self, snapshot: Snapshot) -> None:
        """Every stage begins in the snapshot's state: kept on its own rig, or sent from here."""
        driver, placement = self._driver, self._placement
        driver.call_all("load", lambda stage: {}, lambda stage: [placement.programs[stage].to_json()])
        pairs = enumerate(zip(self._workers, snapshot.workers, strict=True))
        kept = {stage for stage, (now, then) in pairs if now == then}
        for stage in list(kept):
            if not self._restored(stage, "state", snapshot):
                kept.discard(stage)
        sent = [stage for stage in range(driver.num_stages) if stage not in kept]
        send_parts(driver, {stage: snapshot.stages[stage].state for stage in sent})
        for stage in sent:
            driver.call(stage, "load_end", {})
        self._steps.begin_anew()
        for stage, state in enumerate(snapshot.stages):
            if state.optimizer and not (stage in kept and self._restored(stage, "optimizer", snapshot)):
                replace_state(driver, "set_optimizer_state", {stage: state.optimizer})
        driver.call_all("resume", lambda stage: {})
        placement.private.begin_anew(*snapshot.private)
        for begun in self.on_begun:
            begun()

    def _restored(self, stage: int, part: str, snapshot: Snapshot) -> bool:
        try:
            asked: dict[str, Any] = {"plan_version": snapshot.plan_version, "step": snapshot.step, "part": part}
            self._driver.call(stage, "restore", asked)
            return True
        except LOST:
            raise
        except SmartnodesError as error:
            logger.info("stage %d has its state of step %d no more, it is sent: %s", stage, snapshot.step, error)
            return False

    def _do_again(self, snapshot: Snapshot) -> tuple[int, dict[int, float]]:
        """Everything since the snapshot; how many operations that were, and the losses of training steps."""
        self._keeper.forget_after(snapshot.step)
        self._calls.begin_anew(snapshot.step)
        entries, losses = self._journal.since(snapshot.step), dict[int, float]()
        for entry in entries:
            self._calls.resume_at(entry.step, entry.num_calls)
            value = entry.again()
            if isinstance(value, float):
                losses[entry.step] = value
        return len(entries), losses


class _RefusedError(Unavailable):
    """A rig that was chosen does not take its stage: another is."""


class _NoRigError(NoWorkersError):
    """Nobody takes a stage over, however long one waits."""


def _answers(call: PendingCall) -> bool:
    try:
        call.result()
    except SmartnodesError:  # gone, or no more what it was
        return False
    return True


def _dropped(act: Callable[[], object]) -> Callable[[], object]:
    """Do again what ended with a step that all stages dropped."""

    def again() -> None:
        try:
            act()
        except NonFiniteError:
            return

    return again
