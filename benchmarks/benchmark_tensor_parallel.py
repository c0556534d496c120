"""A training step of one stage on two ranks of one thread each, beside one rank of one thread.

    python benchmarks/benchmark_tensor_parallel.py [--rounds 3] [--out FILE]

The model is the yardstick of `yardstick/model.py`, one stage in this process: forwards and backwards of every
micro-batch, the sum of the gradients, the optimizer, what the log keeps; no links, no hashing. Beside them the physical
limit: two threads that do the same step on half of the samples each and say nothing to each other, which is what a
split without communication could reach on this machine. Modes are interleaved, each round in another order; medians
with their spread, CPU seconds beside wall time. CPU ranks speak over Gloo on loopback.
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
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tensorlink.pipeline.inbox import Delivery
from tensorlink.pipeline.stage import Place, Stage
from tensorlink.program.loss import trace_loss
from tensorlink.program.trace import trace
from tensorlink.stage_optimizer import encode_options
from tensorlink.tensor_parallel.ranks import Ranks
from tensorlink.tensor_parallel.stage import TensorParallelStage

sys.path.insert(0, str(Path(__file__).parent))
from yardstick.model import Sizes, batch, loss_fn, make_model

NUM_RANKS = 2
#: Enough for the snapshots of the window to be used again.
WARM_UP_ROUNDS = 2
MODES = ("one rank", "two ranks", "two halves")


class Unhashed(Executor):
    """Digests are not what is measured."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return Future()


class Nowhere:
    """A port of a stage that is alone."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


class Training:
    """One stage and its steps."""

    def __init__(self, sizes: Sizes, ranks: Ranks | None = None):
        self.sizes, self._step = sizes, 0
        x, y = batch(sizes, 0)
        traced = trace(make_model(sizes), (x[:2],))
        program, state = traced.whole(), traced.state(traced.whole())
        parameters = {name: state[name].detach().clone().requires_grad_() for name in program.parameters}
        buffers = {name: state[name] for name in program.buffers}
        arguments: tuple[Any, ...] = (Place(bytes(32), 0, 0, 0, 1, 7), program, parameters, buffers, Nowhere())
        if ranks is None:
            self.stage = Stage(*arguments, Unhashed(), window_steps=1)
        else:
            self.stage = TensorParallelStage(ranks, sizes.batch, *arguments, Unhashed(), window_steps=1)
        with torch.no_grad():
            self.stage.set_loss(trace_loss(loss_fn, torch.zeros(2, sizes.context, sizes.vocabulary), y[:2]))
        options = encode_options({"lr": sizes.learning_rate})
        self._groups = [{"parameters": list(program.parameters), **options}]
        self.stage.set_optimizer("AdamW", self._groups)

    def step(self) -> None:
        """One step over all micro-batches."""
        n = self.sizes.micro_batches
        x, y = batch(self.sizes, self._step)
        call = {
            "step": self._step, "call": 0, "num_micro_batches": n, "samples": [], "training": True, "grad": True,
            "type": "train_step", "weights": [(1 / n).hex()] * n, "schedule": "1f1b",
        }  # fmt: skip
        self.stage.begin(call)
        for m, (xm, ym) in enumerate(zip(x.tensor_split(n), y.tensor_split(n), strict=True)):
            delivery = Delivery(self._step, 0, m, "activation", 0)
            self.stage.receive(delivery, 0, xm.clone())
            self.stage.receive(delivery._replace(type="target"), 0, ym.clone())
        while self.stage.run_next():
            pass
        self.stage.commit(self._step, 1.0, self._groups, b"o" * 32)
        self._step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write all samples here as JSON")
    parser.add_argument("--small", action="store_true", help="a small model, to see whether everything runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(layers=2, width=64, context=32) if options.small else Sizes(batch=8, micro_batches=4)
    ranks = Ranks(NUM_RANKS, "cpu", _lost)
    half = Sizes(**{**vars(sizes), "batch": sizes.batch // NUM_RANKS})
    halves, threads = [Training(half) for _ in range(NUM_RANKS)], ThreadPoolExecutor(NUM_RANKS)
    split = Training(sizes, ranks)
    modes: dict[str, Callable[[], Any]] = {
        "one rank": Training(sizes).step,
        "two ranks": split.step,
        "two halves": lambda: list(threads.map(Training.step, halves)),
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in MODES}
    for index in range(WARM_UP_ROUNDS + options.rounds):
        for name in (*MODES[index % 3 :], *MODES[: index % 3]):
            began, cpu = time.perf_counter(), time.process_time()
            modes[name]()
            if index >= WARM_UP_ROUNDS:
                samples[name].append((time.perf_counter() - began, time.process_time() - cpu))
    assert isinstance(split.stage, TensorParallelStage)
    _report(samples, sizes, split.stage, _reduced_bytes_per_s(ranks))
    if options.out:
        options.out.write_text(json.dumps({"machine": platform.processor(), "samples": samples}))
    ranks.stop()
    sys.stdout.flush()
    os._exit(0)  # threads of Gloo's outlive the interpreter's end


def _reduced_bytes_per_s(ranks: Ranks) -> float:
    tensors = [torch.zeros(1 << 20) for _ in ranks.groups]

    def reduce(group: Any) -> Tensor:
        for _ in range(20):
            group.all_reduce(tensors[group.rank])
        return tensors[group.rank]

    began = time.perf_counter()
    ranks.each(reduce)
    return 20 * tensors[0].numel() * 4 / (time.perf_counter() - began)


def _report(
    samples: dict[str, list[tuple[float, float]]], sizes: Sizes, stage: TensorParallelStage, bytes_per_s: float
) -> None:
    print(f"{sizes}; {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{'mode':12} {'step s':>8} {'spread':>15} {'CPU s':>8} {'speed-up':>9}")
    base = statistics.median(wall for wall, _ in samples[MODES[0]])
    for name, found in samples.items():
        walls = [wall for wall, _ in found]
        wall, cpu = statistics.median(walls), statistics.median(cpu for _, cpu in found)
        print(f"{name:12} {wall:8.3f} {min(walls):7.3f}-{max(walls):.3f} {cpu:8.3f} {base / wall:9.2f}")
    held = stage.shard_bytes()
    print(f"bytes of weights and moments on each rank: {held}; sums over both ranks: {bytes_per_s / 1e9:.2f} GB/s")
    print(f"collectives of a forward: {stage.plan.train.collectives}")


def _lost(reason: str) -> NoReturn:
    raise SystemExit(reason)


if __name__ == "__main__":
    main()
