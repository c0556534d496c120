"""A job's weights by the names of the wrapped module: where each lives, fetched in order, sent where they belong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from smartnodes_core.errors import JobError
from tensorlink.initial_state import Source, Sources, value_of
from tensorlink.parameters import UNUSED, RemoteParameter
from tensorlink.pipeline.driver import Driver
from tensorlink.program.graph import StageProgram
from tensorlink.program.trace import TracedModel
from tensorlink.program.values import DTYPES
from tensorlink.program.weights import load
from tensorlink.weight_files import FileTensor
from tensorlink.weight_sending import send_parts

#: Added to the bytes of a stage's tensors for the file's header.
HEADER_BYTES = 16 << 20


class RemoteState:
    """Parameters, buffers and constants of a job's stages.

    What the module's state_dict has and no stage computes with stays here: it must survive a round trip all the same.
    """

    def __init__(self, traced: TracedModel, programs: list[StageProgram], driver: Driver, values: Sources):
        self._traced, self._programs, self._driver = traced, programs, driver
        used = {name for program in programs for name in program.expected_state()}
        self._kept: dict[str, Source] = {
            name: value if isinstance(value, FileTensor) else value_of(value)
            for name, value in values.items()
            if name not in used
        }

    def remote_parameters(self) -> dict[str, RemoteParameter]:
        """Stand-ins in the order of the wrapped module's `named_parameters()`, tied names included."""
        stages = {name: program.stage_index for program in reversed(self._programs) for name in program.parameters}
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
        found = {name: value_of(value) for name, value in self._kept.items()}
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
        specs = {name: (str(kept.dtype).removeprefix("torch."), tuple(kept.shape)) for name, kept in self._kept.items()}
        self._kept.update({name: value.clone() for name, value in self._checked(given, specs).items()})
        whole = [self._completed(stage, piece) for stage, piece in enumerate(pieces)]
        self._driver.call_all("set_state", lambda stage: {})
        send_parts(self._driver, self._programs, whole)
        self._driver.call_all("load_end", lambda stage: {})
        return missing, unexpected

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

    def _completed(self, stage: int, piece: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A stage takes all of its state or nothing: what was not given is as it is there now."""
        expected = self._programs[stage].expected_state()
        if piece.keys() != expected.keys():
            reply = self._driver.call(stage, "state", {}, max_body_bytes=self._max_bytes(stage))
            piece = {**load(reply.body, expected), **piece}
        return piece

    def _max_bytes(self, stage: int) -> int:
        expected = self._programs[stage].expected_state().values()
        sizes = [DTYPES[dtype].itemsize * torch.Size(shape).numel() for dtype, shape in expected]
        return sum(sizes) + HEADER_BYTES
