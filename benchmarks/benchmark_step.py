"""Step time of the demo's model over two workers, beside one plain process with one thread and with two.

    python benchmarks/benchmark_step.py [--rounds 15] [--out FILE]

All modes are interleaved in one run, each round in another order; medians with their spread, and CPU seconds (user and
system, of every process involved) beside wall time. Audits, TLS, hashing and signing are on.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would steal the cores from the other modes

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tensorlink
from tensorlink.demo.model import ByteGPT, Text, next_byte_loss
from tensorlink.demo.run import DemoOptions

sys.path.insert(0, str(Path(__file__).parent))
from yardstick.processes import cpu_s

WARM_UP_ROUNDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write all samples here as JSON")
    options = parser.parse_args()
    demo = DemoOptions()
    text = Text.of_standard_library()
    torch.manual_seed(demo.seed)
    module = ByteGPT(demo.layers, demo.width, demo.heads, demo.context)
    plain = {threads: _plain_step(copy.deepcopy(module), threads, demo) for threads in (1, 2)}
    example, _ = text.batch(0, demo.batch, demo.context)
    with tensorlink.LocalNetwork(workers=2, validators=1) as network:
        with tensorlink.DistributedModel(
            module,
            network=network,
            stages=2,
            micro_batches=demo.micro_batches,
            example_inputs=(example,),
            progress=False,
        ) as model:
            optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=demo.learning_rate)

            def drop_in(x: torch.Tensor, y: torch.Tensor) -> None:
                optimizer.zero_grad()
                next_byte_loss(model(x), y).backward()
                optimizer.step()

            def train_step(x: torch.Tensor, y: torch.Tensor) -> None:
                model.train_step(x, y, loss_fn=next_byte_loss, optimizer=optimizer)

            modes = {
                "plain, 1 thread": plain[1],
                "plain, 2 threads": plain[2],
                "two workers, drop-in loop": drop_in,
                "two workers, train_step": train_step,
            }
            samples = _measure(modes, text, demo, options.rounds, lambda: [row["pid"] for row in network.processes()])
    _print(samples)
    if options.out is not None:
        options.out.write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")


Step = Callable[[torch.Tensor, torch.Tensor], None]


def _plain_step(module: torch.nn.Module, threads: int, demo: DemoOptions) -> Step:
    """The same micro-batches in this process: plain torch, gradients accumulated."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=demo.learning_rate)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        torch.set_num_threads(threads)
        optimizer.zero_grad()
        for piece, target in zip(x.tensor_split(demo.micro_batches), y.tensor_split(demo.micro_batches), strict=True):
            (next_byte_loss(module(piece), target) * (len(piece) / len(x))).backward()
        optimizer.step()
        torch.set_num_threads(1)

    return step


def _measure(
    modes: dict[str, Step], text: Text, demo: DemoOptions, rounds: int, pids: Callable[[], list[int]]
) -> dict[str, list[dict[str, float]]]:
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
    names = list(modes)
    for index in range(WARM_UP_ROUNDS + rounds):
        x, y = text.batch(index, demo.batch, demo.context)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            cpu, began = cpu_s(pids()), time.perf_counter()
            modes[name](x, y)
            wall = time.perf_counter() - began
            if index >= WARM_UP_ROUNDS:
                samples[name].append({"wall_s": wall, "cpu_s": cpu_s(pids()) - cpu})
    return samples


def _print(samples: dict[str, list[dict[str, float]]]) -> None:
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()}")
    print(f"{'mode':28} {'median ms':>9} {'min':>7} {'max':>7} {'CPU ms':>8} {'speed-up over 1 thread':>24}")
    base: list[dict[str, Any]] = samples["plain, 1 thread"]
    for name, rows in samples.items():
        wall = [row["wall_s"] * 1e3 for row in rows]
        ratios = sorted(b["wall_s"] / r["wall_s"] for b, r in zip(base, rows, strict=True))
        cpu = statistics.median(row["cpu_s"] * 1e3 for row in rows)
        print(
            f"{name:28} {statistics.median(wall):9.1f} {min(wall):7.1f} {max(wall):7.1f} {cpu:8.1f} "
            f"{statistics.median(ratios):10.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
