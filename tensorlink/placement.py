"""How a job comes to be: trace, profile, partition, plan, open, load; and what the model keeps of it.

Read `place` from top to bottom: it is the first story of the architecture up to the first forward.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from smartnodes_core.errors import NoWorkersError
from smartnodes_core.jobs import Job, spec_digest
from smartnodes_core.records import NO_DIGEST, Announcement, Assignment, AuditTerms, JobRecord, Plan, Record
from tensorlink.audit.commitments import initial_root_of
from tensorlink.errors import TraceError
from tensorlink.initial_state import Source, digest_of, initial_values, num_bytes_of
from tensorlink.pipeline.batching import micro_batches as split_into
from tensorlink.pipeline.driver import Driver
from tensorlink.program.graph import StageProgram
from tensorlink.program.inputs import flatten_inputs
from tensorlink.program.limits import Estimate, check
from tensorlink.program.trace import TracedModel, trace
from tensorlink.records import set_root
from tensorlink.remote_state import RemoteState
from tensorlink.reporting import report
from tensorlink.sharding.partition import partition
from tensorlink.sharding.plan import PlacementPlan, StageNeed, plan
from tensorlink.sharding.profile import profile
from tensorlink.weight_files import Weights
from tensorlink.weight_sending import send_parts
from tensorlink.worker import JOB_TYPE

if TYPE_CHECKING:
    from tensorlink.network import Network

#: Caps under which the user's side estimates a stage; a worker checks it again under its own.
MAX_STAGE_BYTES = 1 << 40
MAX_STAGE_FLOPS = 1 << 60
WAIT_FOR_WORKERS_S = 20.0


@dataclass(eq=False)
class Placement:
    """A job that runs, and what the user's side must remember of it."""

    network: Network
    traced: TracedModel
    programs: list[StageProgram]
    driver: Driver
    job: Job
    table: PlacementPlan
    state: RemoteState
    schedule: str
    num_workers: int
    profile_measured: bool
    set_up_s: float = 0.0
    closed: bool = False

    def sign(self, record: Record) -> bytes:
        """The record signed by the user's node key."""
        return self.network.identity.sign(record).encode()

    @staticmethod
    def step_input_root(roots: Mapping[str, bytes]) -> bytes:
        """The root over all inputs of a step, by "call.micro_batch"."""
        return set_root(dict(roots)) if roots else NO_DIGEST

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
    schedule: str = "1f1b",
    weights: Weights | None = None,
) -> Placement:
    """Bring `module` onto the network's workers. Raises TraceError, InputError, PartitionError, NoWorkersError,
    JobError.
    """
    began = time.monotonic()
    with tqdm(total=5, disable=not progress, leave=False, unit="") as bar:
        bar.set_description("trace")
        traced = trace(module, example_inputs)
        values = initial_values(module, traced, weights)
        bar.update()
        bar.set_description("find workers")
        wanted = stages or 1
        workers = network.find_workers(wanted, WAIT_FOR_WORKERS_S)
        if stages is None:  # as many as there are: those that died and are still announced do not count
            workers = [worker for worker in workers if network.reaches(worker)]
        num_workers = stages or max(1, len(workers))
        num_stages = num_workers * (2 if schedule in ("zbv", "interleaved") else 1)
        bar.update()
        bar.set_description("partition")
        profiled = profile(traced, example_inputs)
        programs = partition(traced, profiled, num_stages)
        samples = _samples(traced, example_inputs, micro_batches)
        _check_outputs(traced)
        estimates = [
            check(program, batch=samples, max_bytes=MAX_STAGE_BYTES, max_flops=MAX_STAGE_FLOPS) for program in programs
        ]
        bar.update()
        bar.set_description("open the job")
        needs = [_need(estimate, num_stages, stage) for stage, estimate in enumerate(estimates)]
        from tensorlink.pipeline.schedule import generate

        placed_on = generate(schedule, num_workers, micro_batches, num_stages).placement
        whole = [
            StageNeed(
                *(
                    sum(getattr(needs[s], f) for s in range(num_stages) if placed_on[s] == w)
                    for f in ("parameter_bytes", "activation_bytes", "flops")
                )
            )
            for w in range(num_workers)
        ]
        table = _plan_on_living(network, whole, workers, micro_batches)
        from dataclasses import replace

        table = replace(table, stages=[replace(table.stages[placed_on[s]], stage=s) for s in range(num_stages)])
        driver = Driver(network.user, programs[0].inputs, programs[-1].outputs, timeout_s)
        states = [{name: values[name] for name in program.expected_state()} for program in programs]
        roots = _roots(programs, values, progress)
        record = _record(network, programs, estimates, roots, {"seed": seed, "samples": samples}, audit_rates)
        job = network.user.open_job(record, _plan(network, record, table), driver)
        driver.attach(job)
        state = RemoteState(traced, programs, driver, values)
        placement = Placement(
            network, traced, programs, driver, job, table, state, schedule, num_workers, profiled.measured
        )
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


def _samples(traced: TracedModel, example_inputs: Any, micro_batches: int) -> int:
    """The size of the largest micro-batch of the example: what a unit of work is measured by."""
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (tuple(example_inputs), {})
    return max(split_into(traced, flatten_inputs(traced, args, kwargs), micro_batches)[1])


def _plan_on_living(
    network: Network, needs: list[StageNeed], workers: list[Announcement], micro_batches: int
) -> PlacementPlan:
    """A plan whose workers all answer: an announcement outlives the rig that made it by minutes."""
    while True:
        table = plan(needs, workers, micro_batches)
        gone = [placed.worker for placed in table.stages if not network.reaches(placed.worker)]
        if not gone:
            return table
        workers = [worker for worker in workers if worker not in gone]


def _need(estimate: Estimate, num_stages: int, stage: int) -> StageNeed:
    in_flight = num_stages - stage
    return StageNeed(
        estimate.parameter_bytes,
        estimate.saved_bytes * in_flight + estimate.peak_activation_bytes,
        estimate.work_units,
    )


def _record(
    network: Network,
    programs: list[StageProgram],
    estimates: list[Estimate],
    roots: list[bytes],
    terms: dict[str, int],
    audit_rates: tuple[float, float] | None,
) -> JobRecord:
    audit = network.audit_terms
    if audit_rates is not None:
        unit_rate, step_rate = audit_rates
        audit = AuditTerms(
            unit_rate_ppm=round(unit_rate * 1e6),
            step_rate_ppm=round(step_rate * 1e6),
            window_steps=audit.window_steps,
            window_s=audit.window_s,
            auditors=audit.auditors,
        )
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
    validators = network.validators()
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
        reason=f"first plan: {len(table.stages)} stages, predicted step {table.step_s * 1e3:.0f} ms",
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
        send_parts(driver, programs, states, bar.update)
    driver.call_all("load_end", lambda stage: {})


def _bytes_bar(what: str, num_bytes: int, progress: bool) -> tqdm[Any]:
    return tqdm(
        total=num_bytes, desc=what, disable=not progress, leave=False, unit="B", unit_scale=True, unit_divisor=1024
    )


def _check_outputs(traced: TracedModel) -> None:
    """Outputs are joined along the batch. Raises TraceError for one that has none."""
    for slot in traced.outputs.slots:
        if slot.type != "tensor" or not slot.shape or slot.shape[0] != -1:
            raise TraceError(
                f"{slot.name} has shape {list(slot.shape)}, needed a tensor with the batch first: return what the loss "
                "is computed from, and pass the loss as train_step's loss_fn or compute it outside"
            )
