"""What audits find, whom they accuse wrongly, what other rules let through, how soon, and at what cost.

    python benchmarks/benchmark_audit.py attacks [--trials 48] [--only NAME] [--dtype -bf16]
    python benchmarks/benchmark_audit.py honest [--jobs 4] [--models mlp gpt …]
    python benchmarks/benchmark_audit.py roc [--dtype -bf16]
    python benchmarks/benchmark_audit.py time [--runs 2000]
    python benchmarks/benchmark_audit.py drift
    python benchmarks/benchmark_audit.py cost
    python benchmarks/benchmark_audit.py sum FILE …

Small stages train in memory; an audit is the network's own: a commitment, a seed that selects, a signed opening as
bytes, and the validator's examination of these bytes (`audit/rig.py`). Only sockets and the pipe to the computing
process are left out. With `--out FILE` each line of results is added to a file of JSON lines; `--first-seed` lets
another piece try other weights and data; `sum` adds pieces up. What commitments cost is in `benchmark_overhead.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # replays take turns between one thread and two

import torch

sys.path.insert(0, str(Path(__file__).parent))
from audit import attacks, cost, detection, drifting, honest, roc
from audit.attacks import ATTACKS, Count
from audit.bounds import upper
from audit.detection import Detection
from audit.drifting import Drifted
from audit.honest import Honest, NumericClass
from audit.rig import Validators
from yardstick.model import Sizes

Row = TypeVar("Row", Count, Honest)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, help="add results here, as JSON lines")
    shared.add_argument("--first-seed", type=int, default=0)
    one = parts.add_parser("attacks", parents=[shared])
    one.add_argument("--trials", type=int, default=48, help="audited units of each attack")
    one.add_argument("--only", nargs="*", help="names, or what they begin with", default=[""])
    one.add_argument("--dtype", default="", choices=["", "-bf16"])
    one.add_argument("--models", nargs="*", default=[], help="other models than those in which attacks are tried")
    one.add_argument("--steps", type=int, default=attacks.STEPS, help="audited steps of a job")
    one.set_defaults(run=_attacks)
    one = parts.add_parser("honest", parents=[shared])
    one.add_argument("--jobs", type=int, default=4, help="of each model and class")
    one.add_argument("--steps", type=int, default=8)
    one.add_argument("--models", nargs="*", default=list(honest.MODELS))
    one.add_argument("--classes", type=int, nargs="*", default=list(range(len(honest.CLASSES))))
    one.set_defaults(run=_honest)
    one = parts.add_parser("roc", parents=[shared])
    one.add_argument("--trials", type=int, default=48)
    one.add_argument("--jobs", type=int, default=3, help="honest ones, of each model and class")
    one.add_argument("--dtype", default="-bf16", choices=["", "-bf16"])
    one.add_argument("--only", nargs="*", help="names, or what they begin with", default=list(SUBTLE))
    one.set_defaults(run=_roc)
    one = parts.add_parser("time", parents=[shared])
    one.add_argument("--runs", type=int, default=2000)
    one.set_defaults(run=_time)
    one = parts.add_parser("drift", parents=[shared])
    one.add_argument("--steps", type=int, default=1000)
    one.add_argument("--shares", type=float, nargs="*", default=list(drifting.shares()), help="of the tolerance")
    one.set_defaults(run=_drift)
    one = parts.add_parser("cost", parents=[shared])
    one.add_argument("--layers", type=int, default=Sizes().layers)
    one.add_argument("--small", action="store_true", help="a small model, to see whether everything runs")
    one.set_defaults(run=_cost)
    one = parts.add_parser("sum")
    one.add_argument("files", type=Path, nargs="+")
    one.set_defaults(run=_sum)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="TF32 acceleration")
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()}")
    options.run(options)


def _write(out: Path | None, row: dict[str, Any]) -> None:
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


# -- attacks ----------------------------------------------------------------------------------------------------------


def _attacks(options: argparse.Namespace) -> None:
    validators = Validators()
    names = [name for name in ATTACKS if any(name.startswith(begin) for begin in options.only)]
    _print_attack_head()
    for name in names:
        where = (options.first_seed, options.dtype, options.steps, tuple(options.models))
        count = attacks.count(name, options.trials, validators, *where)
        _write(options.out, {"part": "attacks", "name": name, "dtype": options.dtype, **asdict(count)})
        _print_attack(name, options.dtype, count)


def _print_attack_head() -> None:
    print(
        f"{'attack':34} {'caught':>7} {'missed':>7} {'misses at most':>15} {'steps until found':>18}"
        f" {'IOTA lets through':>18} {'continuity does':>16} {'ms':>6} {'KB':>6}"
    )


def _print_attack(name: str, dtype: str, count: Count) -> None:
    trials = count.caught + count.missed
    honest_row = name == "none (honest)"
    most = upper(count.missed, trials)
    steps, _ = detection.expected_steps(ATTACKS[name].odds, count.caught / trials)
    told = "" if honest_row else f"{steps:.0f}" if count.caught else "never"
    others = [
        f"{through} of {asked}" if asked else "-"
        for through, asked in (
            (count.iota_let_through, count.iota_asked),
            (count.continuity_let_through, count.continuity_asked),
        )
    ]
    print(
        f"{name + dtype:34} {count.caught:7} {count.missed:7} {'' if honest_row else f'{most:.3%}':>15} {told:>18}"
        f" {others[0]:>18} {others[1]:>16} {count.cpu_s / trials * 1e3:6.1f} {count.bytes_opened / trials / 1e3:6.1f}",
        flush=True,
    )
    for example in [] if honest_row else count.examples:
        print(f"    missed in {example}")


# -- honest workers ---------------------------------------------------------------------------------------------------


def _honest(options: argparse.Namespace) -> None:
    rows: list[tuple[str, NumericClass, Honest]] = []
    for number in options.classes:
        numeric = honest.CLASSES[number]
        for model in options.models:
            found = honest.examine(numeric, model, options.first_seed, options.jobs, options.steps)
            _write(options.out, {"part": "honest", "model": model, "numeric": list(numeric), **asdict(found)})
            rows.append((model, numeric, found))
            _print_reasons(found)
    _print_honest(rows)


def _print_honest(rows: list[tuple[str, NumericClass, Honest]]) -> None:
    for title, of in (("model", lambda row: row[0]), ("class of the worker", lambda row: str(row[1]))):
        columns = ("audits", "independent", "not equal", "accused", "undecided", "drift")
        print(f"{title:30}" + "".join(f" {column:>11}" for column in columns))
        for name, found in _added((of(row), row[2]) for row in rows).items():
            _print_one_honest(name, found)
    everything = _added(("all", row[2]) for row in rows)["all"]
    _print_one_honest("all", everything)
    print(
        f"false alarms at most {upper(everything.accused, everything.audits):.2e} of audits, "
        f"{upper(everything.accused, everything.independent):.2e} of independent ones (95 %)"
    )


def _print_one_honest(name: str, found: Honest) -> None:
    counts = (found.audits, found.independent, found.unequal, found.accused, found.inconclusive)
    print(f"{name:30}" + "".join(f" {count:11}" for count in counts) + f" {found.drift:11.2f}")


def _print_reasons(found: Honest) -> None:
    for reason in found.reasons[:5]:
        print(f"    {reason}", flush=True)


# -- other tolerances -------------------------------------------------------------------------------------------------

SUBTLE = ("x0.99", "x1.01", "1 % noise", "int8", "rank-1", "stale weights")
_ROC_MODELS, _ROC_CLASSES = ("mlp", "gpt", "wide", "conv"), (3, 6, 9)


def _roc(options: argparse.Namespace) -> None:
    print(f"{'accused at so much of the tolerance':36}" + "".join(f" {limit:>7}" for limit in roc.LIMITS))
    scores: list[float] = []
    for number, model in itertools.product(_ROC_CLASSES, _ROC_MODELS):
        numeric = honest.CLASSES[number]
        scores += roc.of_honest(numeric, model + options.dtype, options.first_seed, options.jobs)
    _print_roc(f"honest ({len(scores)} audits)", scores)
    for name in [name for name in ATTACKS if any(name.startswith(begin) for begin in options.only)]:
        _print_roc(name + options.dtype, roc.of_attack(name, options.dtype, options.trials, options.first_seed))


def _print_roc(name: str, scores: list[float]) -> None:
    print(f"{name:36}" + "".join(f" {rate:7.1%}" for rate in roc.rates(scores)), flush=True)


# -- time to detection ------------------------------------------------------------------------------------------------

_RUNS: list[tuple[str, str, float, int]] = [
    ("every unit's output", "wrong-output", 1.0, 0),
    ("every unit's output, one of three in league", "wrong-output", 1.0, 1),
    ("every step's weight gradient", "wrong-gradient", 1.0, 0),
    ("rare poison: output of 0.5 % of units", "wrong-output", 0.005, 0),
]


def _time(options: argparse.Namespace) -> None:
    print(f"{'bent':46} {'runs':>6} {'mean steps':>11} {'expected':>9} {'KS distance':>12}")
    for name, kind, rate, colluding in _RUNS:
        found = detection.simulate(kind, options.runs, rate, colluding, options.first_seed)
        _write(options.out, {"part": "time", "name": name, **asdict(found)})
        _print_time(name, found)


def _print_time(name: str, found: Detection) -> None:
    print(f"{name:46} {found.runs:6} {found.mean:11.1f} {found.expected:9.1f} {found.distance:12.4f}", flush=True)


# -- below the tolerance ----------------------------------------------------------------------------------------------


def _drift(options: argparse.Namespace) -> None:
    print(
        f"{'what drifts':22} {'of tolerance':>13} {'audits':>7} {'accused':>8} {'seen at step':>13} {'audit':>6}"
        f" {'moved by then':>14} {f'after {options.steps} steps':>17} {'of the norm':>12}"
    )
    for case, share in itertools.product(drifting.CASES, options.shares):
        found = drifting.run(case, share, options.steps, options.first_seed)
        _write(options.out, {"part": "drift", **asdict(found)})
        _print_drift(found)
    print("moved: by so much of learning rate times steps; the last two columns: if nobody acts on what was seen")
    print(
        f"updates within their tolerance, always one way: {drifting.of_updates(options.steps):.2e} of a weight at most"
    )


def _print_drift(found: Drifted) -> None:
    seen = (str(found.seen_at_step), str(found.seen_after_audits), f"{found.moved_when_seen:.1%}")
    told = seen if found.seen_at_step else ("never", "", "")
    print(
        f"{found.case:22} {found.share:13} {found.audits:7} {found.accused:8} {told[0]:>13} {told[1]:>6} {told[2]:>14}"
        f" {found.moved_at_end:17.1%} {found.of_tensor_at_end:12.3%}",
        flush=True,
    )


# -- cost -------------------------------------------------------------------------------------------------------------


def _cost(options: argparse.Namespace) -> None:
    sizes = Sizes(layers=2, width=16, heads=2, vocabulary=32, context=8) if options.small else Sizes(options.layers)
    found = cost.measure(sizes)
    _write(options.out, {"part": "cost", **asdict(found)})
    print(f"one of two stages of {sizes}, {cost.NUM_MICRO_BATCHES} micro-batches, one thread; CPU seconds")
    print(f"worker's step {found.worker_step_s:.3f}")
    print(f"{'auditor':30} {'a unit':>10} {'a step':>10}" + " of the compute of workers")
    for what, equal in (("every bit equal", True), ("bits differ: noise measured", False)):
        unit, step = (found.unit_equal_s, found.step_equal_s) if equal else (found.unit_unequal_s, found.step_unequal_s)
        print(f"{what:30} {unit:10.3f} {step:10.3f} {found.share(equal):26.2%}")
    print(f"opened: {found.unit_bytes / 1e6:.1f} MB a unit, {found.step_bytes / 1e6:.1f} MB a step")
    print(f"        {found.bytes_per_step() / 1e6:.2f} MB per stage and step in the mean, at the default rates")
    print(
        f"kept for the audit window: {found.kept() / 1e6:.0f} MB, in memory or on disk "
        f"({found.kept_per_step / 1e6:.1f} MB a step, {found.kept_per_interval / 1e6:.1f} MB an interval)"
    )


# -- pieces -----------------------------------------------------------------------------------------------------------


def _added(rows: Iterable[tuple[Any, Row]]) -> dict[Any, Row]:
    """Rows of one name added up, field by field; texts are those of the last that has one."""
    found: dict[Any, Row] = {}
    for name, row in rows:
        if name not in found:
            found[name] = type(row)(**asdict(row))
            continue
        for field in fields(row):
            before, now = getattr(found[name], field.name), getattr(row, field.name)
            if field.name == "drift":
                now = max(before, now)
            elif isinstance(now, str):
                now = now or before
            else:
                now += before
            setattr(found[name], field.name, now)
    return found


def _sum(options: argparse.Namespace) -> None:
    rows = [json.loads(line) for path in options.files for line in path.read_text(encoding="utf-8").splitlines()]
    by_part: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_part.setdefault(row.pop("part"), []).append(row)
    counts = _added(((row.pop("name"), row.pop("dtype")), Count(**row)) for row in by_part.get("attacks", []))
    if counts:
        _print_attack_head()
    for (name, dtype), count in counts.items():
        _print_attack(name, dtype, count)
    if "honest" in by_part:
        _print_honest(
            [(row.pop("model"), NumericClass(*row.pop("numeric")), Honest(**row)) for row in by_part["honest"]]
        )
    for row in by_part.get("time", []):
        _print_time(row.pop("name"), Detection(**row))
    for row in by_part.get("drift", []):
        _print_drift(Drifted(**row))


if __name__ == "__main__":
    main()
