"""Step time, memory and traffic per worker as stages and micro-batches grow, each beside what is predicted.

    python benchmarks/benchmark_growth.py [--floor-ms 20] [--steps 3] [--stages 2,4,6] [--micro-batches 4,8,16,32,64]

Workers are real processes over TLS whose every action takes `--floor-ms` (`yardstick/paced.py`), so that what shows
is the pipeline and not the number of cores. Per worker, on average: memory is what its computing process holds after
the last step, less what it held before the first job; traffic is what its node sent in a step. Predicted are the
simulator's step, with the floor as the cost of F, I, W; the planner's memory; and the bytes of the tensors that cross.
Nothing is audited: a validator that re-executes would compete for the cores.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import tensorlink
from tensorlink.pipeline.schedule import generate, simulate

WIDTH = 256
#: Of a micro-batch: tensors of 64 KB cross, so that headers do not drown them, nor TLS and hashing the cores.
SAMPLES = 64
LAYERS_PER_WORKER = 2
#: As short as can be, so that it is full within the steps of a run.
WINDOW_STEPS = 2
SETTLE_S = 3.0
PACED = Path(__file__).parent / "yardstick" / "paced.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floor-ms", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=3, help="after one to warm up")
    parser.add_argument("--stages", default="2,4,6")
    parser.add_argument("--micro-batches", default="4,8,16,32,64")
    parser.add_argument("--schedules", default="1f1b,zb,zbv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()}, floor {options.floor_ms:g} ms")
    print(f"{'':26} {'step s':^36} {'memory MB per worker':^24} {'traffic MB per worker':^24}")
    print(
        f"{'schedule':9} {'workers':>7} {'micro-b.':>8} {'median':>6} {'min':>6} {'max':>6} {'predicted':>9}"
        f" {'ratio':>5}" + f" {'found':>8} {'predicted':>9} {'ratio':>5}" * 2
    )
    counts = sorted(int(number) for number in options.micro_batches.split(","))  # processes keep what they have freed
    for workers in [int(number) for number in options.stages.split(",")]:
        command = (sys.executable, str(PACED), "worker", str(options.floor_ms))
        commands = {f"worker-{index}": command for index in range(workers)}
        for name in options.schedules.split(","):
            with tensorlink.LocalNetwork(
                workers=workers, validators=1, slots_per_worker=8, round_interval_s=600, commands=commands,
                audit_rates=(0.0, 0.0), audit_window_steps=WINDOW_STEPS,
            ) as network:  # fmt: skip
                run(network, name, workers, 1, 1)  # all code is loaded before memory is looked at
                base = _resident(network)
                for micro_batches in counts:
                    found = run(network, name, workers, micro_batches, options.steps)
                    _print(name, workers, micro_batches, found, base / workers, options.floor_ms / 1e3)


@dataclass(frozen=True)
class Found:
    """Of one job: seconds of each step; per worker, bytes resident in the end, planned, and sent in a step."""

    walls_s: list[float]
    resident_bytes: float
    planned_bytes: float
    sent_bytes: float


def run(network: tensorlink.LocalNetwork, schedule: str, workers: int, micro_batches: int, steps: int) -> Found:
    """One job of `steps` steps after a first one, which is not counted."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS_PER_WORKER * workers) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    x, y = torch.randn(SAMPLES * micro_batches, WIDTH), torch.randn(SAMPLES * micro_batches, WIDTH)
    with tensorlink.DistributedModel(
        nn.Sequential(*layers), network=network, stages=workers, micro_batches=micro_batches, example_inputs=(x,),
        schedule=schedule, progress=False,
    ) as model:  # fmt: skip
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=1e-3)
        walls, sent = [], 0
        for step in range(1 + steps):
            if step == 1:
                sent = _sent(model)
            began = time.perf_counter()
            model.train_step(x, y, loss_fn=nn.functional.mse_loss, optimizer=optimizer)
            walls.append(time.perf_counter() - began)
        sent = _sent(model) - sent
        resident = _resident(network)
        planned = sum(stage["memory_bytes"] for stage in model.report()["stages"])
    return Found(walls[1:], resident / workers, planned / workers, sent / steps / workers)


def _print(name: str, workers: int, micro_batches: int, found: Found, base_bytes: float, floor_s: float) -> None:
    schedule = generate(name, workers, micro_batches)
    step_s = simulate(schedule, {"F": floor_s, "B": 2 * floor_s, "I": floor_s, "W": floor_s}).makespan
    crossing = sum(here != there for here, there in zip(schedule.placement, schedule.placement[1:], strict=False))
    crossing_bytes = 2 * crossing * micro_batches * SAMPLES * WIDTH * 4 / workers  # there and back, float32
    median, held_bytes = statistics.median(found.walls_s), found.resident_bytes - base_bytes
    print(
        f"{name:9} {workers:7} {micro_batches:8} {median:6.3f} {min(found.walls_s):6.3f} {max(found.walls_s):6.3f}"
        f" {step_s:9.3f} {median / step_s:5.2f}"
        f" {held_bytes / 1e6:8.1f} {found.planned_bytes / 1e6:9.1f} {held_bytes / found.planned_bytes:5.2f}"
        f" {found.sent_bytes / 1e6:8.3f} {crossing_bytes / 1e6:9.3f} {found.sent_bytes / crossing_bytes:5.2f}",
        flush=True,
    )


def _resident(network: tensorlink.LocalNetwork) -> int:
    """Bytes that all workers' computing processes hold, once that no longer changes: jobs are unloaded, and hashes
    made, after the caller was answered."""
    pause, deadline = threading.Event(), time.monotonic() + SETTLE_S
    held = -1
    while time.monotonic() < deadline:
        rows = [row for row in network.processes() if row["name"].startswith("worker")]
        before, held = held, sum(row["resident_bytes"] for row in rows if row["name"].endswith(" compute"))
        if held == before:
            break
        pause.wait(0.1)
    return held


def _sent(model: tensorlink.DistributedModel) -> int:
    """Bytes that the workers' nodes have sent so far."""
    usage = model.usage()
    return sum(
        counts["sent_bytes"] for name, counts in usage.items() if name.startswith("worker") and "compute" not in name
    )


if __name__ == "__main__":
    main()
