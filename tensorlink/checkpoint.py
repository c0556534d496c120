"""A training run on the user's disk: written and read part by part, so that no machine holds all of a large model.

A checkpoint is a folder as Hugging Face lays one out (`shards.py`), which any PyTorch program loads, and beside it the
optimizer's options and moments by parameter name: it resumes on any number of stages, and with the same `seed` the
losses are bitwise those of the run that was not interrupted. Neighbours: `remote_state.py` and `remote_optimizer.py`
reach the stages.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from tensorlink.calls import Calls
from tensorlink.errors import CheckpointError
from tensorlink.placement import Placement
from tensorlink.remote_state import parts
from tensorlink.shards import ShardReader, ShardWriter
from tensorlink.stage_optimizer import SCHEDULER_KEYS

if TYPE_CHECKING:
    from tensorlink.optimizer import DistributedOptimizer
    from tensorlink.steps import Steps

Folder = str | os.PathLike[str]
VERSION = 1


class Checkpoints:
    """Saves and resumes one job."""

    def __init__(self, placement: Placement, calls: Calls, steps: Steps):
        self._placement, self._calls, self._steps = placement, calls, steps

    # -- save ---------------------------------------------------------------------------------------------------------

    def save(self, folder: Folder, optimizer: DistributedOptimizer | None, shard_bytes: int, progress: bool) -> None:
        """See `DistributedModel.save_checkpoint`."""
        state, num_bytes = self._placement.state, 0
        if optimizer is not None:
            self._steps.check(optimizer)
        with ShardWriter(folder) as writer, _bar("save checkpoint", progress) as bar:
            for kind, tensors in self._pieces(optimizer, shard_bytes):
                writer.add(kind, tensors)
                size = sum(tensor.nbytes for tensor in tensors.values())
                num_bytes += size if kind == "model" else 0
                bar.update(size)
            metadata = {
                "total_size": num_bytes,
                "tensorlink": VERSION,
                "step": self._calls.step_index,
                "calls": self._calls.num_calls,
                "seed": self._seed,
                "tied": state.tied,
            }
            writer.commit(metadata, None if optimizer is None else _described(optimizer))

    def _pieces(self, optimizer: DistributedOptimizer | None, most: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The shards, one after the other."""
        state = self._placement.state
        for stage in range(self._placement.driver.num_stages):
            for names in parts(state.saved(stage), most):
                yield "model", state.fetch_some(stage, names)
        here = state.here()
        for names in parts({name: tensor.nbytes for name, tensor in here.items()}, most):
            yield "model", {name: here[name].contiguous() for name in names}
        if optimizer is not None:
            for stage in range(self._placement.driver.num_stages):
                for names in parts(optimizer.remote.sizes(stage), most):
                    flat = optimizer.remote.fetch(stage, names)
                    if flat:
                        yield "optimizer", flat
            here = optimizer.remote.here()
            for names in parts({name: tensor.nbytes for name, tensor in here.items()}, most):
                yield "optimizer", {name: here[name].contiguous() for name in names}

    # -- load ---------------------------------------------------------------------------------------------------------

    def load(self, folder: Folder, optimizer: DistributedOptimizer | None, part_bytes: int, progress: bool) -> int:
        """See `DistributedModel.load_checkpoint`."""
        reader = ShardReader(folder)
        state = self._placement.state
        weights = self._checked(reader.weights())
        step, calls = (_count(reader.metadata, name) for name in ("step", "calls"))
        if optimizer is not None:
            optimizer.restore(_groups(reader, optimizer), reader.optimizer_state())
        self._steps.start_over()
        with _bar("load checkpoint", progress) as bar:
            for stage in range(self._placement.driver.num_stages):
                for names in parts(state.held(stage, weights), part_bytes):
                    state.send_some(stage, {name: weights[name] for name in names}, bar.update)
        state.keep(weights)
        if reader.metadata.get("seed", self._seed) != self._seed:
            warnings.warn(
                f"the checkpoint was made with seed={reader.metadata['seed']!r:.20}, this model has seed={self._seed}: "
                "dropout masks will not be those of the run that made it",
                stacklevel=3,
            )
        self._calls.resume(step, calls)
        return step

    def _checked(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's tensors, tied names once. Raises CheckpointError unless they are all there and fit."""
        state = self._placement.state
        specs = state.specs()
        found = {state.tied.get(name, name): tensor for name, tensor in weights.items()}
        missing, extra = sorted(specs.keys() - found.keys()), sorted(found.keys() - specs.keys())
        if missing or extra:
            raise CheckpointError(f"the checkpoint is of another model: missing {missing[:5]}, unknown {extra[:5]}")
        for name, spec in specs.items():
            tensor = found[name]
            if (tensor.dtype, tuple(tensor.shape)) != spec:
                raise CheckpointError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)} in the checkpoint, the model has {spec[0]} "
                    f"{list(spec[1])}: cast the module before wrapping it, or take another checkpoint"
                )
        return found

    @property
    def _seed(self) -> int:
        return int(self._placement.job.record.terms["seed"])


def _described(optimizer: DistributedOptimizer) -> dict[str, Any]:
    """An optimizer without its state, as JSON: Python writes floats so that they come back exactly."""
    return {
        "optimizer": optimizer.optimizer_name,
        "param_groups": [
            {
                "parameters": [parameter.remote_name for parameter in group["params"]],
                **{key: _plain(value) for key, value in group.items() if key != "params"},
            }
            for group in optimizer.param_groups
        ],
    }


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _groups(reader: ShardReader, optimizer: DistributedOptimizer) -> list[dict[str, Any]]:
    """The options of each group. Raises CheckpointError where the optimizer is another or groups parameters
    otherwise."""
    if reader.optimizer is None:
        raise CheckpointError("the checkpoint was saved without optimizer=...: load it without one")
    name, groups = reader.optimizer.get("optimizer"), reader.optimizer.get("param_groups")
    if name != optimizer.optimizer_name:
        raise CheckpointError(f"the checkpoint is of optimizer {name!r:.40}, this one is {optimizer.optimizer_name}")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError("the optimizer's file has no param_groups")
    own = [[parameter.remote_name for parameter in group["params"]] for group in optimizer.param_groups]
    if [group.pop("parameters", None) for group in groups] != own:
        raise CheckpointError("the checkpoint's parameter groups hold other parameters: pass the same groups=...")
    known = {key for group in optimizer.param_groups for key in group} | SCHEDULER_KEYS
    for group in groups:
        unknown = sorted(set(group) - known)
        if unknown:
            raise CheckpointError(f"a parameter group has the option {unknown[0]!r:.40}, which {name} has not")
    return [{key: tuple(v) if isinstance(v, list) else v for key, v in group.items()} for group in groups]


def _count(metadata: Mapping[str, Any], name: str) -> int:
    value = metadata.get(name, 0)
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise CheckpointError(f"the index says {name} {value!r:.40}: that is no count")
    return value


def _bar(what: str, progress: bool) -> tqdm[Any]:
    return tqdm(desc=what, unit="B", unit_scale=True, disable=not progress, leave=False)
