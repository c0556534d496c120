"""`DistributedModel`: a plain module, cut into stages that run on workers, used like the module it wraps.

This is the face. How a job comes to be is in `placement.py`; forwards and backwards are in `calls.py`, the optimizer's
step in `steps.py`, a whole step at once in `train_step.py`, weights in `remote_state.py`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch

from smartnodes_core.errors import JobError
from smartnodes_core.records import Verdict
from tensorlink.calls import Calls
from tensorlink.checkpoint import Checkpoints
from tensorlink.errors import RemoteParameterError
from tensorlink.pipeline.batching import LossReduction
from tensorlink.pipeline.schedule import Timetable
from tensorlink.placement import place
from tensorlink.recovery.recovery import Recovered, Recovery
from tensorlink.sharding.private import Private
from tensorlink.steps import Steps
from tensorlink.train_step import LossFunction, TrainStep
from tensorlink.weight_files import Weights

if TYPE_CHECKING:
    from tensorlink.network import Network
    from tensorlink.optimizer import DistributedOptimizer
    from tensorlink.program.graph import StageProgram

#: The announcement of a call lists its micro-batches in a frame's header, which is small.
MAX_MICRO_BATCHES = 1024


class DistributedModel(torch.nn.Module):
    """`module`, trained by the workers of `network`.

    `stages` is how many workers share it (default: all that are free, but for those so slow that a step takes longer
    with them), `micro_batches` how many pieces a batch is cut
    into, `example_inputs` a tuple (or a dict, for keyword inputs) of tensors like those of training, batch first.
    `seed` fixes dropout.
    `timeout_s` is the shortest time after which silence of the pipeline is an error; it grows with what is measured.
    `weights` names safetensors files (one, several, a folder, an index) with the values that stages start from: names
    as in `module.state_dict()`, dtypes and shapes as in the module. What no file has is taken from the module, which
    may be on the meta device: values are then read while they are sent and never all in memory here.
    `audit_rates` are (per micro-batch, per step) probabilities; `progress` shows a bar while the job is set up.
    `schedule` is that of `train_step`: "1f1b" or "gpipe", or "auto" for what is predicted to be fastest in the workers'
    memory. The loop with `loss.backward()` runs all forwards before the first backward, whatever the schedule: with
    "gpipe" the plan reckons with the memory that this takes.
    `private` layers stay on this machine: "first" (no worker sees inputs), "last" (nor labels) or "both" keep the
    outermost layer with parameters, a list of submodules' names or patterns at least those. Workers see the
    activations and gradients that cross to them; that is no encryption.
    `autocast` is a dtype (`torch.bfloat16`) to compute the module, and the loss of `train_step`, as under
    `torch.autocast`.

    An output that is a scalar, such as a loss that the module computes, is the average over micro-batches, weighted by
    their samples, and so are its gradients: what the module gives for the whole batch where the scalar is a mean over
    samples.

    A worker that is lost is replaced, and what was done since the last snapshot is done again on the new one, bit for
    bit: nothing has to be done here. `on_fraud` says what happens when one is found to have cheated: "rollback" goes
    back an audit window before the step that was found false, "continue" replaces the worker alone.

    The activations of a forward whose graph is dropped are freed on the workers with the next forward or step.

    Raises TraceError, InputError, PartitionError, NoWorkersError or JobError, each saying what was found, what is
    needed and what to do.
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
        schedule: str = "auto",
        private: Private = (),
        autocast: torch.dtype | None = None,
        weights: Weights | None = None,
        on_fraud: Literal["rollback", "continue"] = "rollback",
    ):
        super().__init__()
        if on_fraud not in ("rollback", "continue"):
            raise JobError(f"found on_fraud={on_fraud!r:.40}, needed 'rollback' or 'continue'")
        if not 1 <= micro_batches <= MAX_MICRO_BATCHES:
            raise JobError(f"found micro_batches={micro_batches}, needed 1 to {MAX_MICRO_BATCHES}")
        self._placement = place(
            module,
            network,
            stages,
            micro_batches,
            example_inputs,
            seed,
            timeout_s,
            audit_rates,
            progress,
            schedule,
            private,
            autocast,
            weights,
        )
        self._driver = self._placement.driver
        self._remote = self._placement.state.remote_parameters()
        self._calls = Calls(self._placement, micro_batches)
        self._steps = Steps(self._placement, self._calls)
        self._train_step = TrainStep(self._placement, self._calls, self._steps, isinstance(example_inputs, dict))
        self._recovery = Recovery(self._placement, self._calls, self._steps, on_fraud)
        self._recovery.on_begun.append(self._train_step.begin_anew)
        self._placement.on_close = self._recovery.stop
        self._calls.recovery = self._steps.recovery = self._train_step.recovery = self._recovery
        self._checkpoints = Checkpoints(self._placement, self._calls, self._steps)
        self._closing = threading.Lock()
        self.train(module.training)

    # -- the loop of a PyTorch user -----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output for a batch. Raises InputError for other inputs than were traced, NonFiniteError for NaN
        in them, WorkerLostError, DeadlineError.
        """
        return self._calls.forward(args, kwargs, self.training)

    def train_step(
        self,
        *batch: Any,
        loss_fn: LossFunction,
        optimizer: DistributedOptimizer,
        loss_reduction: LossReduction = "mean",
        clip_norm: float | None = None,
    ) -> torch.Tensor:
        """One whole step with the loss computed in the last stage: zeroes gradients, trains on `batch`, updates.

        `batch` is the module's inputs (one map, for a module traced with keywords) followed by the target of
        `loss_fn(output, target)`: a tensor, or tensors in tuples, lists and dicts. `loss_fn` is traced once: what it
        reads besides is as it was then. `loss_reduction` says how it reduces: "mean" weights micro-batches by samples,
        "sum" adds, a function `weight_fn(target)` weights by what it counts (valid tokens, say). Returns the loss of
        the whole batch, a scalar without gradient. Raises TraceError for a loss that cannot be traced or is no scalar,
        and what `forward` and `optimizer.step()` raise.
        """
        return self._train_step.run(batch, loss_fn, optimizer, loss_reduction, clip_norm, self.training)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clip all stages' gradients by their global L2 norm at the next `step()`; returns the norm as it is now.

        As `torch.nn.utils.clip_grad_norm_`, but that the norm is summed in double precision.
        """
        return torch.tensor(self._steps.clip(max_norm))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that were accumulated since the last step."""
        self._steps.drop_gradients()

    # -- what nn.Module offers, for parameters that are elsewhere -----------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Names as in the wrapped module, with stand-ins that tell shape, dtype and stage.

        A tied parameter comes under its first name, with `remove_duplicate=False` under each.
        """
        for name, parameter in self._remote.items():
            if (recurse or "." not in name) and not (remove_duplicate and name != parameter.remote_name):
                yield (f"{prefix}.{name}" if prefix else name), parameter

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        for _, parameter in self.named_parameters(recurse=recurse):
            yield parameter

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Parameters and buffers fetched from the workers, under the names of the wrapped module and in its order, on
        the CPU. Tied names share a tensor. `prefix` is put before every name; other arguments of torch are ignored.
        """
        prefix = str(args[1] if len(args) > 1 else kwargs.get("prefix", ""))
        return {prefix + name: tensor for name, tensor in self._recovery.run(self._placement.state.fetch).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Send weights to the workers, cast to the dtypes they have there; the optimizer's state stays. Gradients and
        graphs since the last step are dropped.

        Raises JobError naming what is missing, unknown (unless `strict` is False) or of another shape.
        """

        def act() -> tuple[list[str], list[str]]:
            self._steps.start_over()
            return self._placement.state.send(state_dict, strict)

        missing, unexpected = self._recovery.replace(act)
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def save_checkpoint(
        self,
        folder: str | os.PathLike[str],
        *,
        optimizer: DistributedOptimizer | None = None,
        shard_bytes: int = 512 << 20,
        progress: bool = True,
    ) -> None:
        """Write the weights into `folder` as Hugging Face lays them out (`model.safetensors.index.json` and shards of
        at most `shard_bytes`, tied names once), and the optimizer's options and state beside them; this process holds
        a few shards at a time.

        A folder that holds a checkpoint goes over to the new one at the very end, or not at all. Gradients that wait
        for a step are not part of it. Raises CheckpointError, OSError, WorkerLostError.
        """
        self._recovery.run(lambda: self._checkpoints.save(folder, optimizer, shard_bytes, progress))

    def load_checkpoint(
        self,
        folder: str | os.PathLike[str],
        *,
        optimizer: DistributedOptimizer | None = None,
        part_bytes: int = 512 << 20,
        progress: bool = True,
    ) -> int:
        """Go on from a checkpoint, on whatever number of stages; returns the steps that had been taken.

        With `optimizer` (the same class and groups) training goes on as if it had not stopped: the same losses bit for
        bit, provided that `seed`, `micro_batches` and the batches are the same, and that no cut comes or goes between
        two uses of a tied parameter: its gradients are added up stage by stage. Schedulers have a state_dict of their
        own. Raises CheckpointError or OptimizerError, before anything is changed, for files that are damaged or of
        another model or optimizer.
        """
        return self._recovery.replace(lambda: self._checkpoints.load(folder, optimizer, part_bytes, progress))

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise RemoteParameterError(
            "the parameters live on workers and cannot be copied: average or copy model.state_dict()"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise RemoteParameterError(
            "the parameters live on workers and cannot be pickled: use model.save_checkpoint(folder), or save "
            "model.state_dict()"
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        raise RemoteParameterError(
            "the parameters live on workers and keep the wrapped module's dtype and device: move or cast the module "
            "before wrapping it"
        )

    @property
    def programs(self) -> list[StageProgram]:
        """What each stage computes; `tensorlink.reference` takes them as `stages`."""
        return list(self._placement.programs)

    # -- telling and ending -------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Plan, timings, work, audits and reputations so far, as plain data; see `reporting.py`."""
        return self._placement.report(self._calls.step_index)

    def timetable(self) -> Timetable:
        """What every stage ran when in the last `train_step` with its loss on the workers: prints as a grid,
        `pipeline.schedule.picture.draw` makes a picture of it. Each worker's times are by its own clock.
        """
        return self._train_step.timetable()

    def usage(self) -> dict[str, dict[str, int]]:
        """CPU nanoseconds and bytes that the processes of this job have spent so far, by process ("user", "worker 0",
        "worker 0 compute"); see `smartnodes_core/usage.py`. A worker's are of all its jobs.
        """
        return self._placement.usage()

    def recoveries(self) -> list[Recovered]:
        """The losses of workers that the run has got over so far, oldest first."""
        return list(self._recovery.recovered)

    def audits(self) -> dict[str, int]:
        """How many audits of this job have passed, failed, and come to no finding so far."""
        return self._driver.tally.findings()

    def verdicts(self) -> list[Verdict]:
        """The newest verdicts that auditors have sent so far, oldest first."""
        return self._driver.tally.verdicts()

    def close(self) -> None:
        """End the job: its workers are released. Idempotent."""
        with self._closing:
            self._recovery.stop()
            self._placement.close()

    def __enter__(self) -> DistributedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DistributedModel(stages={self._driver.num_stages}, step={self._calls.step_index}, {self._placement})"
