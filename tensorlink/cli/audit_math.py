"""`tensorlink audit-math`: how soon audits find a cheat at given settings, and what stake makes cheating not pay."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from typing import Any

from smartnodes_core.errors import ConfigError
from tensorlink.audit.odds import (
    ATTACKS,
    KEEPS_STAKE,
    UNDECIDED,
    Attack,
    Settings,
    can_slash,
    honest_carry_rounds,
    odds,
)
from tensorlink.network import DEFAULT_AUDIT_TERMS
from tensorlink.stage_papers import STATE_INTERVAL_STEPS


def add_commands(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("audit-math", help="how soon audits find a cheat, and what stake makes it not pay")

    def number(flag: str, kind: type, default: float, text: str) -> None:
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: %(default)s)")

    number("--unit-rate", float, DEFAULT_AUDIT_TERMS.unit_rate_ppm / 1e6, "share of units that are audited")
    number("--step-rate", float, DEFAULT_AUDIT_TERMS.step_rate_ppm / 1e6, "share of stage-steps audited as a whole")
    number("--micro-batches", int, 8, "units of a stage-step")
    number("--interval", int, STATE_INTERVAL_STEPS, "steps from one committed state to the next")
    number("--validators", int, 9, "validators that a job's plan names")
    number("--colluding", int, 3, "of them in league with the worker")
    number("--cheat-rate", float, 1.0, "share of units that are bent; of intervals, where a state is")
    number("--gain", float, 1.0, "what a bent unit brings, in any currency")
    number("--steps", int, 1000, "stage-steps within which to be found")
    parser.add_argument(
        "--collusion",
        choices=("approve", "withhold"),
        default="approve",
        help="they call the work honest, or withhold preimages until they are shut out (default: %(default)s)",
    )
    parser.add_argument("--attack", choices=list(ATTACKS), help="this one alone")
    parser.add_argument("--json", action="store_true", help="print JSON; null stands for never and for no stake at all")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the odds of each attack, by how many of a job's assigned validators collude."""
    settings = Settings(
        unit_rate=options.unit_rate,
        step_rate=options.step_rate,
        num_units=options.micro_batches,
        interval_steps=options.interval,
        num_validators=options.validators,
        num_colluding=options.colluding,
        cheat_rate=options.cheat_rate,
        gain=options.gain,
        collusion=options.collusion,
    )
    if options.steps < 1:
        raise ConfigError(f"found --steps {options.steps}, needed at least 1")
    attacks = [options.attack] if options.attack else list(ATTACKS)
    found = [_of_attack(settings, attack, options.steps) for attack in attacks]
    if options.json:
        sys.stdout.write(json.dumps({"settings": asdict(settings), "steps": options.steps, "attacks": found}) + "\n")
    else:
        sys.stdout.write("\n".join(_table(settings, options.steps, found)) + "\n")
    return 0


def _of_attack(settings: Settings, attack: Attack, num_steps: int) -> dict[str, Any]:
    here = {colluding: odds(settings, attack, colluding) for colluding in range(settings.num_assigned + 1)}
    shares = settings.shares_of_jobs()
    cases = [
        {
            "colluding_assigned": colluding,
            "share_of_jobs": share,
            "detection": here[colluding].detection(num_steps),
            "expected_steps": _finite(here[colluding].expected_steps),
            "stake": _finite(here[colluding].stake) if can_slash(settings) and attack not in KEEPS_STAKE else None,
        }
        for colluding, share in shares.items()
    ]
    mean = sum(share * here[colluding].detection(num_steps) for colluding, share in shares.items())
    return {"attack": attack, "what": ATTACKS[attack], "detection": mean, "cases": cases}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _table(settings: Settings, num_steps: int, found: list[dict[str, Any]]) -> list[str]:
    s = settings
    lines = [
        f"Audited: {s.unit_rate:.4%} of units, {s.step_rate:.4%} of stage-steps as a whole; {s.num_units} units a "
        f"step, the state every {s.interval_steps} steps.",
        f"{s.num_colluding} of {s.num_validators} validators collude (they {s.collusion}); {s.num_assigned} are "
        f"assigned to a job, for all of it. Bent: {s.cheat_rate:.4%}; gain {s.gain:g} a unit.",
    ]
    for one in found:
        lines += ["", f"{one['attack']}: {one['what']}"]
        if one["attack"] in UNDECIDED:
            lines.append("  neither end of the link is paid for such a step; no verdict tells which of the two it was")
            continue
        lines.append(
            f"  {'colluding':>9}  {'of all jobs':>11}  {f'found in {num_steps}':>16}  {'steps until':>12}  stake"
        )
        for case in one["cases"]:
            lines.append(
                f"  {case['colluding_assigned']:>4} of {s.num_assigned}  {case['share_of_jobs']:>11.1%}  "
                f"{case['detection']:>16.2%}  {_said(case['expected_steps'], 'never'):>12}  "
                f"{_said(case['stake'], 'none is enough')}"
            )
        lines.append(f"  {'any job':>9}  {1:>11.1%}  {one['detection']:>16.2%}")
    lines += ["", *_notes(settings)]
    return lines


def _said(number: float | None, otherwise: str) -> str:
    return otherwise if number is None else f"{number:,.1f}"


def _notes(settings: Settings) -> list[str]:
    notes = [
        "Damage below the tolerance is seen by no audit. A stake counts only while it is there to be taken: what a "
        "worker has staked is the network's to choose (worker_stake_wei).",
    ]
    if not can_slash(settings):
        notes.append(f"{settings.num_validators} validators are too few to take a stake: a fraud costs reputation.")
    if not honest_carry_rounds(settings):
        notes.append("The honest are no quorum: the others can stop every round with the fraud in it, and every other.")
    if settings.collusion == "withhold" and not settings.can_shut_out:
        notes.append(
            "The honest are too few to shut out who withholds preimages: where one is assigned, nothing is drawn."
        )
    if not settings.can_prove_silence:
        notes.append("The honest are too few to prove a silence that counts: who refuses to open keeps its place.")
    return notes
