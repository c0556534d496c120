"""The state of a job's optimizer where it is: moments of parameters, fetched from stages and sent to them by name.

Neighbours: `optimizer.py` gives it torch's format, `checkpoint.py` moves it part by part, `stage_optimizer.py` holds
it on a rig.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tensorlink.errors import OptimizerError, TensorError
from tensorlink.pipeline.driver import Driver
from tensorlink.private import PrivateLayers
from tensorlink.program.graph import StageProgram
from tensorlink.program.values import DTYPES
from tensorlink.program.weights import load
from tensorlink.remote_state import HEADER_BYTES, num_bytes_of, parts
from tensorlink.stage_optimizer import check_state, decode_options, encode_options, state_specs
from tensorlink.weight_sending import replace_state

#: As much state is replaced at once: until it is there, a stage has both.
REPLACED_BYTES = 512 << 20
State = dict[str, dict[str, Tensor]]


class RemoteOptimizer:
    """State of optimizer `name` by parameter. `options_of` gives every parameter's group as it is now.

    A parameter that several stages hold is fetched from the first and sent to all. Private layers have theirs here.
    """

    def __init__(
        self,
        driver: Driver,
        programs: list[StageProgram],
        private: PrivateLayers,
        name: str,
        options_of: Callable[[], Mapping[str, Mapping[str, Any]]],
    ):
        self._driver, self._programs, self._private = driver, programs, private
        self._name, self._options_of = name, options_of

    def fetch_all(self) -> State:
        """The state of every parameter that has any."""
        flat = self.here()
        for program in self._programs:
            flat.update(self.fetch(program.stage_index, self.sizes(program.stage_index)))
        found: State = {}
        for name, tensor in flat.items():
            parameter, _, key = name.rpartition("/")
            found.setdefault(parameter, {})[key] = tensor
        return found

    def here(self) -> dict[str, Tensor]:
        """State of the private layers' parameters, under `parameter/state name`."""
        return self._private.optimizer_state()

    def fetch(self, stage: int, names: Iterable[str]) -> dict[str, Tensor]:
        """State of these parameters of a stage, under `parameter/state name`. Raises TensorError for what the
        optimizer does not keep."""
        specs = self._specs(stage, names)
        if not specs:
            return {}
        most = sum(num_bytes_of(*spec) for kept in specs.values() for spec in kept.values())
        body = json.dumps(list(specs)).encode()
        reply = self._driver.call(stage, "optimizer_state", {}, [body], max_body_bytes=most + HEADER_BYTES)
        found = load(reply.body)
        for name, tensor in found.items():
            parameter, _, key = name.rpartition("/")
            if (tensor.dtype, tuple(tensor.shape)) != specs.get(parameter, {}).get(key):
                raise TensorError(f"stage {stage} sent optimizer state {name!r:.80}, which was not asked for")
        return found

    def sizes(self, stage: int) -> dict[str, int]:
        """Bytes of state, at most, of the parameters that a stage is the first to hold."""
        earlier = self._programs[:stage]
        names = [n for n in self._programs[stage].parameters if not any(n in each.parameters for each in earlier)]
        specs = self._specs(stage, names)
        return {name: sum(num_bytes_of(*spec) for spec in kept.values()) for name, kept in specs.items()}

    def checked(self, state: Mapping[str, Mapping[str, Any]]) -> State:
        """The state as stages hold it: in their dtypes, numbers as tensors. Raises OptimizerError where it does not
        fit."""
        options, cast = self._options(), {}
        for program in (*self._programs, *self._private.programs):
            for name, spec in program.parameters.items():
                given = {key: value for key, value in state.get(name, {}).items() if value is not None}
                if name in cast or not given or not spec.requires_grad:
                    continue
                kept, _ = state_specs(self._name, options[name], spec.shape, DTYPES[spec.dtype])
                cast[name] = {key: _as(value, kept.get(key)) for key, value in given.items()}
                check_state(self._name, options[name], name, spec.shape, DTYPES[spec.dtype], cast[name])
        return cast

    def send(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Every stage takes the state of its parameters, part by part, and so do the private layers."""
        own = self._private.parameters
        self._private.set_optimizer_state({f"{n}/{key}": t for n in own for key, t in state.get(n, {}).items()})
        for program in self._programs:
            sizes = {n: sum(t.nbytes for t in state[n].values()) for n in program.parameters if n in state}
            for names in parts(sizes, REPLACED_BYTES):
                tensors = {f"{name}/{key}": tensor for name in names for key, tensor in state[name].items()}
                replace_state(self._driver, "set_optimizer_state", {program.stage_index: tensors})

    def _specs(self, stage: int, names: Iterable[str]) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        options, parameters = self._options(), self._programs[stage].parameters
        return {
            name: state_specs(self._name, options[name], spec.shape, DTYPES[spec.dtype])[0]
            for name in names
            if (spec := parameters[name]).requires_grad
        }

    def _options(self) -> dict[str, dict[str, Any]]:
        """As the stages have them, by parameter."""
        decoded: dict[int, dict[str, Any]] = {}
        found = {}
        for name, group in self._options_of().items():
            if id(group) not in decoded:
                plain = encode_options({key: value for key, value in group.items() if key != "params"})
                decoded[id(group)] = decode_options(self._name, plain)
            found[name] = decoded[id(group)]
        return found


def _as(value: Any, kept: tuple[torch.dtype, tuple[int, ...]] | None) -> Tensor:
    if not isinstance(value, Tensor | int | float):
        raise OptimizerError(f"found optimizer state of type {type(value).__name__}, needed tensors and numbers")
    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    return tensor if kept is None else tensor.to(kept[0])
