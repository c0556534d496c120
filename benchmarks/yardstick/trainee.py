"""A user with a network of its own who trains the yardstick whenever asked, protected as always or not at all.

    python benchmarks/yardstick/trainee.py protected|unprotected SCHEDULE SIZES

Takes lines `{"first", "num_steps"}` on standard input, runs these steps one after the other, waits until all that they
left to be done is done, and answers with the wall time and the loss of each and what they used together.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tensorlink
from yardstick import unprotected
from yardstick.model import Sizes, batch, loss_fn, make_model
from yardstick.processes import Answering, cpu_s

WORKERS = 2
#: Short, so that it is full after a few steps and two networks fit in memory.
WINDOW_STEPS = 4
#: After a step, hashes are still being made and checked: it is over when a slice of time passes with little done in it.
SLICE_S, QUIET, PATIENCE_S = 0.05, 0.05, 5.0


def start(variant: str, schedule: str, sizes: Sizes) -> Answering:
    """Its process."""
    return Answering([__file__, variant, schedule, json.dumps(asdict(sizes))])


class Trainee:
    """The network, the model and its optimizer."""

    def __init__(self, network: tensorlink.LocalNetwork, model: tensorlink.DistributedModel, sizes: Sizes):
        self._network, self._model, self._sizes = network, model, sizes
        self._optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=sizes.learning_rate)
        self._processes = {row["name"]: row["pid"] for row in network.processes()}

    def run(self, first: int, num_steps: int) -> dict[str, Any]:
        """`cpu_s` and `usage_ns` of all steps, by process; `wall_s` and `loss` step by step."""
        usage, used = self._usage(), self._cpu_s()
        walls, losses = [], []
        for index in range(first, first + num_steps):
            x, y = batch(self._sizes, index)
            began = time.perf_counter()
            loss = self._model.train_step(x, y, loss_fn=loss_fn, optimizer=self._optimizer)
            walls.append(time.perf_counter() - began)
            losses.append(loss.item())
        self._settle()
        cpu = {name: after - used[name] for name, after in self._cpu_s().items()}
        usage_ns = {name: count - usage.get(name, 0) for name, count in self._usage().items()}
        return {"wall_s": walls, "loss": losses, "cpu_s": cpu, "usage_ns": usage_ns, "audits": self._model.audits()}

    def _settle(self) -> None:
        pause, deadline = threading.Event(), time.monotonic() + PATIENCE_S
        used, since = sum(self._cpu_s().values()), time.monotonic()
        while time.monotonic() < deadline:
            pause.wait(SLICE_S)
            now, now_s = sum(self._cpu_s().values()), time.monotonic()
            if now - used < QUIET * (now_s - since):
                return
            used, since = now, now_s
        raise RuntimeError(f"the network is still busy {PATIENCE_S:g} s after a step")

    def _cpu_s(self) -> dict[str, float]:
        return {name: cpu_s([pid]) for name, pid in self._processes.items()}

    def _usage(self) -> dict[str, int]:
        """The timers of all processes that have some, together."""
        found: dict[str, int] = {}
        for counts in self._model.usage().values():
            for name, count in counts.items():
                found[name] = found.get(name, 0) + count
        return found


def main() -> None:
    variant, schedule, sizes = sys.argv[1], sys.argv[2], Sizes(**json.loads(sys.argv[3]))
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    commands = {}
    if variant == "unprotected":
        tensorlink.LocalNetwork, tensorlink.DistributedModel, tensorlink.DistributedOptimizer  # noqa: B018 - loads them
        unprotected.hash_nothing()
        unprotected.sign_and_encrypt_nothing()
        program = (sys.executable, unprotected.__file__)
        commands = {f"worker-{index}": (*program, "worker") for index in range(WORKERS)}
        commands["validator-0"] = (*program, "validator")
    network = tensorlink.LocalNetwork(
        workers=WORKERS, validators=1, round_interval_s=600, audit_rates=(0.0, 0.0), audit_window_steps=WINDOW_STEPS,
        commands=commands,
    )  # fmt: skip
    x, _ = batch(sizes, 0)
    with network, tensorlink.DistributedModel(
        make_model(sizes), network=network, stages=WORKERS, micro_batches=sizes.micro_batches, example_inputs=(x,),
        schedule=schedule, progress=False,
    ) as model:  # fmt: skip
        trainee = Trainee(network, model, sizes)
        for line in sys.stdin:
            print(json.dumps(trainee.run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
