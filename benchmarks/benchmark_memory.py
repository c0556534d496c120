"""What a worker's computing process holds, beside what a stage needs, for each schedule.

    python benchmarks/benchmark_memory.py [--steps 12] [--schedules gpipe,1f1b,zb,zbv] [--offer-mb 1500] [--unaudited]

The model is the yardstick of `yardstick/model.py` on two workers. Needed are weights, gradients, optimizer state, one
retained copy of weights and optimizer state, and the activations that the schedule holds: what autograd keeps of a
micro-batch (a test compares what is reckoned with what it keeps) times the micro-batches that wait for the end of
their backward, and the workspace of one. Held is the most that was ever resident (shared memory included), less the
most that was before any stage was loaded. Workers offer so little memory that the audit window lies on disk. Audits
are as frequent as in other networks on one machine: the more steps, the surer it is that whole steps were opened.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import tensorlink

sys.path.insert(0, str(Path(__file__).parent))
from yardstick.model import Sizes, batch, loss_fn, make_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--schedules", default="gpipe,1f1b,zb,zbv")
    parser.add_argument("--offer-mb", type=int, default=1500)
    parser.add_argument("--unaudited", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, MB per worker, {options.steps} steps, audit window 16 steps")
    print(
        f"{'schedule':9} {'worker':>6} {'base':>6} {'needed':>7} {'activations':>11} {'peak':>7}"
        f" {'less base':>9} {'ratio':>6}"
    )
    for name in options.schedules.split(","):
        flags = {f"worker-{index}": {"max-memory-bytes": options.offer_mb * 10**6} for index in range(2)}
        rates = {"audit_rates": (0.0, 0.0)} if options.unaudited else {}
        with tensorlink.LocalNetwork(workers=2, validators=1, round_interval_s=600, flags=flags, **rates) as network:
            _one(network, name, options.steps)


def _one(network: tensorlink.LocalNetwork, name: str, steps: int) -> None:
    sizes = Sizes()
    x, _ = batch(sizes, 0)
    base = _resident(network)
    with tensorlink.DistributedModel(
        make_model(sizes), network=network, stages=2, micro_batches=sizes.micro_batches, example_inputs=(x,),
        schedule=name, progress=False,
    ) as model:  # fmt: skip
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=sizes.learning_rate)
        peak = dict(base)
        for step in range(steps):
            x, y = batch(sizes, step)
            model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer)
            peak = {worker: max(peak[worker], held) for worker, held in _resident(network).items()}
        stages = model.report()["stages"]
    for worker in base:
        own = [stage["memory"] for stage in stages if network.local.name_at(stage["endpoint"]) == worker]
        weights, optimizer_bytes = sum(m["weights"] for m in own), sum(m["optimizer"] for m in own)
        activations = sum(m["activations"] for m in own)
        needed = weights + weights + optimizer_bytes + (weights + optimizer_bytes) + activations
        held = peak[worker] - base[worker]
        print(
            f"{name:9} {worker[-1]:>6} {base[worker] / 1e6:6.0f} {needed / 1e6:7.0f} {activations / 1e6:11.0f}"
            f" {peak[worker] / 1e6:7.0f} {held / 1e6:6.0f} {held / needed:6.2f}",
            flush=True,
        )


def _resident(network: tensorlink.LocalNetwork) -> dict[str, int]:
    """The most that each computing process has held so far, by its worker."""
    rows: list[dict[str, Any]] = network.processes()
    return {
        row["name"].removesuffix(" compute"): _high_water(row["pid"])
        for row in rows
        if row["name"].startswith("worker") and row["name"].endswith(" compute")
    }


def _high_water(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
