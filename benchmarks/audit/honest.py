"""Honest workers of other numeric classes than their auditor: another process trains and opens, this one examines.

A class is threads, oneDNN and instruction set of the worker's process, set through its environment. The auditor is
always this process: one thread, every kernel it has. In half precision one more class stands for other hardware.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from audit.rig import WHOLE_STEP, Job, Validators
from smartnodes_core.audit import Case
from smartnodes_core.records import Challenge, Commitment, JobRecord
from tensorlink.pipeline.stage import Stage
from tensorlink.program.interpreter import Interpreter

MODELS = ("mlp", "gpt", "router", "conv", "dropout", "wide")
THREADS, ONEDNN, ISAS = (1, 2, 4), (True, False), ("default", "avx2")


class NumericClass(NamedTuple):
    """How a worker's process computes."""

    threads: int
    onednn: bool
    isa: str

    def __str__(self) -> str:
        return f"{self.threads} threads, oneDNN {'on' if self.onednn else 'off'}, {self.isa}"


#: What stands for other hardware in half precision: kernels that keep float32 within the stage.
FLOAT32_INSIDE = "float32 inside"
CLASSES = [NumericClass(*one) for one in itertools.product(THREADS, ONEDNN, ISAS)]
CLASSES.append(NumericClass(1, True, FLOAT32_INSIDE))
_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


class Opened(msgspec.Struct, array_like=True):
    """One audit on its way from the worker's process, with the model's name and the seed and step that made it."""

    model: str
    seed: int
    step: int
    stage: int
    job: bytes
    spec: bytes
    commitment: bytes
    challenge: bytes
    order: bytes
    opening: bytes
    earlier: list[bytes]
    body: bytes


@dataclass
class Honest:
    """Audits of honest work of one class. `independent` counts stages of steps: units of one step have much in common.
    `unequal` is how many differed in some bit, `drift` the farthest that any sum of residuals came (accusing from
    `drift.LIMIT` on)."""

    audits: int = 0
    independent: int = 0
    unequal: int = 0
    accused: int = 0
    inconclusive: int = 0
    drift: float = 0.0
    reasons: list[str] = field(default_factory=list)


class Float32Inside(Stage):
    """Computes in float32 from where tensors enter the stage to where they leave it."""

    def _begin(self, parameters: dict[str, Tensor], bounds: Any) -> None:
        super()._begin(parameters, bounds)
        for training in (True, False):
            self._interpreters[training] = _Float32Interpreter(self, training)  # type: ignore[assignment]


class _Float32Interpreter:
    def __init__(self, stage: Stage, training: bool) -> None:
        self._stage, self._training = stage, training

    def run(self, values: Sequence[Any], seed_for: Any, deferred: Any = None) -> list[Any]:
        stage = self._stage
        parameters = {name: tensor.float() for name, tensor in stage.parameters.items()}
        buffers = {name: _raised(tensor) for name, tensor in stage.buffers.items()}
        inside = Interpreter(stage.program.graph(self._training), parameters, buffers)
        outputs = inside.run([_raised(value) for value in values], seed_for)
        for name, tensor in buffers.items():
            stage.buffers[name] = tensor.to(stage.buffers[name].dtype)
        dtype = next(iter(stage.parameters.values())).dtype
        return [one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one for one in outputs]


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def write_cases(
    out: BinaryIO, model: str, first_seed: int, num_jobs: int, num_steps: int, stage_class: type[Stage] = Stage
) -> None:
    """Trains and opens everything; the worker's process."""
    validators = Validators()
    for seed in range(first_seed, first_seed + num_jobs):
        draw = seed * 7
        job = Job(
            model, seed, validators, stage_class, whole=seed % 2 == 0,
            num_micro_batches=1 + draw % 3, num_rows=(6, 9, 12)[draw % 3],
            interval_steps=(1, 4)[draw // 2 % 2], optimizer=("AdamW", "SGD")[draw // 4 % 2],
            options={"lr": 1e-2} if draw // 4 % 2 == 0 else {"lr": 1e-2, "momentum": 0.9},
        )  # fmt: skip
        for step in range(num_steps):
            job.step()
            units = [WHOLE_STEP] if seed % 2 == 0 else range(job.num_micro_batches)
            for index, unit in itertools.product(range(len(job.stages)), units):
                case, body = job.case(index, step, unit)
                data = msgspec.msgpack.encode(
                    Opened(
                        model, seed, step, index, case.job.encode(), case.spec, case.commitment.encode(),
                        case.challenge.encode(), case.order, case.opening, [one.encode() for one in case.earlier],
                        bytes(body),
                    )
                )  # fmt: skip
                out.write(len(data).to_bytes(8, "big") + data)


def read_cases(source: BinaryIO) -> Iterator[tuple[Opened, Case, memoryview]]:
    """What `write_cases` wrote."""
    while head := source.read(8):
        one = msgspec.msgpack.decode(source.read(int.from_bytes(head, "big")), type=Opened)
        case = Case(
            JobRecord.decode(one.job), one.spec, Commitment.decode(one.commitment), Challenge.decode(one.challenge),
            one.order, one.opening, tuple(Commitment.decode(data) for data in one.earlier),
        )  # fmt: skip
        yield one, case, memoryview(one.body)


def examine(numeric: NumericClass, model: str, first_seed: int, num_jobs: int, num_steps: int) -> Honest:
    """Honest work of one class and model, examined here."""
    found, validators, places = Honest(), Validators(), set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases"
        train(numeric, model, first_seed, num_jobs, num_steps, path)
        with path.open("rb") as source:
            for one, case, body in read_cases(source):
                reply = validators.examine(case, body)
                found.audits += 1
                places.add((one.seed, one.step, one.stage))
                found.unequal += bool(reply["deltas"])
                found.drift = max(found.drift, reply["drift"])
                found.accused += reply["finding"] == "fraudulent"
                found.inconclusive += reply["finding"] == "inconclusive"
                if reply["finding"] != "honest":
                    what = f"{model} seed {one.seed} step {one.step} stage {one.stage} on {numeric}: {reply['reason']}"
                    found.reasons = [*found.reasons, what][:20]
    found.independent = len(places)
    return found


def train(numeric: NumericClass, model: str, first_seed: int, num_jobs: int, num_steps: int, path: Path) -> None:
    """Has a process of this class train, and write what it opens to `path`."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(numeric.threads), "MKL_NUM_THREADS": str(numeric.threads),
        "MKL_DYNAMIC": "FALSE", "OMP_WAIT_POLICY": "PASSIVE", **(_AVX2 if numeric.isa == "avx2" else {}),
    }  # fmt: skip
    arguments = [
        numeric.isa,
        model,
        str(first_seed),
        str(num_jobs),
        str(num_steps),
        str(numeric.threads),
        str(int(numeric.onednn)),
    ]
    command = [sys.executable, "-W", "ignore", str(Path(__file__)), *arguments, str(path)]
    subprocess.run(command, env=environment, check=True)


def _main() -> None:
    isa, model, *numbers, path = sys.argv[1:]
    first_seed, num_jobs, num_steps, threads, onednn = map(int, numbers)
    torch.set_num_threads(threads)
    with Path(path).open("wb") as out, torch.backends.mkldnn.flags(enabled=bool(onednn)):
        write_cases(out, model, first_seed, num_jobs, num_steps, Float32Inside if isa == FLOAT32_INSIDE else Stage)


if __name__ == "__main__":
    _main()
