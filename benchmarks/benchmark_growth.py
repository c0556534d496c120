"""Step time, memory and traffic per worker as stages and micro-batches grow, beside what is predicted.

    python benchmarks/benchmark_growth.py [--floor-ms 20] [--steps 5] [--stages 2,4,6] [--micro-batches 4,8,16,32,64]

Workers are real processes over TLS whose every action takes `--floor-ms` (`yardstick/paced.py`), so that what shows
is the pipeline and not the number of cores. The prediction is the simulator's, the floor as the cost of F, I, W.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import tensorlink
from tensorlink.pipeline.schedule import generate, simulate

WIDTH = 64
PACED = Path(__file__).parent / "yardstick" / "paced.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floor-ms", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--stages", default="2,4,6")
    parser.add_argument("--micro-batches", default="4,8,16,32,64")
    parser.add_argument("--schedules", default="1f1b,zb,zbv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()}")
    print(
        f"{'schedule':9} {'workers':>7} {'micro-b.':>8} {'step s':>7} {'min':>6} {'max':>6} {'predicted':>9}"
        f" {'of it':>6} {'MB/worker':>9} {'sent MB':>8} {'predicted':>9}"
    )
    for workers in [int(number) for number in options.stages.split(",")]:
        command = (sys.executable, str(PACED), "worker", str(options.floor_ms))
        commands = {f"worker-{index}": command for index in range(workers)}
        with tensorlink.LocalNetwork(
            workers=workers, validators=1, slots_per_worker=8, round_interval_s=600, commands=commands
        ) as network:
            for name in options.schedules.split(","):
                for micro_batches in [int(number) for number in options.micro_batches.split(",")]:
                    _one(network, name, workers, micro_batches, options.floor_ms / 1e3, options.steps)


def _one(
    network: tensorlink.LocalNetwork, name: str, workers: int, micro_batches: int, floor: float, steps: int
) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(4 * workers) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    x, y = torch.randn(8 * micro_batches, WIDTH), torch.randn(8 * micro_batches, WIDTH)
    with tensorlink.DistributedModel(
        nn.Sequential(*layers), network=network, stages=workers, micro_batches=micro_batches, example_inputs=(x,),
        schedule=name, progress=False,
    ) as model:  # fmt: skip
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=1e-3)
        times = []
        for step in range(steps + 1):
            before, began = _sent(model), time.perf_counter()
            model.train_step(x, y, loss_fn=nn.functional.mse_loss, optimizer=optimizer)
            wall = time.perf_counter() - began
            sent = _sent(model) - before
            if step:
                times.append(wall)
        memory = [row["resident_bytes"] for row in network.processes() if "compute" in row["name"]]
    schedule = generate(name, workers, micro_batches)
    predicted = simulate(schedule, {"F": floor, "B": 2 * floor, "I": floor, "W": floor}).makespan
    crossing = sum(a != b for a, b in zip(schedule.placement, schedule.placement[1:], strict=False))
    predicted_mb = 2 * crossing * x.numel() * 4 / workers / 1e6
    print(
        f"{name:9} {workers:7} {micro_batches:8} {statistics.median(times):7.3f} {min(times):6.3f} {max(times):6.3f}"
        f" {predicted:9.3f} {statistics.median(times) / predicted:6.3f}"
        f" {statistics.median(memory) / 1e6:9.1f} {sent / workers / 1e6:8.3f} {predicted_mb:9.3f}",
        flush=True,
    )


def _sent(model: tensorlink.DistributedModel) -> int:
    """Bytes that the workers' nodes have sent so far."""
    usage = model.usage()
    return sum(
        counts["sent_bytes"] for name, counts in usage.items() if name.startswith("worker") and "compute" not in name
    )


if __name__ == "__main__":
    main()
