"""`DistributedModel`: a plain module, cut into stages that run on workers, used like the module it wraps.

The story of a forward: inputs are flattened and cut into micro-batches (`program/inputs.py`), sent to the first stage
(`pipeline/driver.py`), and come back from the last; `loss.backward()` enters `_Pipeline.backward`, which sends the
gradients the other way. `train_step` leaves the loss to the last stage. How a job comes to be is in `placement.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from smartnodes_core.errors import JobError
from smartnodes_core.records import NO_DIGEST, Verdict
from tensorlink.audit.commitments import input_root
from tensorlink.errors import NonFiniteError, OptimizerError, RemoteParameterError
from tensorlink.pipeline.batching import LossReduction, boundaries, loss_weights, micro_batches
from tensorlink.pipeline.driver import Call
from tensorlink.placement import MAX_STATE_BYTES, Placement, place
from tensorlink.program.inputs import flatten_inputs, unflatten_outputs
from tensorlink.program.loss import trace_loss
from tensorlink.program.values import DTYPES
from tensorlink.program.weights import load
from tensorlink.records import Decide, Prepare, StepOrder

if TYPE_CHECKING:
    from tensorlink.network import Network
    from tensorlink.optimizer import DistributedOptimizer

LossFunction = Callable[..., torch.Tensor]


class DistributedModel(torch.nn.Module):
    """`module`, trained by the workers of `network`.

    `stages` is how many workers share it (default: all that are free), `micro_batches` how many pieces a batch is cut
    into, `example_inputs` a tuple (or a dict, for keyword inputs) of tensors like those of training, batch first. `seed`
    fixes dropout.
    `timeout_s` is the shortest time after which silence of the pipeline is an error; it grows with the steps measured.
    `audit_rates` are (per micro-batch, per step) probabilities; `progress` shows a bar while the job is set up.

    Raises TraceError, PartitionError, NoWorkersError or JobError, each saying what was found, what is needed and what
    to do.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        network: Network,
        stages: int | None = None,
        micro_batches: int = 8,
        example_inputs: tuple[Any, ...] | dict[str, Any],
        seed: int = 0,
        timeout_s: float = 60.0,
        audit_rates: tuple[float, float] | None = None,
        progress: bool = True,
    ):
        super().__init__()
        if micro_batches < 1:
            raise JobError(f"found micro_batches={micro_batches}, needed at least 1")
        self._placement: Placement = place(
            module, network, stages, micro_batches, example_inputs, seed, timeout_s, audit_rates, progress
        )
        self._driver = self._placement.driver
        self._traced = self._placement.traced
        self._micro_batches = micro_batches
        self._parameters_by_name = self._placement.remote_parameters()
        self._optimizer: DistributedOptimizer | None = None
        self._losses: dict[Any, bytes] = {}
        self._step_index = 0
        self._calls: list[Call] = []  # forwards since the last step whose gradients may come
        self._num_calls = 0  # all forwards since the last step, those for evaluation too
        self._input_roots: dict[str, bytes] = {}
        self._dirty = False  # gradients were sent to stages since the last step
        self._closing = threading.Lock()
        self.train(module.training)

    # -- the loop of a PyTorch user -----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output for a batch. Raises NonFiniteError for NaN in the inputs, WorkerLostError,
        DeadlineError.
        """
        flat = flatten_inputs(self._traced, args, kwargs)
        _check_finite(flat)
        grad = torch.is_grad_enabled()
        outputs = _Pipeline.apply(self, flat, grad, _anchor(grad), *[x for x in flat if _wants_grad(x)])
        return unflatten_outputs(self._traced, list(outputs))

    def train_step(
        self,
        *batch: Any,
        loss_fn: LossFunction,
        optimizer: DistributedOptimizer,
        loss_reduction: LossReduction = "mean",
        clip_norm: float | None = None,
    ) -> torch.Tensor:
        """One whole step with the loss computed in the last stage (1F1B): zeroes gradients, trains on `batch`, updates.

        `batch` is the module's inputs followed by the target of `loss_fn(output, target)`. `loss_reduction` says how
        `loss_fn` reduces: "mean" weights micro-batches by samples, "sum" adds, a function `weight_fn(target)` weights
        by what it counts (valid tokens, say). Returns the loss of the whole batch, a scalar without gradient.
        """
        if optimizer is not self._optimizer:
            raise OptimizerError("train_step needs the DistributedOptimizer that was made for this model")
        self._drop_gradients()
        *inputs, target = batch
        flat = flatten_inputs(self._traced, tuple(inputs), {})
        _check_finite([*flat, target])
        pieces, samples = micro_batches(self._traced, flat, self._micro_batches)
        targets = torch.tensor_split(target, boundaries(samples))
        weights = loss_weights(loss_reduction, samples, targets)
        loss_digest = self._loss(loss_fn, targets[0], samples[0])
        call = self._open_call(
            samples,
            {
                "type": "train_step",
                "training": self.training,
                "grad": True,
                "weights": [w.hex() for w in weights],
                "schedule": "1f1b",
            },
        )
        last = self._driver.num_stages - 1
        for micro_batch, piece in enumerate(pieces):
            self._send_inputs(call, micro_batch, piece)
            self._driver.send(last, call, micro_batch, 0, targets[micro_batch], type="target")
        num_units = len(samples)
        prepared = self._driver.start_all("prepare", lambda stage: self._prepare_params(num_units))
        self._driver.wait_for(
            lambda: all(("train_step", 0, stage) in call.done for stage in range(last + 1)), "a training step"
        )
        order = self._order(optimizer, clip_norm, loss_digest, weights)
        self._decide(self._driver.gather(prepared), order, clip_norm)
        return torch.tensor(sum(w * call.losses[i] for i, w in enumerate(weights)), dtype=torch.float32)

    # -- what nn.Module offers, for parameters that are elsewhere -----------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Names as in the wrapped module, with stand-ins that tell shape, dtype and stage."""
        for name, parameter in self._parameters_by_name.items():
            yield (f"{prefix}.{name}" if prefix else name), parameter

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Parameters and buffers fetched from the workers, under the names of the wrapped module, on the CPU."""
        replies = [
            self._driver.call(stage, "state", {}, max_body_bytes=MAX_STATE_BYTES)
            for stage in range(self._driver.num_stages)
        ]
        found: dict[str, torch.Tensor] = {}
        for program, reply in zip(self._placement.programs, replies, strict=True):
            found.update(load(reply.body, program.expected_state()))
        return self._placement.in_module_order(found)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Send weights to the workers. Raises KeyError-like JobError naming what is missing or has another shape."""
        self._placement.send_state(state_dict, strict)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clip all stages' gradients by their global norm at the next `step()`; returns the norm as it is now."""
        if self._optimizer is None:
            raise OptimizerError("clip_grad_norm_ needs a DistributedOptimizer for this model")
        prepared = self._driver.call_all("prepare", lambda stage: self._prepare_params(self._num_units()))
        self._pending_clip = float(max_norm)
        return torch.tensor(sum(_squared_norm(reply) for reply in prepared) ** 0.5)

    _pending_clip: float | None = None

    def report(self) -> dict[str, Any]:
        """Plan, timings, audits, reputations and cost so far, as plain data."""
        return self._placement.report(self._step_index)

    def audits(self) -> dict[str, int]:
        """How many audits of this job have passed, failed, and come to no finding so far."""
        return self._placement.audits()

    def verdicts(self) -> list[Verdict]:
        """Every verdict that auditors have sent so far."""
        return list(self._driver.verdicts)

    def close(self) -> None:
        """End the job: its workers are released. Idempotent."""
        with self._closing:
            self._placement.close()

    def __enter__(self) -> DistributedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DistributedModel(stages={self._driver.num_stages}, step={self._step_index}, {self._placement})"

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        raise RemoteParameterError(
            "the parameters live on workers and keep the wrapped module's dtype and device: move or cast the module "
            "before wrapping it"
        )

    # -- one call -----------------------------------------------------------------------------------------------------

    def _open_call(self, samples: list[int], options: dict[str, Any]) -> Call:
        call = Call(self._step_index, self._num_calls, samples)
        self._num_calls += 1
        self._calls.append(call)
        self._driver.begin(call, options)
        return call

    def _send_inputs(self, call: Call, micro_batch: int, piece: Sequence[Any]) -> None:
        tensors = {}
        for slot, value in enumerate(piece):
            tensors[slot] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            self._driver.send(0, call, micro_batch, slot, tensors[slot], type="activation")
        self._input_roots[f"{call.index}.{micro_batch}"] = input_root(tensors)

    def _run_forward(self, flat: list[Any], grad: bool) -> tuple[Call, list[torch.Tensor]]:
        pieces, samples = micro_batches(self._traced, flat, self._micro_batches)
        call = self._open_call(
            samples,
            {"type": "forward", "training": self.training, "grad": grad, "weights": [], "schedule": "gpipe"},
        )
        for micro_batch, piece in enumerate(pieces):
            self._send_inputs(call, micro_batch, piece)
        slots = range(len(self._placement.programs[-1].outputs.slots))
        wanted = len(samples) * len(slots)
        self._driver.wait_for(lambda: len(call.outputs) == wanted, "the outputs of a forward pass")
        outputs = [torch.cat([call.outputs[(i, slot)] for i in range(len(samples))]) for slot in slots]
        call.outputs.clear()
        if not grad:
            self._calls.remove(call)
            self._driver.forget(call)
        return call, outputs

    def _run_backward(self, call: Call, gradients: Sequence[torch.Tensor | None]) -> dict[int, torch.Tensor]:
        """Send the outputs' gradients through the stages; returns those of the inputs that want one, by slot."""
        if call.step != self._step_index:
            raise JobError("backward through a forward from before the last step(): its activations are gone")
        backward_pass, call.num_backwards = call.num_backwards, call.num_backwards + 1
        self._dirty = True
        params = {
            "step": call.step,
            "call": call.index,
            "backward_pass": backward_pass,
            "num_micro_batches": call.num_micro_batches,
            "retain": False,
        }
        self._driver.tell_all("backward", params)
        last = self._driver.num_stages - 1
        for slot, gradient in enumerate(gradients):
            if gradient is None:
                continue
            for micro_batch, piece in enumerate(torch.tensor_split(gradient, boundaries(call.samples))):
                self._driver.send(
                    last, call, micro_batch, slot, piece, type="activation_gradient", backward_pass=backward_pass
                )
        done = [("backward", backward_pass, stage) for stage in range(last + 1)]
        self._driver.wait_for(lambda: all(item in call.done for item in done), "a backward pass")
        slots = {slot for _, _, slot in call.input_gradients}
        found = {
            slot: torch.cat([call.input_gradients[(backward_pass, i, slot)] for i in range(call.num_micro_batches)])
            for slot in slots
        }
        call.input_gradients.clear()
        return found

    # -- the step -----------------------------------------------------------------------------------------------------

    def _set_optimizer(self, optimizer: DistributedOptimizer) -> None:
        groups = optimizer.wire_options()
        params = {"optimizer": {"name": optimizer.optimizer_name, "groups": groups}}
        self._driver.call_all("set_optimizer", lambda stage: params)
        self._optimizer = optimizer

    def _num_units(self) -> int:
        return sum(call.num_micro_batches * max(1, call.num_backwards) for call in self._calls if call.num_backwards)

    def _prepare_params(self, num_units: int) -> dict[str, Any]:
        job = self._placement.job
        record = Prepare(job=job.id, plan_version=job.plan.version, step=self._step_index, num_units=num_units)
        return {"prepare": record.encode()}

    def _step(self, optimizer: DistributedOptimizer) -> None:
        if optimizer is not self._optimizer:
            raise OptimizerError("this optimizer was replaced by a newer one for the same model")
        num_units = self._num_units()
        if not num_units:
            return  # torch's optimizers do nothing either when no parameter has a gradient
        prepared = self._driver.call_all("prepare", lambda stage: self._prepare_params(num_units))
        clip_norm, self._pending_clip = self._pending_clip, None
        self._decide(prepared, self._order(optimizer, clip_norm, NO_DIGEST, []), clip_norm)

    def _order(
        self, optimizer: DistributedOptimizer, clip_norm: float | None, loss: bytes, weights: Sequence[float]
    ) -> StepOrder:
        job = self._placement.job
        return StepOrder(
            job=job.id,
            plan_version=job.plan.version,
            step=self._step_index,
            input_root=self._placement.step_input_root(self._input_roots),
            target_root=NO_DIGEST,
            loss=loss,
            loss_weights=[weight.hex() for weight in weights],
            loss_scale="",
            clip_norm="" if clip_norm is None else clip_norm.hex(),
            optimizer=optimizer.optimizer_name,
            options=optimizer.wire_options(),
        )

    def _decide(self, prepared: list[Any], order: StepOrder, clip_norm: float | None) -> None:
        """Commit on every stage, or abort on every stage and raise NonFiniteError."""
        found = [str(reply.params["non_finite"]) for reply in prepared]
        bad = next(((stage, name) for stage, name in enumerate(found) if name), None)
        norm = sum(_squared_norm(reply) for reply in prepared) ** 0.5
        # as torch.nn.utils.clip_grad_norm_: the coefficient is applied only where it shrinks
        coefficient = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        signed = self._placement.sign(order)
        decide = Decide(
            job=order.job,
            plan_version=order.plan_version,
            step=order.step,
            decision="abort" if bad else "commit",
            clip_coefficient=coefficient.hex(),
            order=order.digest(),
        )
        self._driver.call_all("decide", lambda stage: {"decide": decide.encode()}, [signed])
        self._end_step(committed=bad is None)
        if bad is not None:
            raise NonFiniteError(
                f"the gradient of {bad[1]} (stage {bad[0]}) is not finite at step {order.step}: the step was dropped "
                "on every stage and no parameter changed; lower the learning rate, clip gradients, or look at the batch"
            )

    def _drop_gradients(self) -> None:
        """What `zero_grad` means: gradients since the last step are dropped on every stage."""
        if self._dirty:
            self._driver.call_all("zero_grad", lambda stage: {"step": self._step_index})
            self._end_step(committed=False)

    def _end_step(self, committed: bool) -> None:
        for call in self._calls:
            self._driver.forget(call)
        self._calls.clear()
        self._num_calls = 0
        self._input_roots.clear()
        self._dirty = False
        self._step_index += committed

    def _loss(self, loss_fn: LossFunction, target: torch.Tensor, num_samples: int) -> bytes:
        """The digest of the loss program of `loss_fn`, traced and given to the last stage once per kind of target."""
        key = (loss_fn, target.dtype, tuple(target.shape[1:]))
        if key not in self._losses:
            program = trace_loss(loss_fn, self._example_output(num_samples), target)
            self._losses[key] = self._placement.send_loss(program)
        return self._losses[key]

    def _example_output(self, num_samples: int) -> Any:
        """Something of the shape of the model's output for a micro-batch, to trace a loss with."""
        slots = self._traced.outputs.slots
        tensors = [
            torch.zeros([num_samples if size == -1 else size for size in slot.shape], dtype=DTYPES[slot.dtype])
            for slot in slots
        ]
        return unflatten_outputs(self._traced, tensors)


class _Pipeline(torch.autograd.Function):
    """The pipeline as one node of the user's autograd graph."""

    @staticmethod
    def forward(ctx: Any, model: DistributedModel, flat: list[Any], grad: bool, anchor: Any, *wanting: Any) -> Any:
        call, outputs = model._run_forward(flat, grad)
        ctx.model, ctx.call = model, call
        ctx.slots = [slot for slot, value in enumerate(flat) if _wants_grad(value)]
        ctx.mark_non_differentiable(*[output for output in outputs if not output.is_floating_point()])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        found = ctx.model._run_backward(ctx.call, gradients)
        return (None, None, None, None, *[found[slot] for slot in ctx.slots])


def _anchor(grad: bool) -> torch.Tensor:
    """An input that needs a gradient, so that autograd calls us although every parameter is elsewhere."""
    return torch.zeros((), requires_grad=grad)


def _wants_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _squared_norm(reply: Any) -> float:
    return float.fromhex(reply.params["squared_norm"])


def _check_finite(values: Sequence[Any]) -> None:
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            rows = (~torch.isfinite(value.reshape(len(value), -1)).all(dim=1)).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"input {index} holds NaN or infinity in sample {rows[0]}"
                f"{f' and {len(rows) - 1} more' if len(rows) > 1 else ''}: clean the batch before training on it"
            )
