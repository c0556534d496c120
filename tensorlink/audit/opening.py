"""The data behind a commitment, as a list of labelled tensors: what a worker opens and an auditor reads.

Labels: `weights/NAME`, `optimizer/NAME` (as they were committed to last, at the beginning of the step's interval), and
of the steps between in their order `earlier/INDEX/gradient/NAME`; `weights_after/NAME`, `optimizer_after/NAME` where
the step ends its interval; `gradient/NAME`, `buffers_before/NAME`, `buffers_after/NAME`; of tied parameters
`sent/STAGE/NAME` and `received/STAGE/NAME`, the sums that went to another holder and came from it; and per unit
`unit/INDEX/GROUP/NAME` with the groups x, y, gy, gx, target, loss, buffers, and `unit/INDEX/mode` (training,
train_step). The same tensor under several labels travels once: later items name the first by its index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smartnodes_core.errors import AuditError
from smartnodes_core.records import canonical
from tensorlink.program.values import DTYPE_NAMES
from tensorlink.steplog.digests import tensor_view
from tensorlink.steplog.log import StepRecord, UnitRecord
from tensorlink.steplog.shelf import Shelved
from tensorlink.steplog.snapshots import Snapshot

MAX_ITEMS = 65000


@dataclass
class Opened:
    """`items` as in `OpeningItem` (label, meta, num_bytes), and the tensors that make the body, in order.

    The body is written part by part, while training goes on: between `hold` and `let_go` it does not change. What lies
    on the shelf is read from it part by part, so that a body is never in memory as a whole.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    tensors: list[Tensor | Shelved] = field(default_factory=list)
    _first: dict[int, int] = field(default_factory=dict)
    _held: list[Shelved] = field(default_factory=list)
    _snapshot: Snapshot | None = None

    def add(self, label: str, tensor: Tensor | Shelved) -> None:
        """One labelled tensor."""
        meta: dict[str, Any] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        num_bytes = tensor.nbytes
        if id(tensor) in self._first:
            meta, num_bytes = {"same_as": self._first[id(tensor)]}, 0
        else:
            self._first[id(tensor)] = len(self.items)
            self.tensors.append(tensor)
        self.items.append({"label": label, "meta": canonical(meta), "num_bytes": num_bytes})

    def add_all(self, prefix: str, tensors: Mapping[str, Any]) -> None:
        """Each under `prefix/NAME`."""
        for name, tensor in tensors.items():
            self.add(f"{prefix}/{name}", tensor)

    @property
    def num_bytes(self) -> int:
        """Length of the body."""
        return sum(item["num_bytes"] for item in self.items)

    def hold(self, snapshot: Snapshot | None = None) -> None:
        """Keeps the body as it is: tensors in memory are copied, but for those of `snapshot`, which nobody writes
        to while it has readers."""
        if snapshot is None:
            self.tensors = [one if isinstance(one, Shelved) else one.detach().cpu().clone() for one in self.tensors]
        else:
            snapshot.readers += 1
            self._snapshot = snapshot
        for one in self.tensors:
            if isinstance(one, Shelved):
                one.shelf.hold(one)
                self._held.append(one)

    def let_go(self) -> None:
        """Nothing more will be written."""
        if self._snapshot is not None:
            self._snapshot.readers -= 1
            self._snapshot = None
        while self._held:
            one = self._held.pop()
            one.shelf.let_go(one)

    def write(self, view: memoryview, at: int = 0) -> None:
        """Fills `view` with the bytes of the body from `at` on, of which there are as many."""
        begin = 0
        for tensor in self.tensors:
            skip = max(at - begin, 0)
            if skip < tensor.nbytes:
                piece, view = view[: tensor.nbytes - skip], view[tensor.nbytes - skip :]
                if isinstance(tensor, Shelved):
                    tensor.shelf.read_into(tensor, piece, skip)
                else:
                    piece[:] = tensor_view(tensor.cpu().contiguous())[skip : skip + len(piece)]
            begin += tensor.nbytes
            if not view:
                return


def opening(
    interval: Sequence[StepRecord],
    tier: int,
    unit: int,
    weights_after: Mapping[str, Tensor],
    optimizer_after: Mapping[str, Tensor],
) -> Opened:
    """What an auditor needs for one unit (tier 1) or the whole step (tier 2) of the last of `interval`, which begins
    with the step before which the state was committed to. Raises AuditError for a unit there is not."""
    *earlier, record = interval
    units = record.all_units()
    before = interval[0].before
    if before is None or tier not in (1, 2) or (tier == 1 and not 0 <= unit < len(units)):
        raise AuditError(f"tier {tier}, unit {unit} of step {record.step}: it has {len(units)} units")
    if len(units) > MAX_ITEMS // 16:
        raise AuditError(f"an opening of {len(units)} units is over the cap of {MAX_ITEMS // 16}")
    opened = Opened()
    opened.add_all("weights", before.weights)
    if earlier or (tier == 2 and record.ends_interval):
        opened.add_all("optimizer", before.optimizer)
    for index, one in enumerate(earlier):
        opened.add_all(f"earlier/{index}/gradient", one.gradient)
    if tier == 1:
        _add_unit(opened, unit, units[unit])
        return opened
    _add_step(opened, record, weights_after, optimizer_after)
    for index, each in enumerate(units):
        _add_unit(opened, index, each)
    return opened


def _add_step(
    opened: Opened,
    record: StepRecord,
    weights_after: Mapping[str, Tensor],
    optimizer_after: Mapping[str, Tensor],
) -> None:
    opened.add_all("buffers_before", record.buffers_before)
    opened.add_all("buffers_after", record.buffers_after)
    opened.add_all("gradient", record.gradient)
    for direction, by_stage in (("sent", record.sent_sums), ("received", record.received_sums)):
        for stage, sums in by_stage.items():
            opened.add_all(f"{direction}/{stage}", sums)
    opened.add_all("weights_after", weights_after)
    opened.add_all("optimizer_after", optimizer_after)


def _add_unit(opened: Opened, index: int, unit: UnitRecord) -> None:
    forward = unit.forward
    for group in ("x", "y", "target", "loss"):
        opened.add_all(f"unit/{index}/{group}", getattr(forward, group))
    opened.add_all(f"unit/{index}/buffers", forward.buffers)
    opened.add_all(f"unit/{index}/gy", unit.gy)
    opened.add_all(f"unit/{index}/gx", unit.gx)
    mode = torch.tensor([int(forward.training), int(forward.type == "train_step")], dtype=torch.uint8)
    opened.add(f"unit/{index}/mode", mode)
