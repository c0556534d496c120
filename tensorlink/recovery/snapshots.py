"""The state of every stage before one step, on the user's disk: fetched from rigs while they train on.

What a rig hands out is what it has signed a commitment to, or it is not used: the roots are compared when the snapshot
is needed, for hashing it each time would cost more than fetching it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from smartnodes_core.errors import ProtocolError, SmartnodesError
from smartnodes_core.records import NodeKey
from tensorlink.initial_state import Sources, digest_of
from tensorlink.pipeline.driver import Driver
from tensorlink.program.graph import StageProgram
from tensorlink.program.values import DTYPES
from tensorlink.records import PART_BYTES, set_root, state_root
from tensorlink.weight_files import FileTensor

PARTS = ("weights", "buffers", "optimizer")
MAX_ITEMS_BYTES = 64 << 20
#: Optimizer state of a parameter takes at most so many times its bytes, and so much more for counters.
MAX_MOMENTS, COUNTER_BYTES = 8, 256


class _Item(msgspec.Struct, forbid_unknown_fields=True):
    label: str
    meta: bytes
    num_bytes: int


class _Meta(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str = ""
    shape: list[int] = []
    same_as: int = -1


@dataclass(frozen=True)
class StageState:
    """One stage's tensors; `optimizer` by "parameter/state name"."""

    weights: Sources
    buffers: Sources
    optimizer: Sources

    @property
    def state(self) -> Sources:
        """What `load` and `set_state` take."""
        return {**self.weights, **self.buffers}

    def root(self, on_bytes: Callable[[int], object] = lambda num_bytes: None) -> bytes:
        """See `tensorlink.records.state_root`; reads every tensor."""
        return state_root(
            {
                part: set_root({name: digest_of(name, one, on_bytes) for name, one in getattr(self, part).items()})
                for part in PARTS
            }
        )


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of all stages before `step`, when it ran under plan `plan_version` on `workers`.

    `roots` are what the stages committed to (None: theirs is the state that the job began with). `private` is the state
    of the layers that stay here: tensors and optimizer state.
    """

    step: int
    plan_version: int
    workers: Sequence[NodeKey]
    stages: Sequence[StageState]
    roots: Sequence[bytes]
    private: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    folder: Path | None = None
    taken_at_s: float = field(default_factory=time.monotonic)

    def is_sound(self) -> bool:
        """Whether every stage's tensors are those of which the roots speak."""
        try:
            return all(stage.root() == root for stage, root in zip(self.stages, self.roots, strict=True))
        except (OSError, SmartnodesError):
            return False

    def remove(self) -> None:
        """Nobody needs the files any more."""
        if self.folder is not None:
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            self.folder.rmdir()


def committed_root(roots: Mapping[str, bytes]) -> bytes:
    """The root of the state with which a step began, from the roots in its commitment."""
    return state_root({part: roots[f"{part}_before"] for part in PARTS})


def fetch(driver: Driver, program: StageProgram, step: int, path: Path) -> StageState:
    """A stage's state before `step` into a file of its own, which is there whole or not at all. Raises AuditError where
    the rig has it no more, ProtocolError for what no stage of this program can have."""
    stage = program.stage_index
    reply = driver.call(stage, "snapshot", {"step": step}, max_body_bytes=MAX_ITEMS_BYTES)
    try:
        items = msgspec.msgpack.decode(reply.body, type=list[_Item])
        entries = [(item.label, msgspec.msgpack.decode(item.meta, type=_Meta), item.num_bytes) for item in items]
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"stage {stage} described its state in another form: {error}") from None
    found = _placed(program, entries, path)
    opening = int(reply.params.get("opening", -1))
    total = sum(num_bytes for _, _, num_bytes in entries)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for at in range(0, total, PART_BYTES):
            asked = {"opening": opening, "at": at, "num_bytes": min(PART_BYTES, total - at)}
            part = driver.call(stage, "snapshot_part", asked, max_body_bytes=PART_BYTES)
            if len(part.body) != asked["num_bytes"]:
                raise ProtocolError(f"stage {stage} gave {len(part.body)} bytes of its state for {asked['num_bytes']}")
            file.write(part.body)
    os.replace(partial, path)
    return found


def _placed(program: StageProgram, entries: Sequence[tuple[str, _Meta, int]], path: Path) -> StageState:
    """Where in the file each tensor will lie. Raises ProtocolError before anything is fetched."""
    expected = program.expected_state()
    found: dict[str, dict[str, FileTensor]] = {part: {} for part in PARTS}
    places: list[FileTensor] = []
    at = 0
    for label, meta, num_bytes in entries:
        if meta.same_as >= 0:
            if meta.same_as >= len(places):
                raise ProtocolError(f"{label!r:.80} is said to be a tensor that has not been named")
            place = places[meta.same_as]
        else:
            place = _place(label, meta, num_bytes, at, path)
            at += num_bytes
        places.append(place)
        part, _, name = label.partition("/")
        if part not in found or name in found[part]:
            raise ProtocolError(f"{label!r:.80} is no part of a stage's state, or comes twice")
        if part == "optimizer":
            owner = name.rpartition("/")[0]
            if owner not in program.parameters or place.num_bytes > _most_moments(expected[owner]):
                raise ProtocolError(f"{label!r:.80} of {place.num_bytes} bytes is no optimizer state of this stage")
        found[part][name] = place
    for part, names in (("weights", set(program.parameters)), ("buffers", set(program.buffers))):
        if set(found[part]) != names:
            raise ProtocolError(f"the {part} of stage {program.stage_index} are other ones than its program has")
        for name, place in found[part].items():
            dtype, shape = expected[name]
            if (place.dtype, place.shape) != (DTYPES[dtype], tuple(shape)):
                raise ProtocolError(f"{name!r:.80} is of another dtype or shape than in the program")
    return StageState(found["weights"], found["buffers"], found["optimizer"])


def _place(label: str, meta: _Meta, num_bytes: int, at: int, path: Path) -> FileTensor:
    dtype, shape = DTYPES.get(meta.dtype), tuple(meta.shape)
    if dtype is None or len(shape) > 32 or min(shape, default=0) < 0:
        raise ProtocolError(f"{label!r:.80} is of dtype {meta.dtype!r:.20} and shape {shape!r:.80}")
    if torch.Size(shape).numel() * dtype.itemsize != num_bytes:
        raise ProtocolError(f"{label!r:.80} is said to have {num_bytes} bytes")
    return FileTensor(path, at, num_bytes, dtype, shape)


def _most_moments(spec: tuple[str, Any]) -> int:
    dtype, shape = spec
    size = max(DTYPES[dtype].itemsize, 8) * torch.Size(tuple(shape)).numel()
    return MAX_MOMENTS * size + COUNTER_BYTES
