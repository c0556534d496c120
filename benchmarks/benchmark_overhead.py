"""What hashing, signing and encryption cost of a training step: the same step with and without them, in pairs.

    python benchmarks/benchmark_overhead.py [--pairs 20] [--steps 1] [--schedule zbv] [--out FILE]

Two networks of real processes train the yardstick of `yardstick/model.py` side by side, each with two workers of one
thread: one as it is, one with constants for hashes, no signatures and plain sockets (`yardstick/unprotected.py`). They
take turns, in random order within a pair; a turn is a few steps and all that they leave to be done. Printed are medians
of the paired differences with a 95 % interval (percentile bootstrap), beside the timers around the named code. Nothing
is audited: re-executing costs both the same. Both must give the same losses to the last bit. Wall time is that of the
last step of a turn, to its end: the state's hashes, which are made beside the next step, slow it if there is one
before it in the turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from yardstick import trainee
from yardstick.model import Sizes
from yardstick.processes import Answering

#: Steps until the audit window is full, and some more: memory is used again from then on.
WARM_UP_STEPS = 8
VARIANTS = ("protected", "unprotected")
OVERHEADS = ("hashing_ns", "signing_ns", "encryption_ns")
RESAMPLES = 10_000

Pair = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--schedule", default="zbv")
    parser.add_argument("--out", type=Path, help="write samples here as they come, as JSON")
    parser.add_argument("--of", type=Path, nargs="+", help="measure nothing: print what runs have written, together")
    parser.add_argument("--small", action="store_true", help="a small model, to see whether everything runs")
    options = parser.parse_args()
    if options.of is not None:
        pairs = [pair for path in options.of for pair in json.loads(path.read_text(encoding="utf-8"))]
    else:
        sizes = Sizes(layers=4, width=64, context=32) if options.small else Sizes()
        users = {variant: trainee.start(variant, options.schedule, sizes) for variant in VARIANTS}
        try:
            pairs = _measure(users, options.pairs, options.steps, options.out)
        finally:
            for user in users.values():
                user.close(patience_s=10.0)
    _print(pairs, options.steps, options.schedule)


def _measure(users: dict[str, Answering], num_pairs: int, num_steps: int, out: Path | None) -> list[Pair]:
    draw = random.Random(0)
    step = 0
    pairs: list[Pair] = []
    while len(pairs) < num_pairs:
        turns = list(VARIANTS)
        draw.shuffle(turns)
        pair: Pair = {}
        for variant in turns:
            users[variant].ask({"first": step, "num_steps": num_steps})
            pair[variant] = users[variant].answer()
        _check(pair)
        step += num_steps
        if step > WARM_UP_STEPS:
            pairs.append(pair)
        if out is not None:
            out.write_text(json.dumps(pairs, indent=1) + "\n", encoding="utf-8")
        told = "  ".join(f"{variant} {pair[variant]['wall_s'][-1]:.3f}" for variant in turns)
        print(f"step {step - 1}: {told}", flush=True)
    return pairs


def _check(pair: Pair) -> None:
    """Both trained the same, and the one without protection had none."""
    protected, bare = (pair[variant] for variant in VARIANTS)
    if protected["loss"] != bare["loss"]:
        raise RuntimeError(f"found losses {protected['loss']} and {bare['loss']}, needed the same")
    left = {name: bare["usage_ns"].get(name, 0) for name in ("hashing_ns", "signing_ns")}
    if any(left.values()):
        raise RuntimeError(f"found {left} without protection, needed none")
    audits = sum(count for found in pair.values() for count in found["audits"].values())
    if audits:
        raise RuntimeError(f"found {audits} audits, needed none")


def _print(pairs: list[Pair], num_steps: int, schedule: str) -> None:
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()}")
    print(f"{len(pairs)} pairs, {num_steps} steps a turn, schedule {schedule}; ms of a step; no audits")
    print(f"{'':24} {'protected':>9} {'without':>9} {'difference (95 % interval)':>30} {'of a protected step':>28}")

    def cpu(*kinds: str) -> Callable[[dict[str, Any]], float]:
        return lambda found: sum(s for name, s in found["cpu_s"].items() if _kind(name) in kinds) / num_steps

    def wall(found: dict[str, Any]) -> float:
        return float(found["wall_s"][-1])

    for kind in ("computing", "worker", "validator", "user"):
        _line(f"CPU, {kind} processes", pairs, cpu(kind))
    whole = statistics.median(
        _line("CPU, all processes", pairs, cpu("computing", "worker", "validator", "user", "chain"))
    )
    _line("wall", pairs, wall)
    told, total = [], 0.0
    for name in OVERHEADS:
        took = {
            v: statistics.median(pair[v]["usage_ns"].get(name, 0) for pair in pairs) / num_steps / 1e9 for v in VARIANTS
        }
        plain = f" ({took['unprotected'] * 1e3:.1f} by plain sockets)" if name == "encryption_ns" else ""
        told.append(f"{name.removesuffix('_ns')} {took['protected'] * 1e3:.1f} ms{plain}")
        total += took["protected"]
    print(f"timers: {', '.join(told)}: {total / whole:.2%} of the CPU time of a step")


def _kind(process: str) -> str:
    return "computing" if process.endswith(" compute") else process.split("-")[0].split(" ")[0]


def _line(what: str, pairs: list[Pair], figure: Callable[[dict[str, Any]], float]) -> list[float]:
    """Prints one figure of both variants and how they differ; returns those of the protected."""
    protected, bare = ([figure(pair[variant]) for pair in pairs] for variant in VARIANTS)
    differences = [upper - lower for upper, lower in zip(protected, bare, strict=True)]
    middle, low, high = statistics.median(differences), *_interval(differences)
    whole = statistics.median(protected)
    print(
        f"{what:24} {whole * 1e3:9.1f} {statistics.median(bare) * 1e3:9.1f}"
        f" {f'{middle * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f})':>30}"
        f" {f'{middle / whole:.2%} ({low / whole:.2%} to {high / whole:.2%})':>28}"
    )
    return protected


def _interval(values: list[float]) -> tuple[float, float]:
    """95 % of the median of `values`, by percentile bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


if __name__ == "__main__":
    main()
