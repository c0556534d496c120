"""A whole step of a tiny model on one worker beside plain torch: what the network costs where computing costs nothing.

    python benchmarks/benchmark_small_model.py [--rounds 200]

57 thousand parameters, a batch of two micro-batches of 32. Interleaved medians; then where the time of `train_step`
goes, by a clock on the user's side and by the stage's own timeline.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tensorlink

WARM_UP_ROUNDS = 20
#: Sleep between steps, so that none pays for what the one before left to do (hashing, commitments).
PAUSE_S = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 150), nn.ReLU(), nn.Linear(150, 10))
    x, y = torch.randn(64, 64), torch.randint(0, 10, (64,))
    loss_fn = nn.functional.cross_entropy
    plain = copy.deepcopy(module)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)

    def plain_step() -> None:
        plain_optimizer.zero_grad()
        for piece, target in zip(x.chunk(2), y.chunk(2), strict=True):
            (loss_fn(plain(piece), target) / 2).backward()
        plain_optimizer.step()

    with (
        tensorlink.LocalNetwork(workers=1, validators=1, round_interval_s=600, audit_rates=(0.002, 0.02)) as network,
        tensorlink.DistributedModel(
            module, network=network, stages=1, micro_batches=2, example_inputs=(x,), progress=False
        ) as model,
    ):
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-3)
        spent = _watch(model)

        def train_step() -> None:
            model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer)

        def drop_in() -> None:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

        times = _measure({"plain torch": plain_step, "train_step": train_step, "drop-in loop": drop_in}, options.rounds)
        _print(times)
        spent.clear()
        computing = []
        for _ in range(options.rounds):
            train_step()
            computing.append(sum(run.end - run.start for run in model.timetable().runs))
            time.sleep(PAUSE_S)
        _print_parts(spent, computing)


def _watch(model: tensorlink.DistributedModel) -> dict[str, list[float]]:
    """Clocks around the parts of a step; the lists grow as steps run."""
    spent: dict[str, list[float]] = defaultdict(list)

    def clocked(owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **options)
            finally:
                spent[part].append(time.perf_counter() - began)

        setattr(owner, name, call)

    clocked(model._train_step, "run", "whole step")
    clocked(model._train_step, "_send_with_loss_there", "micro-batches on their way")
    clocked(model._steps, "order", "the order, signed meanwhile")
    clocked(model._train_step, "_wait", "until losses and norms are back")
    clocked(model._steps, "prepare", "prepare, where a stage has not told")
    clocked(model._steps, "decide", "commit: send the order, update")
    return spent


def _measure(modes: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in modes}
    for index in range(WARM_UP_ROUNDS + rounds):
        for name, step in modes.items():
            began = time.perf_counter()
            step()
            if index >= WARM_UP_ROUNDS:
                times[name].append(time.perf_counter() - began)
            time.sleep(PAUSE_S)
    return times


def _print(times: dict[str, list[float]]) -> None:
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()}")
    plain = times["plain torch"]
    for name, each in times.items():
        ratios = sorted(one / base for one, base in zip(each, plain, strict=True))
        low, high = ratios[len(ratios) // 10], ratios[-len(ratios) // 10]
        print(
            f"{name:14} median {statistics.median(each) * 1e3:6.2f} ms, of plain torch "
            f"{statistics.median(ratios):5.2f} (10 % to 90 %: {low:.2f}..{high:.2f})"
        )


def _print_parts(spent: dict[str, list[float]], computing: list[float]) -> None:
    print("where the time of train_step goes, median ms:")
    whole = statistics.median(spent["whole step"])
    parts = {part: statistics.median(each) for part, each in spent.items() if part != "whole step"}
    for part, seconds in parts.items():
        print(f"  {part:36} {seconds * 1e3:6.2f}  {seconds / whole:5.0%}")
        if part.startswith("until"):
            print(f"    of which the stage computes          {statistics.median(computing) * 1e3:6.2f}")
    rest = whole - sum(parts.values())
    print(f"  {'checks of inputs, cutting the batch':36} {rest * 1e3:6.2f}  {rest / whole:5.0%}")
    print(f"  {'whole step':36} {whole * 1e3:6.2f}")


if __name__ == "__main__":
    main()
