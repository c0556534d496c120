"""A training step over two workers of one thread each, raced against torch's own pipelines and against one process.

    python benchmarks/benchmark_pipeline.py [--rounds 5] [--modes zbv,drop-in,torch-zbv] [--out FILE]

The model is the yardstick of `yardstick/model.py`. All modes are interleaved in one run, each round in another order;
medians with their spread, CPU seconds (user and system, of every process that the mode involves) beside wall time.
TLS, hashing, signing and audits are on. torch's pipelines exchange tensors over Gloo on loopback, unencrypted.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would steal the cores from the other modes
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tensorlink

sys.path.insert(0, str(Path(__file__).parent))
from yardstick.model import Sizes, batch, loss_fn, make_model
from yardstick.processes import cpu_s
from yardstick.rivals import PIPELINES, PLAIN, Rivals

#: Enough for the audit window, with the rest of its interval, to be full: memory is then used again rather than taken.
WARM_UP_ROUNDS = 9
#: What networks audit where nothing else is said: of micro-batches, of steps.
RATES = (0.002, 0.02)
OURS = ("1f1b", "zb", "zbv", "drop-in")
MODES = (PLAIN, *(f"torch-{name}" for name in PIPELINES), *OURS)

#: What every process counts of itself, in nanoseconds of CPU time (`smartnodes_core/usage.py`).
OVERHEADS = ("hashing_ns", "signing_ns", "encryption_ns")

Step = Callable[[int], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--out", type=Path, help="write all samples here as JSON")
    parser.add_argument("--small", action="store_true", help="a small model, to see whether everything runs")
    options = parser.parse_args()
    sizes = Sizes(layers=4, width=64, context=32) if options.small else Sizes()
    models: dict[str, tensorlink.DistributedModel] = {}
    with ExitStack() as stack:
        modes = _modes(stack, options.modes.split(","), sizes, models)
        samples = _measure(modes, options.rounds)
        _print(samples)
        for name, model in models.items():
            _print_usage(name, model, samples[name])
    if options.out is not None:
        options.out.write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")


def _modes(
    stack: ExitStack, names: list[str], sizes: Sizes, models: dict[str, tensorlink.DistributedModel]
) -> dict[str, Step]:
    modes: dict[str, Step] = {}
    if any(name == PLAIN or name.startswith("torch-") for name in names):
        rivals = stack.enter_context(Rivals(sizes))
        modes |= {name: partial(rivals.step, name.removeprefix("torch-")) for name in names if name not in OURS}
    own = [name for name in names if name in OURS]
    if own:
        network = stack.enter_context(
            tensorlink.LocalNetwork(
                workers=2, validators=1, slots_per_worker=8, round_interval_s=600, audit_rates=RATES
            )
        )
        for name in own:
            modes[name], models[name] = _own_step(stack, network, name, sizes)
    return {name: modes[name] for name in names}


def _own_step(stack: ExitStack, network: Any, name: str, sizes: Sizes) -> tuple[Step, tensorlink.DistributedModel]:
    x, _ = batch(sizes, 0)
    model = stack.enter_context(
        tensorlink.DistributedModel(
            make_model(sizes),
            network=network,
            stages=2,
            micro_batches=sizes.micro_batches,
            example_inputs=(x,),
            schedule="auto" if name == "drop-in" else name,
            progress=False,
        )
    )
    optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=sizes.learning_rate)
    torch.set_num_threads(1)

    def step(index: int) -> dict[str, Any]:
        x, y = batch(sizes, index)
        pids = [row["pid"] for row in network.processes()]
        cpu, began = cpu_s(pids), time.perf_counter()
        if name == "drop-in":
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
        else:
            loss = model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer)
        wall = time.perf_counter() - began
        used = {what: sum(counts.get(what, 0) for counts in model.usage().values()) for what in OVERHEADS}
        return {"wall_s": wall, "cpu_s": cpu_s(pids) - cpu, "loss": loss.item(), **used}

    return step, model


def _measure(modes: dict[str, Step], rounds: int) -> dict[str, list[dict[str, Any]]]:
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
    names = list(modes)
    for index in range(WARM_UP_ROUNDS + rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            found = modes[name](index)
            if index >= WARM_UP_ROUNDS:
                samples[name].append(found)
        print(f"round {index}: " + "  ".join(f"{n} {s[-1]['wall_s']:.2f}" for n, s in samples.items() if s), flush=True)
    return samples


def _print(samples: dict[str, list[dict[str, Any]]]) -> None:
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()}")
    rivals = {name: rows for name, rows in samples.items() if name.startswith("torch-")}
    best = min(rivals, key=lambda name: statistics.median(row["wall_s"] for row in rivals[name]), default=None)
    base = samples.get(PLAIN)
    print(f"{'mode':14} {'median s':>8} {'min':>6} {'max':>6} {'CPU s':>6} {'times ' + PLAIN:>20} {f'of {best}':>22}")
    for name, rows in samples.items():
        wall = [row["wall_s"] for row in rows]
        cpu = statistics.median(row["cpu_s"] for row in rows)
        print(
            f"{name:14} {statistics.median(wall):8.2f} {min(wall):6.2f} {max(wall):6.2f} {cpu:6.2f}"
            f" {_ratio(base, rows):>20} {_ratio(rows, rivals[best]) if best else '':>22}"
        )


def _print_usage(name: str, model: tensorlink.DistributedModel, rows: list[dict[str, Any]]) -> None:
    """What hashing, signing and encryption took of the CPU time of a step, by timers around the named code.

    Workers count all their jobs together: a mode's share is exact only where it is the only one of ours.
    """
    steps = max(1, len(rows) - 1)
    parts = {what: (rows[-1][what] - rows[0][what]) / steps / 1e9 for what in OVERHEADS}
    cpu = statistics.median(row["cpu_s"] for row in rows)
    told = ", ".join(f"{what.removesuffix('_ns')} {seconds:.3f} s" for what, seconds in parts.items())
    print(f"{name}: {told} of {cpu:.2f} CPU s a step: {sum(parts.values()) / cpu:.1%}; schedule {_schedule(model)}")


def _schedule(model: tensorlink.DistributedModel) -> str:
    return str(model.report()["schedule"])


def _ratio(upper: list[dict[str, Any]] | None, lower: list[dict[str, Any]]) -> str:
    """Median of the paired ratios of wall times, with their range."""
    if upper is None:
        return ""
    ratios = sorted(u["wall_s"] / o["wall_s"] for u, o in zip(upper, lower, strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.2f}..{ratios[-1]:.2f})"


if __name__ == "__main__":
    main()
