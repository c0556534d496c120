"""What the pipeline is raced against, each in processes of its own that stay for all rounds.

    python benchmarks/yardstick/rivals.py RANK WORLD STORE SIZES

is one rank of torch's pipelines (or, with a world of one, the plain loop). It takes lines `{"mode", "step"}` on
standard input and answers each with `{"wall_s", "loss"}`.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from yardstick.model import Sizes, batch, cut, loss_fn, make_model
from yardstick.processes import Answering

PLAIN = "plain"
PIPELINES = ("gpipe", "1f1b", "zb", "zbv")

Step = Callable[[int], float | None]


class Rivals:
    """The processes: one for the plain loop, two for torch's pipelines."""

    def __init__(self, sizes: Sizes, world: int = 2):
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._plain = _start(0, 1, store, sizes)
        self._ranks = [_start(rank, world, store, sizes) for rank in range(world)]

    def step(self, mode: str, step: int) -> dict[str, Any]:
        """Run one step; `wall_s` is the slowest process's, `cpu_s` all of theirs."""
        processes = [self._plain] if mode == PLAIN else self._ranks
        for process in processes:
            process.ask({"mode": mode, "step": step})
        answers = [process.answer() for process in processes]
        return {
            "wall_s": max(answer["wall_s"] for answer in answers),
            "cpu_s": sum(answer["cpu_s"] for answer in answers),
            "loss": next(answer["loss"] for answer in answers if answer["loss"] is not None),
        }

    def __enter__(self) -> Rivals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in [self._plain, *self._ranks]:
            process.close()
        self._folder.cleanup()


def _start(rank: int, world: int, store: str, sizes: Sizes) -> Answering:
    return Answering([__file__, str(rank), str(world), store, json.dumps(asdict(sizes))])


# -- in the processes -------------------------------------------------------------------------------------------------


def main() -> None:
    rank, world, store, sizes = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Sizes(**json.loads(sys.argv[4]))
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    answers, sys.stdout = sys.stdout, sys.stderr
    if world > 1:
        import torch.distributed as dist

        logging.getLogger("torch.distributed").setLevel(logging.ERROR)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    steps: dict[str, Step] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        mode = asked["mode"]
        if mode not in steps:
            steps[mode] = _plain_step(sizes) if mode == PLAIN else _pipeline_step(mode, rank, world, sizes)
        if world > 1:
            dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        loss = steps[mode](asked["step"])
        answer = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu, "loss": loss}
        print(json.dumps(answer), file=answers, flush=True)


def _plain_step(sizes: Sizes) -> Step:
    """The same micro-batches in one process, gradients accumulated."""
    model = make_model(sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate)

    def step(index: int) -> float:
        x, y = batch(sizes, index)
        optimizer.zero_grad()
        total = 0.0
        for piece, target in zip(x.chunk(sizes.micro_batches), y.chunk(sizes.micro_batches), strict=True):
            loss = loss_fn(model(piece), target) / sizes.micro_batches
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return step


def _pipeline_step(mode: str, rank: int, world: int, sizes: Sizes) -> Step:
    from torch.distributed import pipelining

    if mode == "zbv":
        parts = cut(make_model(sizes), 2 * world)
        own = [rank, 2 * world - 1 - rank]
        schedule: Any = pipelining.ScheduleZBVZeroBubble(_stages(parts, own), sizes.micro_batches, loss_fn=loss_fn)
    else:
        parts, own = cut(make_model(sizes), world), [rank]
        stages = _stages(parts, own)
        if mode == "zb":
            schedule = pipelining.ScheduleInterleavedZeroBubble(stages, sizes.micro_batches, loss_fn=loss_fn)
        else:
            kind = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B}[mode]
            schedule = kind(stages[0], sizes.micro_batches, loss_fn=loss_fn)
    parameters = [parameter for index in own for parameter in parts[index].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=sizes.learning_rate)
    first, last = 0 in own, len(parts) - 1 in own

    def step(index: int) -> float | None:
        x, y = batch(sizes, index)
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        options = {"target": y, "losses": losses} if last else {}
        schedule.step(*([x] if first else []), return_outputs=False, **options)
        optimizer.step()
        return float(torch.stack(losses).mean().detach()) if losses else None

    return step


def _stages(parts: list[nn.Sequential], own: list[int]) -> list[Any]:
    from torch.distributed.pipelining import PipelineStage

    return [PipelineStage(parts[index], index, len(parts), torch.device("cpu")) for index in own]


if __name__ == "__main__":
    main()
