"""What an auditor re-executes, on the Node side: hands openings to a computing process of its own and takes the
finding.

No torch here. The process starts with the first audit and runs at low priority, so that auditing never slows what
else the machine does.
"""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorlink.errors  # noqa: F401 - the computing process's errors find their classes among those that are loaded
from smartnodes_core.audit import Case
from smartnodes_core.errors import JobError, PeerFault, SmartnodesError
from smartnodes_core.identity import verify
from smartnodes_core.records import Finding, Opening, Signed
from smartnodes_core.sandbox import Limits, Sandbox
from tensorlink import allocator
from tensorlink.audit.drift import LIMIT, Drifts
from tensorlink.footprint import limit_of
from tensorlink.records import StepOrder
from tensorlink.stage_papers import LOSS_PROGRAM, earlier_order, state_interval_steps

EXAMINE_TIMEOUT_S = 600.0
ARENA_BYTES = 16 << 30
NICE = 10
#: A loss program (at most 64 MiB, as any program) and the author's orders of an interval of steps.
MAX_PAPERS_BYTES = 128 << 20


class _Papers(NamedTuple):
    """What is signed in an opening, and the loss program."""

    opening: Opening
    order: StepOrder
    earlier: list[StepOrder]
    loss: bytes


class ReplayAuditor:
    """An `Auditor` that re-executes in a computing process."""

    def __init__(
        self,
        memory_bytes: int = 0,
        num_threads: int = 1,
        command: Sequence[str] = (sys.executable, "-m", "tensorlink.compute"),
    ):
        self._lock = threading.Lock()
        self._running = False
        self._drifts, self._drift_lock = Drifts(), threading.Lock()
        self._residual_key = secrets.token_bytes(32)
        self._sandbox = Sandbox(
            list(command),
            limits=Limits(
                memory_bytes=limit_of(memory_bytes), num_threads=num_threads, nice=NICE, action_s=EXAMINE_TIMEOUT_S
            ),
            inbound_bytes=ARENA_BYTES,
            outbound_bytes=1 << 20,
            on_event=self._on_event,
            on_exit=self._on_exit,
            environment=allocator.environment(),
        )

    def stop(self) -> None:
        """End the computing process."""
        self._sandbox.stop()

    def examine(self, case: Case, body: memoryview) -> tuple[Finding, str]:
        """Re-execute what was opened. What the worker sent wrong is a finding; what failed here is `inconclusive`."""
        try:
            papers = self._check(case, body)
        except PeerFault as fault:
            return "fraudulent", str(fault)
        try:
            reply = self._examine(case, papers, body)
        except SmartnodesError as error:
            return "inconclusive", f"the audit could not be run: {error}"
        if reply["finding"] == "honest" and (drift := self._drift(case, reply["residuals"])):
            return "inconclusive", drift
        return reply["finding"], str(reply["reason"])

    def _drift(self, case: Case, residuals: dict[str, list[float]]) -> str:
        """Adds an honest unit's residuals to those of the worker's before; in words what they have come to, where that
        is more than honest work gives."""
        commitment = case.commitment
        with self._drift_lock:
            name, length = self._drifts.add((commitment.worker, commitment.job, commitment.stage), residuals)
        if length <= LIMIT:
            return ""
        return (
            f"drift: each unit alone is within the tolerance, and {name:.80} is off the same way again and again "
            f"({length:.2f} tolerances together, allowed {LIMIT:g})"
        )

    def _check(self, case: Case, body: memoryview) -> _Papers:
        """The orders must be the author's, the step's own the one committed to. Raises PeerFault."""
        order = _order(case, case.order)
        if order.digest() != case.commitment.order:
            raise PeerFault("the opened order is not the one committed to")
        if (order.job, order.step) != (case.commitment.job, case.commitment.step):
            raise PeerFault("the order that was committed to is for another step or job")
        opening = Opening.decode(case.opening)
        if sum(item.num_bytes for item in opening.items) != len(body):
            raise PeerFault("the opening's items do not add up to its body")
        num_bytes = sum(item.num_bytes for item in opening.items if not item.meta)
        if num_bytes > MAX_PAPERS_BYTES:
            raise PeerFault(f"{num_bytes} bytes of papers were opened, at most {MAX_PAPERS_BYTES} are read")
        papers, at = {}, 0
        for item in opening.items:
            if not item.meta:  # tensors have one
                papers[item.label] = bytes(body[at : at + item.num_bytes])
            at += item.num_bytes
        earlier: list[StepOrder] = []
        while (data := papers.get(earlier_order(len(earlier)))) is not None:
            earlier.append(_order(case, data))
        return _Papers(opening, order, earlier, papers.get(LOSS_PROGRAM, b""))

    def _examine(self, case: Case, papers: _Papers, body: memoryview) -> dict[str, Any]:
        seed = case.job.terms.get("seed")
        if type(seed) is not int:
            raise JobError(f"found seed {seed!r:.40} in the terms of the job, needed a number")
        with self._lock:
            if not self._running:
                self._sandbox.start()
                self._running = True
        piece = self._sandbox.inbound.allocate(max(1, len(body)), 60.0)
        piece.view[: len(body)] = body
        params = {
            "program": case.spec,
            "loss_program": papers.loss,
            "seed": seed,
            "commitment": case.commitment.encode(),
            "challenge": case.challenge.encode(),
            "order": papers.order.encode(),
            "opening": papers.opening.encode(),
            "earlier": [commitment.encode() for commitment in case.earlier],
            "earlier_orders": [order.encode() for order in papers.earlier],
            "initial_root": case.job.initial_roots[case.commitment.stage],
            "state_root": case.state_root or b"",
            "state_interval_steps": state_interval_steps(case.job.terms),
            "offset": piece.offset,
            "num_bytes": len(body),
            "numeric_class": case.commitment.numeric_class,
            "residual_key": self._residual_key,
        }
        return self._sandbox.call("examine", params, timeout_s=EXAMINE_TIMEOUT_S)

    def _on_event(self, name: str, params: dict[str, Any]) -> None:
        if name == "released":
            self._sandbox.inbound.free(params["offset"])

    def _on_exit(self, reason: str) -> None:
        self._running = False


def _order(case: Case, data: bytes) -> StepOrder:
    """A step's order, signed by the job's author. Raises PeerFault."""
    signed = Signed.decode(data)
    order = verify(signed, StepOrder)
    if signed.signer != case.job.author:
        raise PeerFault("an opened order is not the author's")
    return order
