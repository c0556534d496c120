"""How a job comes to be: trace, profile, partition, plan, open, load; and what the model keeps of it.

Read `place` from top to bottom: it is the first story of the architecture up to the first forward.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from smartnodes_core.errors import NoWorkersError
from smartnodes_core.jobs import Job, spec_digest
from smartnodes_core.records import Announcement, Assignment, AuditTerms, JobRecord, Plan, Record
from smartnodes_core.usage import USAGE
from tensorlink.audit.commitments import initial_root_of
from tensorlink.initial_state import Source, Sources, digest_of, initial_values, num_bytes_of, value_of
from tensorlink.measure import flops_per_s
from tensorlink.pipeline.batching import check_outputs
from tensorlink.pipeline.batching import micro_batches as split_into
from tensorlink.pipeline.driver import Driver
from tensorlink.private import PrivateLayers
from tensorlink.program.graph import StageProgram
from tensorlink.program.inputs import flatten_inputs
from tensorlink.program.limits import Estimate
from tensorlink.program.trace import TracedModel, trace
from tensorlink.program.values import DTYPES
from tensorlink.remote_state import RemoteState
from tensorlink.reporting import report
from tensorlink.sharding.memory import StageNeed, Training
from tensorlink.sharding.needs import estimate, needs_of
from tensorlink.sharding.partition import partition_between
from tensorlink.sharding.plan import CutModel, PlacementPlan, check_schedule, plan
from tensorlink.sharding.private import Private, PrivateCut
from tensorlink.sharding.profile import profile
from tensorlink.stage_papers import STATE_INTERVAL_STEPS
from tensorlink.weight_files import Weights
from tensorlink.weight_sending import send_parts
from tensorlink.worker import JOB_TYPE

if TYPE_CHECKING:
    from tensorlink.network import Network

WAIT_FOR_WORKERS_S = 20.0
#: Of the audit window, what a rig needs memory for: it keeps older steps on disk where memory is short.
STEPS_IN_MEMORY = 1
#: The audit window of a job spans this time as predicted, and at least so many steps.
WINDOW_S = 15.0
LEAST_WINDOW_STEPS = 2

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Placement:
    """A job that runs, and what the user's side must remember of it."""

    network: Network
    traced: TracedModel
    programs: list[StageProgram]
    private: PrivateLayers
    driver: Driver
    job: Job
    table: PlacementPlan
    training: Training
    state: RemoteState
    profile_measured: bool
    set_up_s: float = 0.0
    closed: bool = False

    def sign(self, record: Record) -> bytes:
        """The record signed by the user's node key."""
        return self.network.identity.sign(record).encode()

    @property
    def tied_bytes(self) -> int:
        """The most that one worker sends and receives of tied parameters' gradients in a step."""
        return max(_tied_bytes(program) for program in self.programs)

    def usage(self) -> dict[str, dict[str, int]]:
        """See `DistributedModel.usage`."""
        found = {"user": USAGE.read()}
        workers = [placed.worker.node_key for placed in self.table.stages]
        for index, worker in enumerate(dict.fromkeys(workers)):
            reply = self.driver.call(workers.index(worker), "usage", {})
            found[f"worker {index}"] = dict(reply.params["node"])
            found[f"worker {index} compute"] = dict(reply.params["compute"])
        return found

    def report(self, num_steps: int) -> dict[str, Any]:
        """See `reporting.report`."""
        return report(self, num_steps)

    def close(self) -> None:
        """End the job: a validator is told, workers are released. Idempotent."""
        if not self.closed:
            self.closed = True
            self.driver.close()
            self.network.user.close_job(self.job)

    def __str__(self) -> str:
        return f"job={self.job.id.hex()[:8]}"


def place(
    module: torch.nn.Module,
    network: Network,
    stages: int | None,
    micro_batches: int,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    seed: int,
    timeout_s: float,
    audit_rates: tuple[float, float] | None,
    progress: bool,
    schedule: str = "auto",
    private: Private = (),
    autocast: torch.dtype | None = None,
    weights: Weights | None = None,
) -> Placement:
    """Bring `module` onto the network's workers. Raises TraceError, InputError, PartitionError, NoWorkersError,
    JobError.
    """
    began = time.monotonic()
    check_schedule(schedule)
    with tqdm(total=5, disable=not progress, leave=False, unit="") as bar:
        bar.set_description("trace")
        traced = trace(module, example_inputs, autocast=autocast)
        check_outputs(traced, micro_batches)
        values = initial_values(module, traced, weights)
        bar.update()
        bar.set_description("find workers")
        wanted = stages or 1
        workers = network.find_workers(wanted, WAIT_FOR_WORKERS_S)
        if stages is None:  # as many as there are: those that died and are still announced do not count
            workers = [worker for worker in workers if network.reaches(worker)]
        bar.update()
        bar.set_description("partition")
        samples = _samples(traced, example_inputs, micro_batches)
        costs = profile(traced, example_inputs, samples=samples)
        training = Training(micro_batches, STEPS_IN_MEMORY)

        def cut(shares: tuple[float, ...]) -> list[StageNeed]:
            parts = partition_between(traced, costs, len(shares), private, speeds=shares)
            return needs_of(parts.stages, costs, samples)

        table = _plan_on_living(network, cut, workers, training, stages, schedule)
        parts = partition_between(traced, costs, len(table.shares), private, speeds=table.shares)
        programs = parts.stages
        estimates = [estimate(program, samples) for program in programs]
        logger.info("the plan:\n%s", table.table())
        audit_terms = _audit_terms(network, audit_rates, table.step_s)
        bar.update()
        bar.set_description("open the job")
        driver = Driver(network.user, programs[0].inputs, programs[-1].outputs, timeout_s)
        states = [{name: values[name] for name in program.expected_state()} for program in programs]
        roots = _roots(programs, values, progress)
        offer = network.offer
        terms: dict[str, int | str] = {"seed": seed, "samples": samples, "state_interval_steps": STATE_INTERVAL_STEPS}
        terms |= offer.terms() if offer is not None else {}
        record = _record(network, programs, estimates, roots, terms, audit_terms)
        if offer is not None:
            offer.deposit(network.chain, network.network_id, record.digest())
        job = network.user.open_job(record, _plan(network, record, table), driver)
        driver.attach(job)
        kept = _private_layers(parts, values, seed)
        state = RemoteState(traced, programs, driver, kept, values)
        placement = Placement(network, traced, programs, kept, driver, job, table, training, state, costs.measured)
        try:
            bar.update()
            bar.set_description("send weights")
            _load_stages(driver, programs, states, progress)
        except BaseException:
            placement.close()
            raise
        bar.update()
    placement.set_up_s = time.monotonic() - began
    network.opened(placement)
    return placement


def _private_layers(cut: PrivateCut, values: Sources, seed: int) -> PrivateLayers:
    names = {n for program in (cut.head, cut.tail) if program is not None for n in program.expected_state()}
    return PrivateLayers(cut.head, cut.tail, {name: value_of(values[name]) for name in sorted(names)}, seed)


def _samples(traced: TracedModel, example_inputs: Any, micro_batches: int) -> int:
    """The size of the largest micro-batch of the example: what a unit of work is measured by."""
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (tuple(example_inputs), {})
    return max(split_into(traced, flatten_inputs(traced, args, kwargs), micro_batches)[1])


def _plan_on_living(
    network: Network,
    cut: CutModel,
    workers: list[Announcement],
    training: Training,
    num_workers: int | None,
    schedule: str,
) -> PlacementPlan:
    """A plan whose workers all answer: an announcement outlives the rig that made it by minutes."""
    speed = flops_per_s()  # of this machine, whose seconds the profile has
    while True:
        table = plan(cut, workers, training, flops_per_s=speed, num_workers=num_workers, schedule=schedule)
        gone = [placed.worker for placed in table.stages if not network.reaches(placed.worker)]
        if not gone:
            return table
        workers = [worker for worker in workers if worker not in gone]


def _audit_terms(network: Network, audit_rates: tuple[float, float] | None, step_s: float) -> AuditTerms:
    """The network's terms, with a window no longer than challenges take to come: workers keep what is in it."""
    audit = network.audit_terms
    steps = max(LEAST_WINDOW_STEPS, math.ceil(WINDOW_S / max(step_s, 1e-9)))
    unit_rate, step_rate = audit_rates or (audit.unit_rate_ppm / 1e6, audit.step_rate_ppm / 1e6)
    return AuditTerms(
        unit_rate_ppm=round(unit_rate * 1e6),
        step_rate_ppm=round(step_rate * 1e6),
        window_steps=min(audit.window_steps, steps),
        window_s=audit.window_s,
        auditors=audit.auditors,
    )


def _tied_bytes(program: StageProgram) -> int:
    return sum(
        2 * (len(spec.holders) - 1) * math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
        for spec in program.parameters.values()
        if spec.holders
    )


def _record(
    network: Network,
    programs: list[StageProgram],
    estimates: list[Estimate],
    roots: list[bytes],
    terms: dict[str, int | str],
    audit: AuditTerms,
) -> JobRecord:
    return JobRecord(
        network_id=network.network_id,
        job_type=JOB_TYPE,
        author=network.identity.node_key,
        nonce=network.user.nonce(),
        created_at_s=int(time.time()),
        num_stages=len(programs),
        num_replicas=1,
        specs=[spec_digest(program.to_json()) for program in programs],
        initial_roots=roots,
        work_units=[estimate.work_units for estimate in estimates],
        audit=audit,
        terms=dict(terms),
    )


def _plan(network: Network, record: JobRecord, table: PlacementPlan) -> Plan:
    may_audit = record.audit.auditors
    validators = [each for each in network.validators() if not may_audit or each in may_audit]
    if not validators and may_audit:
        raise NoWorkersError(f"found none of the {len(may_audit)} validators that the audit terms name as auditors")
    if not validators:
        raise NoWorkersError("found no validator, needed at least 1 to open a job: start one with tensorlink-validator")
    return Plan(
        job=record.digest(),
        version=0,
        assignments=[
            Assignment(
                stage=placed.stage, replica=0, worker=placed.worker.node_key, endpoint=placed.worker.endpoints[0]
            )
            for placed in table.stages
        ],
        spares=[_key(worker) for worker in table.spares],
        validators=validators,
        reason=f"first plan: {len(table.stages)} stages, {table.schedule.name}, predicted {table.step_s * 1e3:.0f} ms",
    )


def _key(worker: Announcement) -> bytes:
    return worker.node_key


def _roots(programs: list[StageProgram], values: Mapping[str, Source], progress: bool) -> list[bytes]:
    """The root of each stage's initial state: every tensor is read once, those in files a piece at a time."""
    names = {name for program in programs for name in program.expected_state()}
    with _bytes_bar("read weights", sum(num_bytes_of(values[name]) for name in names), progress) as bar:
        digests = {name: digest_of(name, values[name], bar.update) for name in sorted(names)}
    return [initial_root_of(program, digests) for program in programs]


def _load_stages(driver: Driver, programs: list[StageProgram], states: list[dict[str, Source]], progress: bool) -> None:
    """The programs, which workers check before they allocate anything; then the weights, in parts."""
    driver.call_all("load", lambda stage: {}, lambda stage: [programs[stage].to_json()])
    total = sum(num_bytes_of(value) for state in states for value in state.values())
    with _bytes_bar("send weights", total, progress) as bar:
        send_parts(driver, dict(enumerate(states)), bar.update)
    driver.call_all("load_end", lambda stage: {})


def _bytes_bar(what: str, num_bytes: int, progress: bool) -> tqdm[Any]:
    return tqdm(
        total=num_bytes, desc=what, disable=not progress, leave=False, unit="B", unit_scale=True, unit_divisor=1024
    )
