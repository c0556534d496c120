"""One optimizer step over all stages: every stage says whether it can, the user signs the order, all commit or none.

Neighbours: `calls.py` counts what the step consists of, `optimizer.py` is the face, `train_step.py` a whole step in
one call.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from smartnodes_core.errors import JobError
from smartnodes_core.records import NO_DIGEST
from tensorlink.calls import Calls
from tensorlink.errors import NonFiniteError, OptimizerError
from tensorlink.pipeline.backward import Norm
from tensorlink.pipeline.driver import norm_of
from tensorlink.placement import Placement
from tensorlink.records import Decide, Prepare, StepOrder
from tensorlink.sharding.memory import optimizer_copies

if TYPE_CHECKING:
    from tensorlink.optimizer import DistributedOptimizer


class SignedOrder(NamedTuple):
    """What a step is to be, and the author's signature on it."""

    order: StepOrder
    signed: bytes


class Steps:
    """The steps of one job."""

    def __init__(self, placement: Placement, calls: Calls):
        self._placement, self._calls = placement, calls
        self._driver, self._private = placement.driver, placement.private
        self._optimizer: DistributedOptimizer | None = None
        self._clip_norm: float | None = None
        self._replaced: set[Literal["weights", "buffers", "optimizer"]] = set()  # since the last step

    def set_optimizer(self, optimizer: DistributedOptimizer) -> None:
        """Every stage gets this optimizer with fresh state; gradients so far are dropped."""
        self.drop_gradients()
        self._private.set_optimizer(optimizer.optimizer_name, optimizer.wire_options())
        content = {"name": optimizer.optimizer_name, "groups": optimizer.wire_options()}
        data = json.dumps(content).encode()  # in the body: the names of a large model's parameters fill no header
        self.replaces("optimizer")
        self._driver.call_all("set_optimizer", lambda stage: {}, lambda stage: [data])
        self._optimizer = optimizer
        copies = optimizer_copies(optimizer.optimizer_name, optimizer.defaults)
        self._placement.training = replace(self._placement.training, optimizer_copies=copies)

    def check(self, optimizer: object) -> None:
        """Raises OptimizerError unless this is the optimizer in force."""
        if optimizer is not self._optimizer:
            raise OptimizerError(
                "the model follows another optimizer: use the DistributedOptimizer that was made last for this model"
            )

    def clip(self, max_norm: float) -> float:
        """Clip at the next step; returns the norm over all gradients as they are now."""
        if self._optimizer is None:
            raise OptimizerError("clip_grad_norm_ needs a DistributedOptimizer for this model: make one first")
        if not max_norm > 0:
            raise JobError(f"found max_norm={max_norm}, needed more than 0")
        norm = _norm(self.prepare(self._calls.num_units))
        self._clip_norm = float(max_norm)
        return norm

    def step(self, optimizer: DistributedOptimizer) -> None:
        """Commit what backwards have added up. Nothing to do, as with torch's optimizers, where there were none."""
        self.check(optimizer)
        self._calls.free_dropped()
        num_units = self._calls.num_units
        if num_units:
            clip_norm, self._clip_norm = self._clip_norm, None
            prepared = self.prepare(num_units)
            self.decide(prepared, self.order(optimizer, NO_DIGEST, [], clip_norm))

    def drop_gradients(self) -> None:
        """What `zero_grad` means: gradients since the last step are dropped on every stage."""
        self._clip_norm = None
        if self._calls.dirty:
            self.replaces("buffers")  # they keep what the forwards did that now belong to no step
            self._driver.call_all("zero_grad", lambda stage: {"step": self._calls.step_index})
            self._private.zero_grad()
            self._calls.end(committed=False)

    def start_over(self) -> None:
        """Weights are about to change other than by a step: what was computed with the old ones is dropped, graphs
        too."""
        self._clip_norm = None
        self.replaces("weights", "buffers")
        if self._calls.num_calls:
            self._driver.call_all("zero_grad", lambda stage: {"step": self._calls.step_index})
            self._private.zero_grad()
            self._calls.end(committed=False)

    def replaces(self, *parts: Literal["weights", "buffers", "optimizer"]) -> None:
        """The state is about to change other than by a step: the next order tells auditors so."""
        self._replaced.update(parts)

    def prepare(self, num_units: int, told: Mapping[int, Norm] | None = None) -> list[Norm]:
        """Each stage's squared gradient norm, and the first of its gradients that is not finite ("" for none); at the
        end those of the private layers. Where every stage has `told` already, none is asked."""
        if told is not None and len(told) == self._driver.num_stages:
            return [*(told[stage] for stage in range(len(told))), self._private.squared_norm()]
        job = self._placement.job
        record = Prepare(job=job.id, plan_version=job.plan.version, step=self._calls.step_index, num_units=num_units)
        # holders of tied parameters send each other their sums before they answer
        wait_s = math.ceil(self._driver.transfer_s(self._placement.tied_bytes))
        params = {"prepare": record.encode(), "wait_s": wait_s}
        replies = self._driver.call_all("prepare", lambda stage: params, wait_s=wait_s)
        return [*(norm_of(reply.params) for reply in replies), self._private.squared_norm()]

    def decide(self, prepared: Sequence[Norm], signed_order: SignedOrder) -> None:
        """Commit on every stage, or abort on every stage and raise NonFiniteError."""
        order, signed = signed_order
        clip_norm = float.fromhex(order.clip_norm) if order.clip_norm else None
        bad = next(((stage, name) for stage, (_, name) in enumerate(prepared) if name), None)
        # as torch.nn.utils.clip_grad_norm_: the coefficient is applied only where it shrinks
        coefficient = 1.0 if clip_norm is None else min(1.0, clip_norm / (_norm(prepared) + 1e-6))
        decide = Decide(
            job=order.job,
            plan_version=order.plan_version,
            step=order.step,
            decision="abort" if bad else "commit",
            clip_coefficient=(1.0 if bad else coefficient).hex(),
            order=order.digest(),
        )
        if bad is None:
            self._driver.contradictions.ordered(order)
        self._driver.call_all("decide", lambda stage: {"decide": decide.encode()}, lambda stage: [signed])
        if bad is None:
            self._private.commit(float.fromhex(decide.clip_coefficient), order.options)
        else:
            self._private.abort()
        self._calls.end(committed=bad is None)
        if bad is None:
            self._replaced.clear()
        else:
            where = f"stage {bad[0]}" if bad[0] < self._driver.num_stages else "a private layer"
            raise NonFiniteError(
                f"the gradient of {bad[1]} ({where}) is not finite at step {order.step}: the step was dropped "
                "on every stage and no parameter changed; lower the learning rate, clip gradients, or look at the batch"
            )

    def order(
        self, optimizer: DistributedOptimizer, loss: bytes, weights: Sequence[float], clip_norm: float | None
    ) -> SignedOrder:
        """The order of the open step, all of whose inputs have been sent. It binds nobody before `decide`."""
        job = self._placement.job
        input_root, target_root = self._calls.data_roots()
        order = StepOrder(
            job=job.id,
            plan_version=job.plan.version,
            step=self._calls.step_index,
            input_root=input_root,
            target_root=target_root,
            loss=loss,
            loss_weights=[weight.hex() for weight in weights],
            loss_scale="",
            clip_norm="" if clip_norm is None else clip_norm.hex(),
            optimizer=optimizer.optimizer_name,
            options=optimizer.wire_options(),
            replaced=sorted(self._replaced),
        )
        return SignedOrder(order, self._placement.sign(order))


def _norm(prepared: Sequence[Norm]) -> float:
    return sum(squared_norm for squared_norm, _ in prepared) ** 0.5
