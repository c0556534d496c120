"""A job's weights by the names of the wrapped module: where each lives, fetched in order, sent where they belong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from smartnodes_core.errors import JobError
from tensorlink.initial_state import Source, Sources, value_of
from tensorlink.parameters import PRIVATE, UNUSED, RemoteParameter
from tensorlink.pipeline.driver import Driver
from tensorlink.private import PrivateLayers
from tensorlink.program.graph import StageProgram
from tensorlink.program.trace import TracedModel
from tensorlink.program.values import DTYPES
from tensorlink.program.weights import load
from tensorlink.weight_files import FileTensor
from tensorlink.weight_sending import replace_state

#: Added to the bytes of a stage's tensors for the file's header.
HEADER_BYTES = 16 << 20


class RemoteState:
    """Parameters, buffers and constants of a job's stages and of its private layers.

    What the module's state_dict has and no stage computes with stays here: it must survive a round trip all the same.
    """

    def __init__(
        self,
        traced: TracedModel,
        programs: list[StageProgram],
        driver: Driver,
        private: PrivateLayers,
        values: Sources,
    ):
        self._traced, self._programs, self._driver, self._private = traced, programs, driver, private
        used = {name for program in programs for name in program.expected_state()} | private.expected_state.keys()
        self._kept: dict[str, Source] = {
            name: value if isinstance(value, FileTensor) else value_of(value)
            for name, value in values.items()
            if name not in used
        }

    def remote_parameters(self) -> dict[str, RemoteParameter]:
        """Stand-ins in the order of the wrapped module's `named_parameters()`, tied names included."""
        stages = {name: program.stage_index for program in reversed(self._programs) for name in program.parameters}
        stages.update(dict.fromkeys(self._private.parameters, PRIVATE))
        made = {
            name: RemoteParameter.make(
                name, stages.get(name, UNUSED), tuple(value.shape), value.dtype, value.requires_grad
            )
            for name, value in self._traced.parameters.items()
        }
        tied = {alias: made[name] for alias, name in self._traced.aliases.items() if name in made}
        return {**made, **tied}

    def fetch(self) -> dict[str, torch.Tensor]:
        """Everything that the wrapped module's state_dict has, under its names and in its order."""
        replies = self._driver.call_all("state", lambda stage: {}, max_body_bytes=self._max_bytes)
        found = {name: value_of(value) for name, value in self._kept.items()} | self._private.state()
        for program, reply in zip(self._programs, replies, strict=True):
            found.update(load(reply.body, program.expected_state()))
        aliases = self._traced.aliases
        return {name: found[aliases.get(name, name)] for name in self._traced.state_names}

    def send(self, state: Mapping[str, Any], strict: bool) -> tuple[list[str], list[str]]:
        """Send weights to the stages; returns names that were missing and that were too many.

        Nothing is sent before everything was checked. Raises JobError.
        """
        names = self._traced.state_names
        missing = [name for name in names if name not in state]
        unexpected = [name for name in state if name not in names]
        if strict and (missing or unexpected):
            raise JobError(
                f"load_state_dict: missing {missing[:5]}, unexpected {unexpected[:5]}: pass strict=False to skip"
            )
        aliases = self._traced.aliases
        given = {aliases.get(name, name): state[name] for name in names if name in state}
        pieces = [self._checked(given, program.expected_state()) for program in self._programs]
        private = self._checked(given, self._private.expected_state)
        specs = {name: (str(kept.dtype).removeprefix("torch."), tuple(kept.shape)) for name, kept in self._kept.items()}
        self._kept.update({name: value.clone() for name, value in self._checked(given, specs).items()})
        replace_state(self._driver, "set_state", dict(enumerate(pieces)))
        self._private.set_state(private)
        return missing, unexpected

    # -- part by part, for checkpoints --------------------------------------------------------------------------------

    def saved(self, stage: int) -> dict[str, int]:
        """Parameters and buffers of a stage that belong to the module's state_dict, with their bytes.

        Tied names once, under the first; what several stages hold counts for the first of them.
        """
        wanted, earlier = self._wanted(), self._programs[:stage]
        return {
            name: num_bytes_of(DTYPES[dtype], shape)
            for name, (dtype, shape) in self._programs[stage].expected_state().items()
            if name in wanted and not any(name in program.expected_state() for program in earlier)
        }

    def _wanted(self) -> set[str]:
        """Names of the module's state_dict, tied ones once."""
        return {self._traced.aliases.get(name, name) for name in self._traced.state_names}

    @property
    def tied(self) -> dict[str, str]:
        """Names of the module's state_dict that share a tensor with an earlier one, and the earlier name."""
        return {name: first for name, first in self._traced.aliases.items() if name in self._traced.state_names}

    def here(self) -> dict[str, torch.Tensor]:
        """What no stage holds and the module's state_dict has all the same: copies of what private layers compute
        with, and of what nothing does."""
        kept = {name: value_of(self._kept[name]) for name in self._here() if name in self._kept}
        private = self._private.state()
        return kept | {name: private[name] for name in self._here() if name in private}

    def _here(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtypes and shapes of `here()`."""
        held = {name for program in self._programs for name in program.expected_state()}
        found = {name: (value.dtype, tuple(value.shape)) for name, value in self._kept.items()}
        for name, (dtype, shape) in self._private.expected_state.items():
            found[name] = DTYPES[dtype], tuple(shape)
        return {name: spec for name, spec in found.items() if name in self._wanted() and name not in held}

    def specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of everything that the module's state_dict has, tied names once."""
        found = self._here()
        for program in self._programs:
            held = program.expected_state()
            for name in self.saved(program.stage_index):
                found[name] = DTYPES[held[name][0]], tuple(held[name][1])
        return found

    def fetch_some(self, stage: int, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """These tensors of a stage."""
        expected = {name: self._programs[stage].expected_state()[name] for name in names}
        most = sum(num_bytes_of(DTYPES[dtype], shape) for dtype, shape in expected.values()) + HEADER_BYTES
        body = json.dumps(list(expected)).encode()
        return load(self._driver.call(stage, "state", {}, [body], max_body_bytes=most).body, expected)

    def held(self, stage: int, names: Iterable[str]) -> dict[str, int]:
        """Those of `names` that a stage holds, with their bytes."""
        expected = self._programs[stage].expected_state()
        return {n: num_bytes_of(DTYPES[expected[n][0]], expected[n][1]) for n in names if n in expected}

    def send_some(self, stage: int, tensors: Mapping[str, torch.Tensor], on_bytes: Callable[[int], object]) -> None:
        """A stage takes these tensors, which have its dtypes and shapes; `on_bytes` hears of progress."""
        replace_state(self._driver, "set_state", {stage: tensors}, on_bytes)

    def keep(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Those of `tensors` that belong here: to private layers, or to nothing that computes."""
        self._kept.update({name: tensor.clone() for name, tensor in tensors.items() if name in self._kept})
        self._private.set_state({n: tensor for n, tensor in tensors.items() if n in self._private.expected_state})

    # -- checks -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _checked(
        given: Mapping[str, Any], expected: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> dict[str, torch.Tensor]:
        piece = {}
        for name, (dtype, shape) in expected.items():
            value = given.get(name)
            if value is None:
                continue
            if not isinstance(value, torch.Tensor) or tuple(value.shape) != tuple(shape):
                found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise JobError(f"load_state_dict: {name} is {found}, the model has {list(shape)}")
            piece[name] = value.detach().to("cpu", DTYPES[dtype]).contiguous()
        return piece

    def _max_bytes(self, stage: int) -> int:
        expected = self._programs[stage].expected_state().values()
        return sum(num_bytes_of(DTYPES[dtype], shape) for dtype, shape in expected) + HEADER_BYTES


def parts(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, in lists of at most `most` bytes together, or of a single name that has more."""
    made: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not made:
            made.append([])
            room = most
        made[-1].append(name)
        room -= size
    return made


def num_bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor."""
    return dtype.itemsize * torch.Size(shape).numel()
