"""The committed corpus is replayed, and mutated a little, on every target; `fuzz.py` is the long mode."""

from __future__ import annotations

import importlib.util
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MUTATIONS = 40
HANG_S = 5.0


def _targets() -> dict[str, Callable[[bytes], None]]:
    spec = importlib.util.spec_from_file_location("fuzz_targets", HERE / "targets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.TARGETS  # type: ignore[no-any-return]


TARGETS = _targets()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def seeds_of(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((HERE / "corpus" / name).glob("*"))]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A change that a decoder notices late: a byte, a cut, a doubled piece, a length."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(4)
        if kind == 0 and at < len(changed):
            changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, changed[at] ^ 1 << chance.randrange(8)))
        elif kind == 1:
            del changed[at : at + chance.randrange(1, 9)]
        elif kind == 2:
            changed[at:at] = changed[at : at + chance.randrange(1, 65)]
        else:
            changed[at : at + 4] = chance.choice((b"\xff" * 4, b"\0" * 4, b"\xdd\xff\xff\xff", b"\x91" * 4))
    return bytes(changed)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_survives_its_corpus_and_mutations_of_it(name: str) -> None:
    seeds = seeds_of(name)
    assert seeds, f"no corpus for {name}: add some files to {HERE / 'corpus' / name}"
    chance = random.Random(name)
    for seed in seeds:
        for data in (seed, *(mutated(seed, chance) for _ in range(MUTATIONS))):
            started_s = time.monotonic()
            TARGETS[name](data)
            assert time.monotonic() - started_s < HANG_S, data[:100]


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_survives_nothing_and_noise(name: str) -> None:
    TARGETS[name](b"")
    chance = random.Random(name)
    for length in (1, 2, 16, 300, 5000):
        TARGETS[name](chance.randbytes(length))
