"""What makes the network one that looks for prime numbers: its job type, its audit, its reputation.

A job is one stage, replicated over its workers; its step number b is the block of numbers from b * STEP on, in UNITS
units of UNIT numbers. Whoever is asked for a block commits to the primes of each unit before anybody can know which of
them will be audited. `run.py` starts the processes and is the user.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from blake3 import blake3

from smartnodes_core.audit import Case
from smartnodes_core.errors import JobError, ProtocolError
from smartnodes_core.jobs import Buffer, OpenedUnit, StageOfJob, WorkerPort
from smartnodes_core.nodes.params import count_in
from smartnodes_core.records import Commitment, Finding, NodeKey, Opening, OpeningItem
from smartnodes_core.reputation import BEST, BLACKLISTED, VerdictCounts

JOB_TYPE = "primes/1"
SPEC = b"the primes of each unit, ascending, 8 bytes each, big-endian"
UNIT, UNITS = 25_000, 4
STEP = UNIT * UNITS
MAX_BLOCK = 1 << 24

Search = Callable[[int, int], bytes]


def primes_of(block: int, unit: int) -> bytes:
    """The primes of one unit, by the sieve of Eratosthenes."""
    start = block * STEP + unit * UNIT
    is_prime = bytearray([1]) * UNIT
    for factor in range(2, math.isqrt(start + UNIT) + 1):
        first = max(factor * factor, -(-start // factor) * factor) - start
        if first < UNIT:
            is_prime[first::factor] = bytes(len(range(first, UNIT, factor)))
    return b"".join((start + at).to_bytes(8, "big") for at in range(UNIT) if is_prime[at] and start + at > 1)


def none_at_all(block: int, unit: int) -> bytes:
    """What a lazy worker finds."""
    return b""


class PrimeHandler:
    """The job type, a `JobHandler`: search a block when its author asks, commit, open what is challenged."""

    job_type = JOB_TYPE

    def __init__(self, search: Search = primes_of) -> None:
        self._search = search

    def attach(self, port: WorkerPort) -> None:
        self._port = port

    def offers(self) -> dict[str, int | str]:
        return {"cpus": os.cpu_count() or 1}

    def assign(self, stage: StageOfJob) -> None:
        if stage.job.record.job_type != JOB_TYPE:
            raise JobError(f"found a job of type {stage.job.record.job_type!r:.40}, needed {JOB_TYPE}")

    def call(self, stage: StageOfJob, method: str, params: dict[str, Any], body: memoryview) -> tuple[dict, list]:
        if method != "search":
            raise ProtocolError(f"there is no method {method!r:.40}, only search")
        block = count_in(params, "block", MAX_BLOCK)
        found = [self._search(block, unit) for unit in range(UNITS)]
        units = [{"micro_batch": unit, "roots": {"primes": root_of(primes)}} for unit, primes in enumerate(found)]
        work = stage.job.record.work_units[0] * UNITS
        self._port.commit(stage, {"step": block, "units": units, "work_units": work})
        return {}, found

    def spec(self, stage: StageOfJob) -> bytes:
        return SPEC

    def open(self, stage: StageOfJob, commitment: Commitment, tier: int, unit: int) -> OpenedUnit:
        found = [self._search(commitment.step, each) for each in audited_units(unit)]
        items = [OpeningItem(label="primes", meta=b"", num_bytes=len(primes)) for primes in found]
        return OpenedUnit(items, b"".join(found), b"")

    def release(self, stage: StageOfJob, reason: str) -> None:
        """Nothing is held."""

    def allocate(self, stage: StageOfJob, sender: NodeKey, header: dict[str, Any], num_bytes: int) -> memoryview:
        raise ProtocolError("searching for primes takes no frames")

    def receive(self, stage: StageOfJob, sender: NodeKey, header: dict[str, Any], body: Buffer) -> None:
        raise ProtocolError("searching for primes takes no frames")


class PrimeAuditor:
    """The audit, an `Auditor`: search again, and compare with what was committed and with what was opened."""

    def examine(self, case: Case, body: memoryview) -> tuple[Finding, str]:
        units = audited_units(case.challenge.unit)
        committed = {unit.micro_batch: unit.roots.get("primes") for unit in case.commitment.units}
        sizes = [item.num_bytes for item in Opening.decode(case.opening).items]
        if len(sizes) != len(units) or sum(sizes) != len(body):
            return "fraudulent", f"opened {len(sizes)} units with {len(body)} bytes, needed {len(units)} units"
        at = 0
        for unit, size in zip(units, sizes, strict=True):
            opened, at = bytes(body[at : at + size]), at + size
            if root_of(opened) != committed.get(unit):
                return "fraudulent", f"unit {unit}: what was opened is not what was committed"
            if opened != primes_of(case.commitment.step, unit):
                return (
                    "fraudulent",
                    f"unit {unit} of block {case.commitment.step}: {size // 8} primes, not all and only",
                )
        return "honest", "searched again, and equal"


def confidence(reputation: int, counts: VerdictCounts) -> int:
    """The reputation, a `ReputationRule`: searching again is exact, so names are made and lost fast.

    A round with an honest verdict goes half of the way to the top; one with nothing but unopened units, half back.
    """
    if reputation == BLACKLISTED or counts.fraudulent:
        return BLACKLISTED
    if counts.honest:
        return (reputation + BEST + 1) // 2
    return max(1, reputation // 2) if counts.silent else reputation


def root_of(primes: bytes) -> bytes:
    """Under which a unit's primes are committed to."""
    return blake3(primes).digest()


def audited_units(unit: int) -> list[int]:
    """The units that a challenge names: one, or (-1) all of the step."""
    return list(range(UNITS)) if unit < 0 else [unit]
