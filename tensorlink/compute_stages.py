"""What the computing process serves about stages: methods, one-way messages and events of the pipe.

Calls: `load`, `load_part`, `load_end`, `set_loss`, `set_optimizer`, `prepare`, `decide`, `zero_grad`, `open`, `shards`,
`unload`, and those of `compute_state.py`. One-way: `begin`, `backward`,
`drop_call`, `tensor`, `shared` (a tied parameter's sum). Events: `send`, `loss`, `done`, `commitment`, `failed` (and
`released`, which the channel sends). Every message names its stage by `key`; tensors lie in the arenas and are named by
`offset` and `num_bytes`.
"""

from __future__ import annotations

import functools
import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smartnodes_core.errors import AuditError, DeadlineError, ProtocolError, SmartnodesError
from smartnodes_core.sandbox_child import ChildChannel
from tensorlink.allocator import give_back_freed_memory
from tensorlink.audit import commitments
from tensorlink.audit.opening import opening
from tensorlink.audit.openings import Openings
from tensorlink.compute_errors import translated
from tensorlink.compute_port import ChannelPort
from tensorlink.compute_state import StateDesk
from tensorlink.errors import TensorError
from tensorlink.hosted import Hosted, Waiting
from tensorlink.later import Later
from tensorlink.pipeline.executor import Ready
from tensorlink.pipeline.headers import CALL_FIELDS, SHARED_FIELDS
from tensorlink.pipeline.inbox import Delivery
from tensorlink.pipeline.stage import Place, Stage
from tensorlink.pipeline.tied import SumId
from tensorlink.program.admission import Bounds
from tensorlink.program.graph import LossProgram, StageProgram
from tensorlink.program.limits import check
from tensorlink.program.values import DTYPES
from tensorlink.stage_loading import Loading
from tensorlink.steplog.digests import root
from tensorlink.steplog.shelf import Shelf

if TYPE_CHECKING:
    from tensorlink.tensor_parallel.ranks import Ranks

#: Caps of one stage where the node sets none.
MAX_STAGE_BYTES = 1 << 40
MAX_STAGE_FLOPS = 1 << 60
MAX_DIMS = 32
#: The log keeps at most this share of the inbound arena; beyond it, it copies.
LOG_SHARE = 4
#: A window of committed steps stays in memory where it takes at most this share of what the rig offers.
WINDOW_SHARE = 4
#: What a step keeps per byte of parameters under an optimizer like Adam: weights, two moments, the gradient.
STATE_COPIES = 4
OPEN_TIMEOUT_S = 30.0
#: How long a prepare waits for what it needs where the node says nothing.
PREPARE_TIMEOUT_S = 120.0


class Stages:
    """All stages of this process, by key."""

    def __init__(self, channel: ChildChannel) -> None:
        self._channel = channel
        self._shelf = Shelf(channel.scratch, channel.limits.file_bytes) if channel.scratch >= 0 else None
        self._hosted: dict[str, Hosted] = {}
        #: What one micro-batch may cost; `compute.py` puts what was measured here.
        self.bounds = Bounds(channel.limits.memory_bytes or MAX_STAGE_BYTES, MAX_STAGE_FLOPS)
        #: The ranks of a rig of several devices; `compute.py` puts them here.
        self.ranks: Ranks | None = None
        self._loading = Loading()
        self._openings = Openings()
        self._states = StateDesk(channel, self._of, self._loading)
        self._turn = 0
        self.methods: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "load": self._load,
            "load_part": self._load_part,
            "load_end": self._load_end,
            "set_loss": self._set_loss,
            "set_optimizer": self._set_optimizer,
            "begin": self._begin,
            "backward": self._backward,
            "drop_call": self._drop_call,
            "tensor": self._tensor,
            "shared": self._shared,
            "zero_grad": self._zero_grad,
            "open": self._open,
            "open_part": self._open_part,
            "unload": self._unload,
            "shards": self._shards,
            **self._states.methods,
        }

    # -- the loop's side ----------------------------------------------------------------------------------------------

    def run_one(self) -> bool:
        """Runs one action: jobs take turns, among a job's stages the schedule says; False where none is ready."""
        ready: dict[tuple[bytes, int, int], tuple[Hosted, Ready]] = {}
        for one in self._hosted.values():
            found = one.stage.ready() if one.failed is None else None
            if found is not None:
                place = one.stage.place
                job = (place.job, place.plan_version, place.replica)
                if job not in ready or found.rank < ready[job][1].rank:
                    ready[job] = (one, found)
        if not ready:
            return False
        self._turn += 1
        one, found = list(ready.values())[self._turn % len(ready)]
        try:
            one.stage.run(found)
        except Exception as error:
            self.fail(one.key, translated(error))
        return True

    def _neighbour(self, place: Place, to: str | int) -> Stage | None:
        """The stage of the same job before or after one, or with a number, where this process has it."""
        if to == "user":
            return None
        wanted = replace(place, stage=to if isinstance(to, int) else place.stage + (1 if to == "next" else -1))
        found = (one for one in self._hosted.values() if one.stage.place == wanted and one.failed is None)
        one = next(found, None)
        return one.stage if one is not None else None

    def fail(self, key: str, error: SmartnodesError) -> None:
        """A stage cannot go on: tells the node and fails what waits for it."""
        one = self._hosted.get(key)
        if one is not None:
            if one.failed is not None:
                return  # the node knows
            one.failed = error
            for waiting in one.prepares:
                self._channel.fail(waiting.call_id, error)
            one.prepares.clear()
        self._channel.event("failed", {"key": key, "code": error.code, "message": str(error)[:2000]})

    def prepare(self, call_id: int, params: dict[str, Any]) -> None:
        """Answers with `squared_norm` and `non_finite` once `num_units` backwards of micro-batches are in this step's
        sum, and the sums of tied parameters have come from their other holders; fails after `wait_s`."""
        one = self._of(params)
        wait_s = min(float(params.get("wait_s", PREPARE_TIMEOUT_S)), threading.TIMEOUT_MAX)
        waiting = Waiting(call_id, int(params["step"]), int(params["num_units"]), time.monotonic() + wait_s)
        one.prepares.append(waiting)

    def tend_prepares(self) -> None:
        """Answers the prepares that have what they need, and fails those that have waited too long.

        All stages send their sums before any is answered: stages of this process send them to each other.
        """
        for act in (self._share, self._answer):
            for one in list(self._hosted.values()):
                for waiting in list(one.prepares):
                    try:
                        if one.failed is None:
                            act(one, waiting)
                    except Exception as error:
                        self.fail(one.key, translated(error))

    def patience_s(self) -> float | None:
        """Seconds until the next prepare has waited too long; None where none waits."""
        deadlines = [waiting.deadline_s for one in self._hosted.values() for waiting in one.prepares]
        return max(0.001, min(deadlines) - time.monotonic()) if deadlines else None

    @property
    def has_hashing(self) -> bool:
        """Whether something is still to be hashed that has not begun."""
        return any(one.pool.waits for one in self._hosted.values())

    def begin_hashing(self) -> None:
        """There is time for it now: what the stages have to hash is begun."""
        for one in self._hosted.values():
            one.pool.begin()

    def _share(self, one: Hosted, waiting: Waiting) -> None:
        if one.stage.num_units >= waiting.num_units:
            one.stage.share(waiting.step)

    def _answer(self, one: Hosted, waiting: Waiting) -> None:
        units = one.stage.num_units
        late = one.stage.share(waiting.step) if units >= waiting.num_units else []
        lacks = ""
        if units < waiting.num_units:
            lacks = f"{units} of {waiting.num_units} backwards of micro-batches are in"
        elif late:
            lacks = f"the sums of tied parameters have not come from stage {', '.join(map(str, late))}"
        if not lacks:
            total, bad = one.stage.squared_norm(waiting.step)
            one.prepares.remove(waiting)
            self._channel.reply(waiting.call_id, {"squared_norm": total.hex(), "non_finite": bad})
        elif waiting.deadline_s <= time.monotonic():
            one.prepares.remove(waiting)
            here = f"stage {one.stage.place.stage} cannot prepare step {waiting.step}"
            self._channel.fail(waiting.call_id, DeadlineError(f"{here}: {lacks}"))

    def decide(self, call_id: int, params: dict[str, Any]) -> None:
        """Commits or drops the step; answers first and hashes afterwards, beside the next step's work."""
        one, step, decision = self._of(params), int(params["step"]), params["decision"]
        if decision not in ("commit", "abort"):
            raise ProtocolError(f"a step is decided by commit or abort, found {decision!r:.20}")
        one.wait_for_hashing()
        if decision == "abort":
            one.stage.abort(step)
            self._channel.reply(call_id, {"step": step})
            return
        if one.stage.optimizer and params["optimizer"] != one.stage.optimizer.name:  # an auditor goes by the order
            raise ProtocolError(f"ordered was {params['optimizer']!r:.40}, this stage has {one.stage.optimizer.name}")
        record = one.stage.commit(
            step,
            float.fromhex(params["clip_coefficient"]),
            params["options"],
            bytes(params.get("order", b"")),
            str(params.get("clip_norm", "")),
        )
        self._channel.reply(call_id, {"step": step})
        optimizer = one.stage.optimizer.state_tensors() if one.stage.optimizer else {}

        def hash_and_tell() -> None:
            gradient = root(record.gradient)
            one.stage.put_gradient_away(record)  # before the next step's first gradients come
            content = commitments.build(record, gradient, one.roots, one.stage.parameters, optimizer, one.work_units)
            one.committed.add(step)
            self._channel.event("commitment", {"key": one.key, **content})
            one.stage.put_away(record)

        one.hashing = one.pool.submit(hash_and_tell)

    # -- loading ------------------------------------------------------------------------------------------------------

    def _load(self, params: dict[str, Any]) -> dict[str, Any]:
        key = str(params["key"])
        if key in self._hosted:
            raise ProtocolError(f"stage {key!r:.80} is loaded already")
        program = StageProgram.from_json(params["program"])
        limits = params.get("limits") or {}
        bounds = Bounds(
            int(limits.get("max_bytes", self.bounds.max_bytes)), int(limits.get("max_flops", self.bounds.max_flops))
        )
        estimate = check(
            program, batch=int(limits.get("batch", 1)), max_bytes=bounds.max_bytes, max_flops=bounds.max_flops
        )
        place = Place(
            bytes(params["job"]),
            *(int(params[name]) for name in ("plan_version", "replica", "stage", "num_stages", "seed")),
        )
        if (program.stage_index, program.num_stages) != (place.stage, place.num_stages):
            raise ProtocolError(
                f"the program is stage {program.stage_index} of {program.num_stages}, it was sent for {place.stage} of "
                f"{place.num_stages}"
            )
        work_units = estimate.flops_forward + estimate.flops_backward

        def finish(state: dict[str, Tensor], digests: Mapping[str, bytes] | None) -> dict[str, Any]:
            batch = int(limits.get("batch", 1))
            kept = {name: int(params[name]) for name in ("window_steps", "state_interval_steps")}
            one = self._host(key, place, program, state, kept, bounds, batch)
            one.work_units = work_units
            self._hosted[key] = one
            if params.get("loss_program"):
                one.stage.set_loss(LossProgram.from_json(params["loss_program"]))
            if params.get("optimizer"):
                one.stage.set_optimizer(params["optimizer"]["name"], params["optimizer"]["groups"])
            roots = {"initial_root": commitments.initial_root_of(program, digests)} if digests is not None else {}
            return {**roots, "tied_with": one.stage.tied.ties.others}

        self._loading.begin(key, program.expected_state(), finish)
        return {
            "work_units": work_units,
            "memory_bytes": estimate.parameter_bytes + estimate.saved_bytes + estimate.peak_activation_bytes,
        }

    def _load_part(self, params: dict[str, Any]) -> dict[str, Any]:
        offset = int(params["offset"])
        try:
            data = self._channel.inbound.view(offset, int(params["num_bytes"]))
            self._loading.put(str(params["key"]), int(params["part"]), data)
        finally:
            self._channel.release(offset)
        return {}

    def _load_end(self, params: dict[str, Any]) -> dict[str, Any]:
        return self._loading.end(str(params["key"]))

    def _host(
        self,
        key: str,
        place: Place,
        program: StageProgram,
        state: dict[str, Tensor],
        kept: dict[str, int],
        bounds: Bounds,
        batch: int,
    ) -> Hosted:
        parameters = {
            name: state[name].requires_grad_(spec.requires_grad and state[name].is_floating_point())
            for name, spec in program.parameters.items()
        }
        buffers = {name: state[name] for name in program.buffers}
        pool = Later("hashing")
        make = self.make_stage
        if self.ranks is not None:
            from tensorlink.tensor_parallel.stage import TensorParallelStage

            make = functools.partial(TensorParallelStage, self.ranks, batch)
        stage = make(
            place,
            program,
            parameters,
            buffers,
            ChannelPort(self._channel, key, place.stage, lambda to: self._neighbour(place, to)),
            pool,
            shared_bytes=self._channel.inbound.num_bytes // LOG_SHARE,
            shelf=self._shelf_for(program, kept["window_steps"]),
            **kept,
            bounds=bounds,
        )
        return Hosted(key, stage, commitments.Roots(), 0, pool)

    def _shelf_for(self, program: StageProgram, window: int) -> Shelf | None:
        """The shelf, where a window of steps would take too large a part of this rig's memory."""
        sizes = (math.prod(spec.shape) * DTYPES[spec.dtype].itemsize for spec in program.parameters.values())
        return self._shelf if STATE_COPIES * sum(sizes) * window > self.bounds.max_bytes // WINDOW_SHARE else None

    #: What a stage is made with; a test's own computing process puts a cheating one here.
    make_stage: Callable[..., Stage] = Stage

    def _unload(self, params: dict[str, Any]) -> dict[str, Any]:
        self._loading.drop(str(params["key"]))
        self._openings.drop(str(params["key"]))
        self._states.drop(str(params["key"]))
        one = self._hosted.pop(str(params["key"]), None)
        if one is not None:
            one.pool.shutdown(wait=True)  # the last step's commitment goes out
            one.stage.close()
            del one
            give_back_freed_memory()
        return {}

    def _shards(self, params: dict[str, Any]) -> dict[str, Any]:
        """How a stage lies on the devices of this rig: its plan for people, and bytes on each."""
        return self._of(params).stage.shards()

    def _set_loss(self, params: dict[str, Any]) -> dict[str, Any]:
        self._of(params).stage.set_loss(LossProgram.from_json(params["loss_program"]))
        return {}

    def _set_optimizer(self, params: dict[str, Any]) -> dict[str, Any]:
        one = self._of(params)
        one.wait_for_hashing()
        one.stage.set_optimizer(str(params["optimizer"]["name"]), params["optimizer"]["groups"])
        one.roots.forget()
        return {}

    def _zero_grad(self, params: dict[str, Any]) -> dict[str, Any]:
        one = self._of(params)
        one.stage.zero_grad(int(params.get("step", one.stage.step)))
        return {}

    # -- one-way ------------------------------------------------------------------------------------------------------

    def _begin(self, params: dict[str, Any]) -> dict[str, Any]:
        one = self._of(params)
        one.pool.begin()  # of the last step, beside this one
        one.stage.begin(params)
        return {}

    def _backward(self, params: dict[str, Any]) -> dict[str, Any]:
        self._of(params).stage.begin_backward(params)
        return {}

    def _drop_call(self, params: dict[str, Any]) -> dict[str, Any]:
        self._of(params).stage.drop_call(int(params["step"]), int(params["call"]))
        return {}

    def _tensor(self, params: dict[str, Any]) -> dict[str, Any]:
        tensor = self._wrap(params)
        step, call, micro_batch, slot, backward_pass = _counts(params, CALL_FIELDS)
        delivery = Delivery(step, call, micro_batch, str(params["type"]), backward_pass)
        self._of(params).stage.receive(delivery, slot, tensor)
        return {}

    def _shared(self, params: dict[str, Any]) -> dict[str, Any]:
        tensor = self._wrap(params)
        step, call, num_units, from_stage, slot = _counts(params, SHARED_FIELDS)
        self._of(params).stage.receive_sum(SumId(step, call, num_units), from_stage, slot, tensor)
        return {}

    def _wrap(self, params: dict[str, Any]) -> Tensor:
        """The tensor over shared memory; the slice goes back to the node when the last view of it is gone."""
        offset, num_bytes, shape = int(params["offset"]), int(params["num_bytes"]), list(params["shape"])
        view = self._channel.inbound.view(offset, num_bytes)
        # torch keeps the memoryview alive for as long as any tensor uses its memory
        weakref.finalize(view, self._channel.release, offset).atexit = False
        dtype = DTYPES.get(params["dtype"])
        if dtype is None or len(shape) > MAX_DIMS or not all(type(size) is int and size >= 0 for size in shape):
            raise TensorError(f"a tensor of {params['dtype']!r:.20} {shape!r:.80}")
        if math.prod(max(size, 1) for size in shape) >= 1 << 60:
            raise TensorError(f"a shape {shape!r:.80} that no tensor can have")
        if math.prod(shape) * dtype.itemsize != num_bytes:
            raise TensorError(f"{num_bytes} bytes are not {params['dtype']} {shape}")
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(view, dtype=torch.uint8).view(dtype).reshape(shape)

    # -- audits ------------------------------------------------------------------------------------------------------

    def _open(self, params: dict[str, Any]) -> dict[str, Any]:
        """The data behind a committed step: `items` lie one after the other in `num_bytes`, which `open_part` gives.
        Raises AuditError if it is gone."""
        one, step = self._of(params), int(params["step"])
        one.wait_for_hashing()
        interval = one.stage.log.interval(step)
        if not interval:
            held = one.stage.log.steps()
            raise AuditError(f"step {step} is not held (any more): the window holds {held[:1]} to {held[-1:]}")
        state_after = one.stage.state_after(interval[-1])
        opened = opening(interval, int(params["tier"]), int(params["unit"]), *state_after)
        number = self._openings.begin(one.key, opened)
        earlier = [record.step for record in interval[:-1]]
        return {"items": opened.items, "earlier_steps": earlier, "opening": number, "num_bytes": opened.num_bytes}

    def _open_part(self, params: dict[str, Any]) -> dict[str, Any]:
        """Bytes `at` and following of what `open` named. Raises AuditError if it was given up."""
        return self._openings.part(self._channel, int(params["opening"]), int(params["at"]), int(params["num_bytes"]))

    def _of(self, params: dict[str, Any]) -> Hosted:
        one = self._hosted.get(str(params["key"]))
        if one is None:
            raise ProtocolError(f"no stage {str(params['key'])[:80]!r} is loaded")
        if one.failed is not None:
            raise one.failed
        return one


def _counts(params: dict[str, Any], names: Sequence[str]) -> list[int]:
    counts = [int(params[name]) for name in names]
    if min(counts) < 0:
        raise ProtocolError(f"a tensor's {', '.join(names)} are counted from 0")
    return counts
