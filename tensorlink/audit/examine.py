"""The auditor: re-executes what a worker opened and says whether it is what the worker committed to.

Order of suspicion: what was opened must be what was committed; then bits, which end the matter where they agree; then
distances, against the noise that this very unit shows here (`compare.py`). What cannot be computed here for want of
memory or a program is inconclusive, never fraud. Neighbours: `unit.py` (tier 1), `step.py` (tier 2),
`steplog/replay.py` (computes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from smartnodes_core.errors import AuditError, PeerFault
from smartnodes_core.records import Challenge, Commitment, Opening, digest_of
from tensorlink.audit.interval import Past, UnknownPastError, start_of
from tensorlink.audit.opened import OpenedData
from tensorlink.audit.step import examine_step
from tensorlink.audit.unit import Case, examine_unit
from tensorlink.errors import OverLimitError
from tensorlink.ordered_data import other_data
from tensorlink.program.admission import Bounds
from tensorlink.program.graph import LossProgram, StageProgram
from tensorlink.records import StepOrder
from tensorlink.steplog.replay import Replayer

MAX_CACHED = 16


class Examiner:
    """Examines openings; programs are parsed once and kept by digest."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.bounds = bounds
        self._programs: OrderedDict[bytes, StageProgram] = OrderedDict()
        self._losses: OrderedDict[bytes, LossProgram] = OrderedDict()

    def examine(self, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """`finding`, `reason` and `deltas` for what `params` and the opening's `body` hold.

        Raises only for what the auditor's own side got wrong or cannot do; what the worker got wrong is a finding.
        """
        commitment = Commitment.decode(params["commitment"])
        challenge = Challenge.decode(params["challenge"])
        order = StepOrder.decode(params["order"])
        program = _cached(self._programs, params["program"], StageProgram.from_json)
        deltas: dict[str, float] = {}
        try:
            loss = None
            if params["loss_program"]:
                loss = _cached(self._losses, params["loss_program"], LossProgram.from_json)
            if challenge.commitment != commitment.digest() or commitment.order != order.digest():
                raise AuditError("the challenge or the order belongs to another commitment")
            past = _past(params)
            data = OpenedData(Opening.decode(params["opening"]).items, body, len(past.orders))
            wrong = other_data(order, commitment.units, program.stage_index, program.num_stages)
            if wrong:
                raise AuditError(wrong)
            ends_interval = challenge.tier == 2 and "weights_after" in commitment.roots
            start = start_of(data, program, commitment, order, past, with_optimizer=ends_interval)
            replayer = Replayer(program, loss, start.weights, self.bounds)
            case = Case(replayer, data, commitment, order, start, int(params["seed"]), deltas)
            found = examine_unit(case, challenge.unit) if challenge.tier == 1 else examine_step(case)
        except UnknownPastError as error:
            return {"finding": "silent", "reason": str(error), "deltas": deltas}
        except OverLimitError as error:
            return {"finding": "inconclusive", "reason": f"too large for this machine: {error}", "deltas": deltas}
        except PeerFault as error:
            if "allocate memory" in str(error):
                return {"finding": "inconclusive", "reason": f"the replay ran out of memory: {error}", "deltas": deltas}
            return {"finding": "fraudulent", "reason": str(error)[:2000], "deltas": deltas}
        if found is not None:
            deltas[found.name] = found.distance
            return {"finding": "fraudulent", "reason": str(found), "deltas": deltas}
        return {"finding": "honest", "reason": "within what honest computation gives", "deltas": deltas}


def _past(params: dict[str, Any]) -> Past:
    return Past(
        [Commitment.decode(data) for data in params["earlier"]],
        [StepOrder.decode(data) for data in params["earlier_orders"]],
        int(params["state_interval_steps"]),
        bytes(params["initial_root"]),
    )


def _cached(cache: OrderedDict[bytes, Any], data: bytes, parse: Callable[[bytes], Any]) -> Any:
    key = digest_of("program cache", data)
    if key not in cache:
        cache[key] = parse(data)
        while len(cache) > MAX_CACHED:
            cache.popitem(last=False)
    return cache[key]
