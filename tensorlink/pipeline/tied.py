"""Tied parameters: held by several stages, whose copies stay equal to the last bit.

Each holder adds up its own gradients over (call, micro-batch). Before a step is decided the holders send each other
these sums, every one adds all of them in the order of the stages, and updates its copy with the same gradient.
Neighbours: `state.py` commits the totals, `audit/sums.py` checks them, `plain.py` adds the same in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tensorlink.errors import TensorError
from tensorlink.program.graph import ParameterSpec, StageProgram
from tensorlink.program.values import DTYPE_NAMES, DTYPES
from tensorlink.steplog.digests import tensor_view

#: What a holder sends of a parameter that got no gradient: a tensor of this shape.
NOTHING = (0,)


class SumId(NamedTuple):
    """Which sums: of `num_units` backwards of micro-batches in `step`, the last of them through `call`.

    A call's number is used once in a step, so that sums from before a `zero_grad` go by another name.
    """

    step: int
    call: int
    num_units: int


@dataclass
class Settled:
    """All holders' sums of one id: `received` by stage, `totals` the gradients that they add up to.

    `norm` keeps what `StageState.squared_norm` found with them.
    """

    id: SumId
    received: Mapping[int, Mapping[str, Tensor]]
    totals: Mapping[str, Tensor]
    norm: tuple[float, str] | None = None


class Ties:
    """Which of a stage's parameters other stages hold too, as its program says. Frozen ones have no gradients to
    add."""

    def __init__(self, program: StageProgram) -> None:
        self.stage = program.stage_index
        self.specs: dict[str, ParameterSpec] = {
            name: spec for name, spec in sorted(program.parameters.items()) if spec.holders and spec.requires_grad
        }
        stages = {stage for spec in self.specs.values() for stage in spec.holders}
        #: The other holders, in order.
        self.others = sorted(stages - {self.stage})

    def names(self, other: int) -> list[str]:
        """What this stage and `other` hold both; both ends number these parameters in this order."""
        return [name for name, spec in self.specs.items() if other in spec.holders]

    def counts(self, name: str) -> bool:
        """Whether this stage counts the parameter in its gradient norm: the first holder does."""
        return name not in self.specs or self.specs[name].holders[0] == self.stage

    def totals(self, own: Mapping[str, Tensor], received: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The gradients of tied parameters; without those that got none in any stage."""
        by_stage = {**received, self.stage: own}
        found = {
            name: in_stage_order(by_stage[stage].get(name) for stage in spec.holders)
            for name, spec in self.specs.items()
        }
        return {name: total for name, total in found.items() if total is not None}


def in_stage_order(sums: Iterable[Tensor | None]) -> Tensor | None:
    """The stages' sums added up one after the other; None where no stage has one."""
    total: Tensor | None = None
    for one in sums:
        if one is not None:
            total = one if total is None else total + one
    return None if total is None else total.contiguous()


class TiedGradients:
    """One stage's part in the exchange. `send(to, id, slot, sum)` takes a sum to another holder."""

    def __init__(self, program: StageProgram, send: Callable[[int, SumId, int, Tensor], None]) -> None:
        self.ties = Ties(program)
        self._send = send
        self._sent: SumId | None = None
        self._arrived: dict[int, tuple[SumId, dict[int, Tensor]]] = {}
        self._settled: Settled | None = None

    def share(self, id: SumId, sums: Mapping[str, Tensor]) -> list[int]:
        """Sends this stage's sums, once for each id; returns the holders whose sums are still to come."""
        if self._sent != id:
            self._sent = id
            for other in self.ties.others:
                for slot, name in enumerate(self.ties.names(other)):
                    nothing = torch.empty(NOTHING, dtype=DTYPES[self.ties.specs[name].dtype])
                    self._send(other, id, slot, sums.get(name, nothing))
        missing = [other for other in self.ties.others if not self._has_all(other, id)]
        if not missing and self.settled(id) is None:
            received = {other: self._of(other) for other in self.ties.others}
            self._settled = Settled(id, received, self.ties.totals(sums, received))
        return missing

    def receive(self, id: SumId, stage: int, slot: int, tensor: Tensor) -> bool:
        """A sum came from the holder `stage`; False for a duplicate. Raises TensorError for what was not to come.

        A holder's sums of another id take the place of its earlier ones: it has started again.
        """
        names = self.ties.names(stage) if stage != self.ties.stage else []
        if not 0 <= slot < len(names):
            raise TensorError(
                f"stage {stage} sent the sum of tied parameter {slot}; stage {self.ties.stage} shares {len(names)} "
                "parameters with it"
            )
        name, spec = names[slot], self.ties.specs[names[slot]]
        if DTYPE_NAMES[tensor.dtype] != spec.dtype or tuple(tensor.shape) not in (spec.shape, NOTHING):
            raise TensorError(
                f"sum of {name!r:.128} from stage {stage}: found {DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}, "
                f"needed {spec.dtype} {list(spec.shape)}"
            )
        known, sums = self._arrived.get(stage, (id, {}))
        if known != id:
            sums = {}
        if slot in sums:
            if sums[slot].shape != tensor.shape or tensor_view(sums[slot]) != tensor_view(tensor):
                raise TensorError(f"sum of {name!r:.128} came twice from stage {stage} with different content")
            return False
        sums[slot] = tensor.clone()  # it may lie in shared memory, and stays for as long as the step can be audited
        self._arrived[stage] = (id, sums)
        return True

    def settled(self, id: SumId) -> Settled | None:
        """The outcome, once all sums of `id` have come. What comes afterwards changes nothing of it."""
        return self._settled if self._settled is not None and self._settled.id == id else None

    def forget(self) -> None:
        """The step was committed, or its gradients were dropped."""
        self._sent = self._settled = None
        self._arrived.clear()

    def _has_all(self, other: int, id: SumId) -> bool:
        known, sums = self._arrived.get(other, (None, {}))
        return self.settled(id) is not None or (known == id and len(sums) == len(self.ties.names(other)))

    def _of(self, other: int) -> dict[str, Tensor]:
        """What a holder sent, by name, without parameters that got no gradient there."""
        _, sums = self._arrived[other]
        names = self.ties.names(other)
        return {
            names[slot]: tensor
            for slot, tensor in sorted(sums.items())
            if tensor.shape == self.ties.specs[names[slot]].shape
        }
