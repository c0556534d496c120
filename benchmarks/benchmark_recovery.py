"""What the loss of a rig costs: `kill -9` at every phase of a step, how long until training goes on, and what it costs
while nothing fails.

    python benchmarks/benchmark_recovery.py [--kills 24] [--steps 8] [--model demo|yardstick] [--seed 0] [--small]
    python benchmarks/benchmark_recovery.py --churn [--minutes 15]

Real processes on one machine: two rigs of one thread each train, two more stand by; one that was killed is started
again after the step. Every loss is held against the same training in one plain process, to the last bit. Phases:
`forward` and `backward` (a rig dies in the first third of a step's usual time, or in the half after it), `between` two
steps, `decide` (when some stages have committed), `snapshot` (while one is fetched), `hand-over` (a second one, while
the first is taken over). With --churn six rigs are there for some minutes, a tenth of them killed a minute: the goodput
is what is left of the undisturbed run's steps.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tensorlink
from tensorlink.demo.model import ByteGPT, Text, next_byte_loss
from tensorlink.demo.run import DemoOptions
from tensorlink.network import LocalNetwork
from tensorlink.recovery import keeper

sys.path.insert(0, str(Path(__file__).parent))
from yardstick.model import Sizes, batch, loss_fn, make_model

PHASES = ("forward", "backward", "between", "decide", "snapshot", "hand-over")
RIGS = 4
Batch = tuple[torch.Tensor, torch.Tensor]


class Work:
    """What is trained: a module, batches by step, a loss."""

    def __init__(self, name: str, small: bool) -> None:
        torch.manual_seed(0)
        if name == "yardstick":
            sizes = Sizes(layers=4, width=64, context=32) if small else Sizes()
            self.module, self.loss = make_model(sizes), loss_fn
            self.micro_batches = sizes.micro_batches
            self.batch: Callable[[int], Batch] = lambda step: batch(sizes, step)
        else:
            demo = DemoOptions(layers=2, width=16, heads=2, context=16, batch=8) if small else DemoOptions()
            text = Text.of_standard_library()
            self.module = ByteGPT(demo.layers, demo.width, demo.heads, demo.context)
            self.loss, self.micro_batches = next_byte_loss, demo.micro_batches
            self.batch = lambda step: text.batch(step, demo.batch, demo.context)


class Run:
    """A job on the network beside the same training in this process."""

    def __init__(self, network: LocalNetwork, work: Work) -> None:
        self.network, self.work = network, work
        module, example = copy.deepcopy(work.module), (work.batch(0)[0],)
        settings: dict[str, Any] = {"micro_batches": work.micro_batches, "example_inputs": example}
        self.model = tensorlink.DistributedModel(
            copy.deepcopy(module), network=network, stages=2, progress=False, **settings
        )
        self.optimizer = tensorlink.DistributedOptimizer(self.model, torch.optim.AdamW, lr=1e-3)
        self.plain = tensorlink.reference(module, stages=self.model.programs, **settings)
        self.plain_optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        self.recovery = self.model._recovery
        self.steps = 0

    def step(self) -> tuple[float, bool]:
        """Seconds of the next step, and whether its loss is the plain run's to the last bit."""
        x, y = self.work.batch(self.steps)
        began_s = time.monotonic()
        loss = self.model.train_step(x, y, loss_fn=self.work.loss, optimizer=self.optimizer)
        took_s = time.monotonic() - began_s
        plain = self.plain.train_step(x, y, loss_fn=self.work.loss, optimizer=self.plain_optimizer)
        self.steps += 1
        return took_s, torch.equal(loss, plain)

    def rig_of(self, stage: int) -> str:
        """The name of the rig that runs a stage."""
        return self.network.local.name_at(self.model.report()["stages"][stage]["endpoint"])

    def bring_back(self) -> None:
        """Rigs that were killed are started again."""
        for name in (f"worker-{index}" for index in range(RIGS)):
            if self.network.local.node_named(name).poll() is not None:
                self.network.local.start_node(name)


class Killer:
    """Kills the rig of a random stage once, in a phase of the next step; `at_s` is when."""

    def __init__(self, run: Run, phase: str, draw: random.Random, step_s: float) -> None:
        self.run, self.phase = run, phase
        self.stage = draw.randrange(run.model._driver.num_stages)
        self.at_s: float | None = None
        self._names = [run.rig_of(self.stage)]
        self._restore: list[Callable[[], None]] = []
        part = draw.random()
        if phase == "between":
            self.kill()
        elif phase == "forward":
            self._later(part * step_s / 3)
        elif phase == "backward":
            self._later(step_s / 3 + part * step_s / 2)
        elif phase == "decide":
            self._before(
                run.model._driver, "_begin_call", lambda stage, method, *rest: method == "decide" and stage > 0
            )
        elif phase == "snapshot":
            self._before(keeper, "fetch", lambda *args: True)
        else:
            other = [name for name in {run.rig_of(0), run.rig_of(1)} if name != self._names[0]]
            self._before(run.recovery, "_load", lambda *args: True, other[:1] or self._names)
            self.kill()

    def kill(self, names: list[str] | None = None) -> None:
        """At once."""
        self.at_s = self.at_s or time.monotonic()
        for name in names or self._names:
            self.run.network.local.kill(name)

    def _later(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self.kill)
        timer.start()
        self._restore.append(timer.join)

    def _before(self, owner: Any, name: str, when: Callable[..., bool], names: list[str] | None = None) -> None:
        method, done = getattr(owner, name), threading.Event()

        def killing(*args: Any, **kwargs: Any) -> Any:
            if not done.is_set() and when(*args):
                done.set()
                self.kill(names)
            return method(*args, **kwargs)

        setattr(owner, name, killing)
        self._restore.append(lambda: setattr(owner, name, method))

    def end(self) -> None:
        """Nothing is killed any more."""
        for restore in self._restore:
            restore()


def kills(work: Work, num_kills: int, num_steps: int, seed: int) -> bool:
    """Prints a line per phase; whether no step was lost and every loss was right."""
    draw = random.Random(seed)
    beyond_s: dict[str, list[float]] = defaultdict(list)
    parts: list[tuple[float, float, float]] = []
    wrong = lost = 0
    torch.set_num_threads(1)
    with LocalNetwork(
        workers=RIGS, validators=1, slots_per_worker=8, round_interval_s=600, audit_rates=(0, 0)
    ) as network:
        run = Run(network, work)
        usual_s: list[float] = []
        for number in range(num_kills):
            while len(usual_s) < 4 or run.steps % num_steps:
                took_s, right = run.step()
                usual_s.append(took_s)
                wrong += not right
            step_s = statistics.median(usual_s[-32:])
            before = len(run.model.recoveries())
            killer = Killer(run, PHASES[number % len(PHASES)], draw, step_s)
            try:
                # a rig that dies while a snapshot is fetched may be missed only in the step after
                while killer.at_s is None or len(run.model.recoveries()) == before:
                    at = run.steps
                    _, right = run.step()
                    wrong += not right
                    lost += run.steps != at + 1
                ended_s = time.monotonic()
            finally:
                killer.end()
            beyond_s[killer.phase].append(ended_s - killer.at_s - step_s)
            done = run.model.recoveries()[-1]
            parts.append((done.planning_s, done.loading_s, done.again_s))
            print(
                f"kill {number + 1}: {killer.phase}, stage {killer.stage}: {ended_s - killer.at_s:.2f} s: planned in "
                f"{done.planning_s:.2f}, loaded in {done.loading_s:.2f}, {done.num_done_again} steps again in "
                f"{done.again_s:.2f}",
                flush=True,
            )
            run.bring_back()
            usual_s.append(run.step()[0])
        interval, step_s = run.recovery._keeper.interval_steps, statistics.median(usual_s)
        fetch_s = run.recovery._keeper._fetch_s
        run.model.close()
    everything = [value for values in beyond_s.values() for value in values]
    print(
        f"{num_kills} kills, {run.steps} steps, step {step_s:.3f} s; a snapshot every {interval} steps: {fetch_s:.3f} s"
    )
    print(f"steps lost: {lost}, losses that are not the plain run's: {wrong}")
    for phase, values in beyond_s.items():
        print(f"{phase:>10}: {_spread(values)} beyond a step's own time")
    print(f"{'all':>10}: {_spread(everything)} (goal: median 3 s)")
    for name, values in zip(("planning", "loading", "doing again"), zip(*parts, strict=True), strict=True):
        print(f"{name:>12}: {_spread(list(values))}")
    return not (wrong or lost)


def churn(work: Work, minutes: float, seed: int) -> None:
    """Prints the goodput while a tenth of six rigs is killed a minute."""
    draw = random.Random(seed)
    torch.set_num_threads(1)
    names = [f"worker-{index}" for index in range(6)]
    with _network(len(names)) as network:
        run = Run(network, work)
        usual_s = [run.step()[0] for _ in range(24)][8:]
        step_s, wrong, killed = statistics.median(usual_s), 0, 0
        end_s, next_s = time.monotonic() + 60 * minutes, time.monotonic() + draw.expovariate(len(names) / 600)
        trained_s = plain_s = 0.0
        first = run.steps
        while time.monotonic() < end_s:
            if time.monotonic() >= next_s:
                next_s += draw.expovariate(len(names) / 600)
                name = draw.choice(names)
                network.local.kill(name)
                threading.Timer(5.0, network.local.start_node, (name,)).start()
                killed += 1
            began_s = time.monotonic()
            took_s, right = run.step()
            trained_s += took_s
            plain_s += time.monotonic() - began_s - took_s
            wrong += not right
        steps = run.steps - first
        print(f"{minutes:.0f} minutes, {killed} kills, {len(run.model.recoveries())} recoveries, {wrong} losses wrong")
        print(f"goodput: {steps * step_s / trained_s:.1%} of the undisturbed {1 / step_s:.2f} steps/s (goal: 90 %)")
        run.model.close()


def _network(num_rigs: int) -> LocalNetwork:
    return LocalNetwork(
        workers=num_rigs, validators=1, slots_per_worker=8, round_interval_s=600, audit_rates=(0, 0), claim_delay_s=600
    )


def _spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.2f} s ({min(values):.2f}..{max(values):.2f}, {len(values)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8, help="from one kill to the next")
    parser.add_argument("--model", choices=("demo", "yardstick"), default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--churn", action="store_true")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--small", action="store_true", help="a small model, to see whether everything runs")
    options = parser.parse_args()
    work = Work(options.model, options.small)
    if options.churn:
        churn(work, options.minutes, options.seed)
        return 0
    return 0 if kills(work, options.kills, options.steps, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
