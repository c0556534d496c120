"""`tensorlink verify`: a verdict of fraud checked again from its evidence, without a network, on one core."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from smartnodes_core.audit import Case
from smartnodes_core.errors import AuditError
from smartnodes_core.evidence import EvidenceFile, case_of, check_draw, check_verdict, mapped, signed_verdict, split
from tensorlink.cli.options import printable, start_logging
from tensorlink.validator import ReplayAuditor
from tensorlink.worker import JOB_TYPE


def add_commands(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("verify", help="check a verdict of fraud again from its evidence, offline")
    parser.add_argument(
        "evidence", type=Path, help="file of a validator's data directory: evidence/DIGEST.evidence (docs/security.md)"
    )
    parser.add_argument(
        "--max-memory-bytes", type=int, default=0, help="memory for re-executing; 0 sets no bound (default)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what is checked, and what comes of it; exit code 0 where the fraud is confirmed, 1 where it is not."""
    start_logging("ERROR")
    file = split(mapped(options.evidence))
    case = case_of(file.evidence, file.body)
    _say_case(file, case)
    _say_verdict(file, case)
    _say_draw(file, case)
    if case.job.job_type != JOB_TYPE:
        raise AuditError(f"the job is of type {case.job.job_type!r:.40}; here are judged those of {JOB_TYPE!r}")
    auditor = ReplayAuditor(options.max_memory_bytes)
    try:
        finding, reason = auditor.examine(case, file.body)
    finally:
        auditor.stop()
    _say(f"executed again: {finding}: {reason}")
    if finding == "inconclusive":
        raise AuditError("it cannot be judged here whether this is fraud: see what was found above")
    _say("the fraud is confirmed" if finding == "fraudulent" else "the fraud is not confirmed")
    return 0 if finding == "fraudulent" else 1


def _say_case(file: EvidenceFile, case: Case) -> None:
    commitment, challenge = case.commitment, case.challenge
    what = "the whole step" if challenge.tier == 2 else f"unit {challenge.unit} (micro-batch, there and back)"
    _say(f"evidence {file.evidence.digest().hex()}, {len(file.body)} bytes opened")
    _say(f"job {commitment.job.hex()}, signed by its author {case.job.author.hex()}")
    _say(f"step {commitment.step} of stage {commitment.stage}, replica {commitment.replica}: {what}")
    _say(f"commitment, {len(case.earlier)} before it, and opening signed by worker {commitment.worker.hex()}")


def _say_verdict(file: EvidenceFile, case: Case) -> None:
    if not file.verdict:
        _say("verdict: none is in the file, so who accuses is not checked")
        return
    verdict = signed_verdict(file.verdict)
    check_verdict(verdict, file.evidence, case)
    _say(f"verdict signed by auditor {verdict.auditor.hex()}: {verdict.reason}")


def _say_draw(file: EvidenceFile, case: Case) -> None:
    if not file.evidence.lists and not file.evidence.reveals:
        _say("draw: its records are not in the evidence, so whether the seed selects this is not checked")
        return
    check_draw(file.evidence, case)
    if file.evidence.grounds:
        _say(f"draw: it stands on {len(file.evidence.grounds)} papers beside the seed, which were checked")
    _say(
        f"draw: the seed of {len(file.evidence.reveals)} validators' preimages selects this; whether they lead to what "
        "was posted on chain is not in the evidence"
    )


def _say(line: str) -> None:
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()
