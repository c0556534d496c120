"""Whatever a peer writes is refused with an error of ours, or runs within its bounds: never a crash, a hang, or memory
beyond the estimate.

Programs are decoded and checked here, in this process; they are run in a child, which may die of them. For a longer
search than the suite has time for, `python tests/tensorlink/program/fuzz_child.py CORPUS FIRST COUNT` with other seeds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smartnodes_core.errors import ProtocolError, SmartnodesError
from smartnodes_core.wire import FrameReader, encode_prefix_and_header
from tensorlink.errors import TensorError
from tensorlink.program.graph import LossProgram, StageProgram
from tensorlink.program.limits import check, check_loss
from tensorlink.program.trace import trace, trace_loss
from tensorlink.program.weights import dump, load

_spec = importlib.util.spec_from_file_location("hostile_programs", Path(__file__).with_name("hostile_programs.py"))
assert _spec is not None
assert _spec.loader is not None
hostile = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hostile)

CHILD = str(Path(__file__).with_name("fuzz_child.py"))
NUM_SEEDS, SECONDS = 3000, 6


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru, self.head = nn.Embedding(7, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.embedding(tokens))[0])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, self.left, self.right, (x,))


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, Any]]:
    """Valid programs, as JSON, to be mutated."""
    convolutions = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    )
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    programs = [
        trace(convolutions, (torch.randn(3, 2, 4, 4),)).whole().to_json(),
        trace(attention, (torch.randn(3, 5, 8),)).whole().to_json(),
        trace(Recurrent(), (torch.randint(0, 7, (3, 5)),)).whole().to_json(),
        trace(Branching(), (torch.randn(3, 5),), autocast=torch.bfloat16).whole().to_json(),
        trace_loss(nn.CrossEntropyLoss(weight=torch.ones(5)), torch.randn(3, 5), torch.randint(0, 5, (3,))).to_json(),
    ]
    return [json.loads(program) for program in programs]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(random=st.randoms(use_true_random=False))
def test_a_mutated_program_is_refused_with_our_errors_or_has_a_cost(corpus: list[Any], random: Any) -> None:
    document = hostile.mutated(random, random.choice(corpus))
    data = hostile.encoded(document)
    try:
        if document.get("kind") == "loss":
            found = check_loss(LossProgram.from_json(data), batch=3, max_bytes=1 << 26, max_flops=10**9)
        else:
            found = check(StageProgram.from_json(data), batch=3, max_bytes=1 << 26, max_flops=10**9)
    except SmartnodesError:
        return
    assert 0 <= found.work_units <= 10**9
    assert found.parameter_bytes + found.peak_activation_bytes <= 1 << 26


def test_hostile_programs_run_in_a_child_that_survives_them(corpus: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "corpus.json"
    file.write_text(json.dumps(corpus))
    command = [sys.executable, CHILD, str(file), "0", str(NUM_SEEDS), str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    lines = done.stdout.splitlines()
    tried = [line for line in lines if line.isdigit()]
    assert done.returncode == 0, f"seed {tried[-1]} ended the process with {done.returncode}: {done.stderr[-500:]}"
    assert [line for line in lines if line.startswith("!")] == []
    tally = json.loads(lines[-1][2:])
    assert tally["ran"] > len(tried) / 20  # or it would have shown nothing
    assert tally["refused"] > len(tried) / 20


VALID_WEIGHTS = dump({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int64), "c": torch.ones(())})


def _weights(**changes: Any) -> bytes:
    length = int.from_bytes(VALID_WEIGHTS[:8], "little")
    header = json.loads(VALID_WEIGHTS[8 : 8 + length])
    header["a"].update(changes)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + VALID_WEIGHTS[8 + length :]


HUGE = 1 << 47


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_weights(data_offsets=[32, 56]), "overlap"),
        (_weights(data_offsets=[0, 1 << 40]), "takes 24 bytes"),
        (_weights(data_offsets=[-8, 16]), "malformed"),
        (_weights(shape=[HUGE]), "its offsets span"),
        (_weights(shape=[HUGE, HUGE]), "no tensor can have"),
        (_weights(shape=[HUGE, HUGE, 0], data_offsets=[0, 0]), "no tensor can have"),
        (_weights(shape=[float("nan"), 3]), "malformed"),
        (_weights(shape=[True, 6]), "malformed"),
        (_weights(shape=[-2, -3]), "malformed"),
        (_weights(dtype="F99"), "unknown dtype"),
        (_weights(dtype=["F32"]), "unknown dtype"),
        (_weights(dtype="F64"), "takes 48 bytes"),
        (_weights(more=1), "are needed"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "header of 1099511627776 bytes"),
        ((17 << 20).to_bytes(8, "little") + bytes(18 << 20), "header of 17825792 bytes"),
        (b'\x1d\x00\x00\x00\x00\x00\x00\x00{"a":{},"a":{"dtype":"F32"}}  ', "occurs twice"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}abc", "belong to no tensor"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "JSON object"),
        (b"\x00", "at least 8 bytes"),
    ],
)
def test_a_hostile_weights_file_is_refused_before_anything_is_allocated(data: bytes, message: str) -> None:
    with pytest.raises(TensorError, match=message):
        load(data)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_mutated_weights_are_loaded_or_refused_with_a_tensor_error(data: st.DataObject) -> None:
    mutated = bytearray(VALID_WEIGHTS)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        if data.draw(st.booleans()):
            mutated[at] = data.draw(st.integers(0, 255))
        else:
            mutated[at : at + data.draw(st.integers(0, 8))] = data.draw(
                st.sampled_from([b"", b"9" * 20, b"[", b"}", b'"a"', b"null", b"-1", b"1e9", b"NaN"])
            )
    with contextlib.suppress(TensorError):
        load(bytes(mutated))


VALID_FRAME = encode_prefix_and_header({"type": "call", "id": 7, "nested": [{"a": b"x"}, 1.5, None]}, 8) + bytes(8)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.data())
def test_mutated_frames_are_read_or_refused_with_a_protocol_error(data: st.DataObject) -> None:
    mutated = bytearray(VALID_FRAME)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        if data.draw(st.booleans()):
            mutated[at] = data.draw(st.integers(0, 255))
        else:
            mutated[at:at] = data.draw(st.binary(max_size=6))
    asked: list[int] = []

    def allocate(header: dict[str, Any], num_bytes: int) -> memoryview | None:
        asked.append(num_bytes)
        return memoryview(bytearray(num_bytes)) if num_bytes <= 64 else None

    reader = FrameReader(allocate)
    left = memoryview(bytes(mutated))
    try:
        while left:
            target = reader.target()
            assert 0 < len(target) <= 64 << 10
            count = min(len(target), len(left))
            target[:count] = left[:count]
            left = left[count:]
            reader.advance(count)
    except ProtocolError:
        pass


@pytest.mark.parametrize("prefix", [(0, 0), (1 << 31, 0), ((64 << 10) + 1, 0)])
def test_a_frame_that_announces_too_much_is_refused_by_its_first_bytes(prefix: tuple[int, int]) -> None:
    reader = FrameReader(lambda header, num_bytes: None)
    data = struct.pack(">IQ", *prefix)
    reader.target()[:] = data
    with pytest.raises(ProtocolError, match="announces a header"):
        reader.advance(len(data))
