"""Tier 2 for tied parameters: this stage's own sums, and that the gradient is all holders' sums in stage order.

What other holders sent is taken as the worker says it came: whether they say so too is seen from the commitments
(`smartnodes_core.audit.sharing_disagreements`), whether it is right is for the audits of their own steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smartnodes_core.audit import received_from, sent_to
from smartnodes_core.errors import AuditError
from tensorlink.audit.compare import Deviation
from tensorlink.audit.unit import Case
from tensorlink.pipeline.tied import Ties
from tensorlink.program.values import DTYPE_NAMES
from tensorlink.steplog.digests import digest

Sums = Mapping[int, Mapping[str, Tensor]]


def own_gradient(case: Case, ties: Ties, gradient: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Deviation | None]:
    """What the worker says that its own units gave, and what is wrong with the totals of tied parameters.

    `gradient` is what it committed to, totals included. Raises AuditError for sums that are not those committed to,
    not of the program's parameters, or not the same for every holder.
    """
    roots = case.commitment.shared_roots
    if set(roots) != {name(other) for other in ties.others for name in (sent_to, received_from)}:
        raise AuditError(f"shared were {sorted(roots)!r:.100}; parameters are tied with stages {ties.others}")
    sent = {other: case.data.checked(f"sent/{other}", roots, sent_to(other)) for other in ties.others}
    received = {other: case.data.checked(f"received/{other}", roots, received_from(other)) for other in ties.others}
    for sums in (sent, received):
        _check(ties, sums)
    own = _own(ties, sent)
    totals = ties.totals(own, received)
    untied = {name: tensor for name, tensor in gradient.items() if name not in ties.specs}
    tied = {name: tensor for name, tensor in gradient.items() if name in ties.specs}
    if set(tied) != set(totals):
        raise AuditError(f"gradients of {sorted(set(tied) ^ set(totals))[:5]} are missing or too many")
    wrong = (_wrong(name, tensor, totals[name]) for name, tensor in tied.items())
    return {**untied, **own}, next((found for found in wrong if found is not None), None)


def _check(ties: Ties, sums: Sums) -> None:
    for other, group in sums.items():
        names = ties.names(other)
        for name, tensor in group.items():
            spec = ties.specs.get(name)
            fits = spec is not None and (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) == (spec.dtype, spec.shape)
            if name not in names or not fits:
                raise AuditError(f"the sum of {name!r:.128} that was opened fits no parameter tied with stage {other}")


def _own(ties: Ties, sent: Sums) -> dict[str, Tensor]:
    """The one sum of each tied parameter that went to all its other holders."""
    own = {}
    for name, spec in ties.specs.items():
        versions = [sent[other].get(name) for other in spec.holders if other != ties.stage]
        if len({None if version is None else digest(name, version) for version in versions}) != 1:
            raise AuditError(f"other sums of {name!r:.128} were sent to one holder than to another")
        if versions[0] is not None:
            own[name] = versions[0]
    return own


def _wrong(name: str, claimed: Tensor, total: Tensor) -> Deviation | None:
    """Adding rounds the same everywhere: nothing but the very same bits will do."""
    if digest(name, claimed) == digest(name, total):
        return None
    same_kind = claimed.shape == total.shape and claimed.dtype == total.dtype
    distance = float(torch.linalg.vector_norm((claimed - total).double())) if same_kind else float("inf")
    return Deviation(f"gradient {name}", distance, 0.0, "is not the sum over the stages that hold it, in their order")
