"""A job whose author, workers and three validators are in this process, and its audits as the network makes them.

Stages compute, log and commit as on a rig. An audit is lists, preimages, a seed that selects, a challenge that the
worker checks, an opening that it signs as bytes, and the validator's examination of these bytes, with nothing left out
but the pipe to its computing process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from torch import Tensor

from audit import models
from smartnodes_core.audit import (
    Case,
    HashChain,
    Opened,
    TipTracker,
    assigned_validators,
    check_challenge,
    seed_of,
    select,
)
from smartnodes_core.evidence import chain_before, from_validator, opening_of
from smartnodes_core.identity import Identity
from smartnodes_core.jobs import spec_digest
from smartnodes_core.records import (
    AuditTerms,
    Challenge,
    Commitment,
    JobRecord,
    Opening,
    OpeningItem,
    ReceivedList,
    Reveal,
    Unit,
)
from tensorlink.audit import commitments
from tensorlink.audit.examine import Examiner
from tensorlink.audit.opening import opening
from tensorlink.pipeline.inbox import Delivery
from tensorlink.pipeline.stage import Place, Stage
from tensorlink.records import StepOrder
from tensorlink.stage_optimizer import encode_options
from tensorlink.stage_papers import LOSS_PROGRAM, earlier_order
from tensorlink.steplog.digests import root
from tensorlink.validator import ReplayAuditor
from tensorlink.worker import JOB_TYPE

SEED = 7
CHAIN_LENGTH = 4096
WHOLE_STEP = -1


class Inline(Executor):
    """Hashes at once."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _Port:
    """Where one stage's results go: to its neighbour, when `Job.run` says so."""

    def __init__(self, job: Job, index: int) -> None:
        self._job, self._index = job, index

    def send(self, to: str, delivery: Delivery, slot: int, tensor: Tensor) -> None:
        if to != "user":
            neighbour = self._job.stages[self._index + (1 if to == "next" else -1)]
            kept = tensor.detach().clone(memory_format=torch.contiguous_format)
            self._job.moving.append((neighbour, delivery, slot, kept))

    def share(self, to: int, id: Any, slot: int, tensor: Tensor) -> None:
        raise NotImplementedError("no parameter of these models is tied")

    def loss(self, call: Any, micro_batch: int, value: float) -> None:
        self._job.losses[(call.step, micro_batch)] = value

    def done(self, *told: Any, **more: Any) -> None:
        pass


class _Piece(NamedTuple):
    view: memoryview
    offset: int


class InThisProcess:
    """Stands in for the pipe to a validator's computing process: what is behind it examines here."""

    def __init__(self) -> None:
        self.inbound, self._examiner = self, Examiner()
        self._view = memoryview(b"")
        self.reply: dict[str, Any] = {}

    def allocate(self, num_bytes: int, timeout_s: float) -> _Piece:
        self._view = memoryview(bytearray(num_bytes))
        return _Piece(self._view, 0)

    def call(self, name: str, params: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.reply = self._examiner.examine(params, self._view[: params["num_bytes"]])
        return self.reply


class Validators:
    """Three, all assigned to every job; whichever is drawn, the same examination follows."""

    def __init__(self) -> None:
        self.identities = {one.node_key: one for one in (Identity.create() for _ in range(3))}
        self.replayer = ReplayAuditor()
        self._process = InThisProcess()
        self.replayer._sandbox, self.replayer._running = self._process, True  # type: ignore[assignment]
        self._begin_chains()

    def _begin_chains(self) -> None:
        self._chains = {key: HashChain(key + bytes([0]), CHAIN_LENGTH) for key in self.identities}
        self.tips = {key: TipTracker(chain.tip) for key, chain in self._chains.items()}
        self._revealed = 0

    def examine(self, case: Case, body: memoryview) -> dict[str, Any]:
        """What a validator finds: finding, reason, and the distances of what was not equal to the last bit."""
        finding, reason = self.replayer.examine(case, body)
        kept = self.replayer._drifts._places.get(
            (case.commitment.worker, case.commitment.job, case.commitment.stage), {}
        )
        drift = max((one.length for one in kept.values()), default=0.0)
        deltas = self._process.reply.get("deltas", {})
        return {"finding": finding, "reason": reason, "deltas": deltas, "drift": drift}

    def draw(self, commitment: Commitment) -> tuple[list[bytes], list[bytes], bytes, list[bytes]]:
        """Signed lists and reveals, the seed that follows, and the reveals' digests."""
        if self._revealed == CHAIN_LENGTH:
            self._begin_chains()
        self._revealed += 1
        at, job, digest = self._revealed, commitment.job, commitment.digest()
        lists, reveals, preimages, digests = [], [], {}, []
        for key, identity in sorted(self.identities.items()):
            listed = ReceivedList(job=job, validator=key, reveal=at, commitments=[digest])
            preimages[key] = self._chains[key].reveal(at)
            reveal = Reveal(
                job=job, validator=key, reveal=at, received_list=listed.digest(), preimage=preimages[key]
            )  # fmt: skip
            lists.append(identity.sign(listed).encode())
            reveals.append(identity.sign(reveal).encode())
            digests.append(reveal.digest())
        return lists, reveals, seed_of(preimages, digest), digests


class Audit(NamedTuple):
    """What came of one audit."""

    finding: str
    reason: str
    num_bytes: int


class Job:
    """One job of a model with weights from `seed`, whose stages are of `stage_class`, trained in memory.

    `num_rows` samples a step in `num_micro_batches`; `whole` has every audit be of the whole step, else each unit is
    audited. Optimizer options are the author's order.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        validators: Validators,
        stage_class: type[Stage] | Sequence[type[Stage]] = Stage,
        *,
        whole: bool = True,
        num_micro_batches: int = 2,
        num_rows: int = 8,
        interval_steps: int = 1,
        window_steps: int = 4,
        optimizer: str = "AdamW",
        options: Mapping[str, Any] | None = None,
        clip_norm: float | None = None,
        numeric_class: str = "benchmark",
    ) -> None:
        self.name, self.seed, self.validators = name, seed, validators
        self.programs, self.loss = models.traced(name)
        self.author, self.worker = Identity.create(), Identity.create()
        self.num_micro_batches, self.num_rows, self.interval_steps = num_micro_batches, num_rows, interval_steps
        self._optimizer, self._options = optimizer, dict(options or {"lr": 1e-2})
        self._clip_norm, self._numeric_class = clip_norm, numeric_class
        states = [models.state(name, seed, index) for index in range(len(self.programs))]
        self.specs = [program.to_json() for program in self.programs]
        rates = (0, 1_000_000) if whole else (1_000_000, 0)
        self.record = JobRecord(
            network_id=1, job_type=JOB_TYPE, author=self.author.node_key, nonce=bytes(32), created_at_s=0,
            num_stages=len(self.programs), num_replicas=1, specs=[spec_digest(spec) for spec in self.specs],
            initial_roots=[commitments.initial_root(*one) for one in zip(self.programs, states, strict=True)],
            work_units=[1] * len(self.programs),
            audit=AuditTerms(
                unit_rate_ppm=rates[0], step_rate_ppm=rates[1], window_steps=window_steps, window_s=60, auditors=[]
            ),
            terms={"seed": SEED, "state_interval_steps": interval_steps},
        )  # fmt: skip
        self.id = self.record.digest()
        classes = [stage_class] * len(self.programs) if isinstance(stage_class, type) else stage_class
        self.stages: list[Stage] = []
        self.moving: deque[tuple[Stage, Delivery, int, Tensor]] = deque()
        self.losses: dict[tuple[int, int], float] = {}
        for index, (program, state) in enumerate(zip(self.programs, states, strict=True)):
            parameters = {
                key: state[key].requires_grad_(spec.requires_grad) for key, spec in program.parameters.items()
            }
            buffers = {key: state[key] for key in program.buffers}
            place = Place(self.id, 0, 0, index, len(self.programs), SEED)
            stage = classes[index](
                place, program, parameters, buffers, _Port(self, index), Inline(),
                window_steps=window_steps, state_interval_steps=interval_steps,
            )  # fmt: skip
            stage.set_optimizer(optimizer, self.groups(index))
            self.stages.append(stage)
        self.stages[-1].set_loss(self.loss)
        self._roots = [commitments.Roots() for _ in self.stages]
        self.committed: list[list[Commitment]] = [[] for _ in self.stages]
        self.orders: list[list[tuple[StepOrder, bytes]]] = [[] for _ in self.stages]
        self.num_steps = 0

    def groups(self, index: int) -> list[dict[str, Any]]:
        """The optimizer's groups of a stage as they travel."""
        return [{"parameters": list(self.programs[index].parameters), **encode_options(self._options)}]

    def step(self) -> None:
        """One step of every stage, committed to and signed for."""
        step, count = self.num_steps, self.num_micro_batches
        weights = [(1 / count).hex()] * count
        told = {
            "step": step, "call": 0, "num_micro_batches": count, "samples": [], "training": True, "grad": True,
            "type": "train_step", "weights": weights, "schedule": "1f1b",
        }  # fmt: skip
        for stage in self.stages:
            stage.begin(told)
        x, y = models.batch(self.name, hash((self.seed, step)) & 0xFFFF_FFFF, self.num_rows)
        for m, (xm, ym) in enumerate(zip(torch.tensor_split(x, count), torch.tensor_split(y, count), strict=True)):
            self.stages[0].receive(Delivery(step, 0, m, "activation", 0), 0, xm.clone())
            self.stages[-1].receive(Delivery(step, 0, m, "target", 0), 0, ym.clone())
        self._run()
        squared = sum(stage.squared_norm(step)[0] for stage in self.stages)
        coefficient = 1.0
        if self._clip_norm is not None:
            coefficient = min(1.0, self._clip_norm / max(squared**0.5, 1e-30))
        for index, stage in enumerate(self.stages):
            self._commit(index, stage, coefficient)
        self.num_steps += 1

    def _run(self) -> None:
        worked = True
        while worked or self.moving:
            while self.moving:
                stage, delivery, slot, tensor = self.moving.popleft()
                stage.receive(delivery, slot, tensor)
            worked = any([stage.run_next() for stage in self.stages])

    def _commit(self, index: int, stage: Stage, coefficient: float) -> None:
        step = self.num_steps
        order = StepOrder(
            job=self.id, plan_version=0, step=step, input_root=bytes(32), target_root=bytes(32), loss=self.loss.digest,
            loss_weights=[(1 / self.num_micro_batches).hex()] * self.num_micro_batches, loss_scale="",
            clip_norm="" if self._clip_norm is None else self._clip_norm.hex(), optimizer=self._optimizer,
            options=self.groups(index), replaced=[] if step else ["optimizer"],
        )  # fmt: skip
        self.orders[index].append((order, self.author.sign(order).encode()))
        record = stage.commit(step, coefficient, order.options, order.digest(), order.clip_norm)
        state = stage.optimizer.state_tensors() if stage.optimizer else {}
        content = commitments.build(record, root(record.gradient), self._roots[index], stage.parameters, state, 1)
        units = [Unit(**unit) for unit in content.pop("units")]
        before = self.committed[index]
        commitment = Commitment(
            job=self.id, plan_version=0, replica=0, stage=index, worker=self.worker.node_key,
            numeric_class=self._numeric_class, previous=before[-1].digest() if before else self.id, units=units,
            **content,
        )  # fmt: skip
        before.append(commitment)

    def gradient(self, index: int, step: int) -> Mapping[str, Tensor]:
        """What a stage committed to as its gradient; empty for a step outside the window."""
        record = self.stages[index].log.committed(step)
        return record.gradient if record is not None else {}

    def audit(self, index: int, step: int, unit: int = WHOLE_STEP) -> Audit:
        """One audit of a step within the window: of a micro-batch, or of the whole step."""
        case, body = self.case(index, step, unit)
        return self.finding(case, body)

    def finding(self, case: Case, body: memoryview) -> Audit:
        """What a validator finds."""
        finding, reason = self.validators.replayer.examine(case, body)
        return Audit(finding, reason, len(body))

    def case(self, index: int, step: int, unit: int = WHOLE_STEP) -> tuple[Case, memoryview]:
        """What a validator has in hand when it examines."""
        commitment, challenge = self.challenge(index, step, unit)
        signed_opening, order, earlier, body = self.open(index, step, challenge)
        return self.received(index, commitment, challenge, signed_opening, order, earlier, body)

    def challenge(self, index: int, step: int, unit: int) -> tuple[Commitment, Challenge]:
        """A challenge that the worker has checked, as the seed selects it."""
        commitment = self.committed[index][step]
        lists, reveals, seed, digests = self.validators.draw(commitment)
        assigned = assigned_validators(self.id, list(self.validators.identities))
        auditor = select(seed, self.record.audit, len(commitment.units), assigned)[0].auditor
        challenge = Challenge(
            job=self.id, commitment=commitment.digest(), tier=2 if unit == WHOLE_STEP else 1, unit=unit, seed=seed,
            reveals=digests, auditor=auditor,
        )  # fmt: skip
        check_challenge(
            challenge, commitment, self.record.audit, assigned, [from_validator(one, ReceivedList) for one in lists],
            [from_validator(one, Reveal) for one in reveals], self.validators.tips,
        )  # fmt: skip
        return commitment, challenge

    def open(self, index: int, step: int, challenge: Challenge) -> tuple[bytes, bytes, list[bytes], bytearray]:
        """The worker's answer: its signed opening, the author's order, signed earlier commitments, and the body."""
        body, items, earlier = self.opened(index, step, challenge)
        order = self.orders[index][step][1]
        return self.signed_opening(challenge, items, body, order), order, earlier, body

    def opened(self, index: int, step: int, challenge: Challenge) -> tuple[bytearray, list[OpeningItem], list[bytes]]:
        """The same before it is signed: body, items and signed earlier commitments."""
        stage = self.stages[index]
        interval = stage.log.interval(step)
        opened = opening(interval, challenge.tier, challenge.unit, *stage.state_after(interval[-1]))
        orders = self.orders[index]
        papers = {earlier_order(at): orders[one.step][1] for at, one in enumerate(interval[:-1])}
        papers[LOSS_PROGRAM] = models.traced_loss(self.name)
        body = bytearray(opened.num_bytes)
        opened.write(memoryview(body))
        body += b"".join(papers.values())
        items = [OpeningItem(**item) for item in opened.items]
        items += [OpeningItem(label=label, meta=b"", num_bytes=len(data)) for label, data in papers.items()]
        earlier = [self.worker.sign(one).encode() for one in self.committed[index][max(0, step - len(interval)) : step]]
        return body, items, earlier

    def signed_opening(self, challenge: Challenge, items: list[OpeningItem], body: bytes, order: bytes) -> bytes:
        """What the worker signs when it opens."""
        made = Opening(challenge=challenge.digest(), commitment=challenge.commitment, items=items)
        opened = Opened(
            opening=made.encode(), body_digest=blake3(body).digest(), order_digest=blake3(order).digest()
        )  # fmt: skip
        return self.worker.sign(opened).encode()

    def received(
        self, index: int, commitment: Commitment, challenge: Challenge, signed_opening: bytes, order: bytes,
        earlier: list[bytes], body: bytearray,
    ) -> tuple[Case, memoryview]:  # fmt: skip
        """The validator's check of signatures; raises PeerFault where it would not go on."""
        view = memoryview(body)
        made = opening_of(signed_opening, commitment.worker, challenge.digest(), order, view)
        chain = chain_before(commitment, earlier)
        return Case(self.record, self.specs[index], commitment, challenge, order, made.encode(), chain), view
