"""Decodes, checks and runs hostile programs, one seed after the other, in a process that may die of it.

`fuzz_child.py corpus.json first_seed num_seeds [seconds]`: prints each seed before it is tried, and, for what is
neither refused with an error of ours nor finished within its bounds, a line `! seed what`. The corpus is a list of
valid programs as JSON.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import hostile_programs as hostile
import torch

from smartnodes_core.errors import SmartnodesError
from tensorlink.pipeline.backward import GradientSum, backward, forward
from tensorlink.program.graph import LossProgram, StageProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.limits import check, check_loss
from tensorlink.program.loss import constants_of

MAX_BYTES = 64 << 20
MAX_FLOPS = 10**9
SLACK_BYTES = 512 << 20
SECONDS_EACH = 20


def document_of(random: Random, corpus: list[dict[str, Any]]) -> dict[str, Any]:
    if random.random() < 0.7:
        return hostile.generated(random)
    return hostile.mutated(random, random.choice(corpus))


def attempt(random: Random, document: dict[str, Any]) -> str:
    """Raises what the program makes this code raise; what was reached otherwise."""
    data = hostile.encoded(document)
    if document.get("kind") == "loss":
        loss = LossProgram.from_json(data)
        check_loss(loss, batch=hostile.BATCH, max_bytes=MAX_BYTES, max_flops=MAX_FLOPS)
        inputs = [_entering(random, slot) for slot in loss.inputs.slots]
        (value,) = Interpreter(loss.graph, {}, constants_of(loss), cut=loss.inputs).run(inputs)
        return "ran" if isinstance(value, torch.Tensor) else "gave a number"
    program = StageProgram.from_json(data)
    check(program, batch=hostile.BATCH, max_bytes=MAX_BYTES, max_flops=MAX_FLOPS)
    parameters = {
        name: hostile.tensor(random, spec.dtype, list(spec.shape)).requires_grad_(
            spec.requires_grad and spec.dtype.startswith(("f", "b")) and spec.dtype != "bool"
        )
        for name, spec in program.parameters.items()
    }
    buffers = {name: hostile.tensor(random, spec.dtype, list(spec.shape)) for name, spec in program.buffers.items()}
    before = {name: tensor.clone() for name, tensor in {**parameters, **buffers}.items()}
    inputs = [_entering(random, slot) for slot in program.inputs.slots]
    own = dict(buffers)
    interpreter = Interpreter(program.train, parameters, buffers, cut=program.inputs)
    passed = forward(interpreter, program.inputs, inputs, lambda node: node, grad=True)
    for name, tensor in {**parameters, **own}.items():
        if not torch.equal(before[name].detach().nan_to_num(), tensor.detach().nan_to_num()):
            raise AssertionError(f"{name} was written to")
    gradients = {
        slot: torch.ones_like(value)
        for slot, value in enumerate(passed.outputs)
        if isinstance(value, torch.Tensor) and value.requires_grad
    }
    backward(passed, gradients, parameters, retain=False, into=GradientSum())
    return "ran"


def _entering(random: Random, slot: Any) -> Any:
    return hostile.BATCH if slot.type == "symint" else hostile.tensor(random, slot.dtype, slot.shape)


def main() -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    corpus = json.loads(Path(sys.argv[1]).read_text())
    first, count = int(sys.argv[2]), int(sys.argv[3])
    seconds = float(sys.argv[4]) if len(sys.argv) > 4 else 1e9
    held = int(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")).split()[
            1
        ]
    )
    limit = held * 1024 + MAX_BYTES + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    began, tally = time.process_time(), {}
    for seed in range(first, first + count):
        if time.process_time() - began > seconds:
            break
        random = Random(seed)
        document = document_of(random, corpus)
        sys.stdout.write(f"{seed}\n")
        sys.stdout.flush()
        signal.setitimer(signal.ITIMER_PROF, SECONDS_EACH)  # of CPU: other processes may keep this one waiting
        try:
            outcome = attempt(random, document)
        except SmartnodesError as error:
            outcome = "refused"
            if "allocate memory" in str(error):
                sys.stdout.write(f"! {seed} memory beyond the estimate: {str(error)[:160]!r}\n")
        except BaseException as error:
            outcome = type(error).__name__
            sys.stdout.write(f"! {seed} {type(error).__name__}: {str(error)[:160]!r}\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
        tally[outcome] = tally.get(outcome, 0) + 1
    sys.stdout.write(f"= {json.dumps(tally)}\n")


if __name__ == "__main__":
    main()
