"""Every benchmark runs, from its arguments to its table, as small as it can be made. Nothing is measured.

Benchmarks that start a network of processes get one between them, so that what they ask of it is checked and what they
do with it runs; one that names programs of its own for the nodes (such as the paced worker) gets a network of those.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import tensorlink
from tensorlink.demo.run import DemoOptions
from tensorlink.local import LocalSettings

pytestmark = pytest.mark.starts_network

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
trainee = importlib.import_module("yardstick.trainee")
TINY = trainee.Sizes(layers=2, width=16, heads=2, vocabulary=32, context=8, batch=4, micro_batches=2)


def load(name: str) -> ModuleType:
    return importlib.import_module(f"benchmark_{name}")


class Shared:
    """Stands in for `LocalNetwork`: the same two workers for all, unless their programs differ."""

    def __init__(self) -> None:
        self._network: tensorlink.LocalNetwork | None = None
        self._start = tensorlink.LocalNetwork
        self._commands: Any = None

    def __call__(self, **asked: Any) -> tensorlink.LocalNetwork:
        settings = LocalSettings(**asked)  # raises for a setting that there is not
        assert settings.workers <= 2
        if self._network is None or settings.commands not in ({}, self._commands):
            self.close()
            self._commands = settings.commands
            terms = {**asked, "workers": 2, "slots_per_worker": 8, "round_interval_s": 600, "audit_rates": (0.0, 0.0)}
            self._network = self._start(**terms)
            self._end, self._network.close = self._network.close, lambda: None  # type: ignore[method-assign]
        return self._network

    def close(self) -> None:
        if self._network is not None:
            self._end()
            self._network = None


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    made = Shared()
    yield made
    made.close()


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Shared) -> Iterator[Run]:
    """Runs a benchmark as its command line does; returns what it printed. `changes` are constants of its module."""

    def run_(name: str, *arguments: str, **changes: Any) -> str:
        module = load(name)
        for constant, value in changes.items():
            assert hasattr(module, constant)
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [str(module.__file__), *arguments])
        module.main()
        return capsys.readouterr().out

    monkeypatch.setattr(tensorlink, "LocalNetwork", shared)
    threads = torch.get_num_threads()
    yield run_
    torch.set_num_threads(threads)


def test_growth_runs(run: Run) -> None:
    told = run("growth", "--floor-ms=1", "--steps=1", "--stages=2", "--micro-batches=2", "--schedules=zbv")
    assert "zbv             2        2" in told


def test_memory_runs(run: Run) -> None:
    told = run("memory", "--steps=1", "--schedules=1f1b", Sizes=lambda: TINY)
    assert told.count("1f1b") == 2


def test_step_runs(run: Run) -> None:
    small = DemoOptions(layers=2, width=16, heads=2, context=16, batch=4, micro_batches=2)
    assert "two workers, train_step" in run("step", "--rounds=1", WARM_UP_ROUNDS=0, DemoOptions=lambda: small)


def test_small_model_runs(run: Run) -> None:
    assert "whole step" in run("small_model", "--rounds=2", WARM_UP_ROUNDS=0)


def test_pipeline_runs(run: Run) -> None:
    modes = "plain,torch-1f1b,zbv,drop-in"
    told = run("pipeline", "--rounds=1", f"--modes={modes}", WARM_UP_ROUNDS=0, Sizes=lambda: TINY)
    assert all(f"\n{mode} " in told for mode in modes.split(","))


def test_overhead_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trainee trains, here with the protection that all networks have, and its table is drawn from that."""
    out = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [trainee.__file__, "protected", "zbv", json.dumps(vars(TINY))])
        patch.setattr(sys, "stdin", io.StringIO('{"first": 0, "num_steps": 1}\n'))
        patch.setattr(sys, "stdout", out)
        trainee.main()
    found = json.loads(out.getvalue())
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"protected": found, "unprotected": found}]), encoding="utf-8")
    assert "CPU, all processes" in run("overhead", "--of", str(pairs), RESAMPLES=10)


def test_what_overhead_compares_with_neither_signs_nor_encrypts() -> None:
    """In a process of its own: it changes what is loaded for good."""
    script = """if True:
        import sys; sys.path.insert(0, sys.argv[1])
        import tensorlink.steplog.digests
        import benchmark_transport as transport
        from yardstick import unprotected
        unprotected.hash_nothing()
        unprotected.sign_and_encrypt_nothing()
        print(tensorlink.steplog.digests.digest(None).hex(), transport.Identity.create().sign_bytes(b"", b"").hex())
        ours, far = transport.make_node(), transport.make_node()
        transport.Service(far)
        key = ours.connect(far.endpoint).node_key
        print(len(transport.time_calls(ours, key, 3)))
        ours.stop(), far.stop()
    """
    command = [sys.executable, "-c", script, str(BENCHMARKS)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout
    assert told.split() == ["00" * 32, "00" * 64, "3"]


def test_tensor_parallel_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    assert "two halves" in run("tensor_parallel", "--small", "--rounds=1", WARM_UP_ROUNDS=0)
    assert ends == [0]


def test_confinement_runs() -> None:
    command = [
        sys.executable,
        str(BENCHMARKS / "benchmark_confinement.py"),
        "--child=confined",
        "--width=16",
        "--steps=1",
    ]
    done = subprocess.run(command, check=True, capture_output=True, timeout=100)  # it gives up privileges
    assert len(json.loads(done.stdout)) == 1


def test_interpreter_runs(run: Run) -> None:
    module = nn.Linear(4, 4)
    assert "a layer" in run("interpreter", "--rounds=2", models=lambda: {"a layer": (module, torch.randn(2, 4))})


def test_transport_runs(run: Run) -> None:
    assert "of raw TCP" in run("transport", "--rounds=1", "--tensors=1")


def test_relay_runs(run: Run) -> None:
    assert "through the relay" in run("relay", "--megabytes=4", "--calls=5")


def test_devnet_start_runs(run: Run) -> None:
    assert "a transaction takes" in run("devnet_start", "--most-blocks=100")


def test_gas_runs(run: Run) -> None:
    assert "claim, repeated" in run("gas", "--most-workers=1", KEPT_ROOTS=1)


def test_attacks_runs(run: Run) -> None:
    assert "a wash trader that pays itself" in run("attacks", "--rounds=2")


def test_recovery_runs(run: Run) -> None:
    told = run("recovery", "--small", "--kills=1", "--steps=2")
    assert "steps lost: 0, losses that are not the plain run's: 0" in told


def test_every_benchmark_is_run_here() -> None:
    names = {path.stem.removeprefix("benchmark_") for path in BENCHMARKS.glob("benchmark_*.py")}
    here = {test[5:-5] for test in globals() if test.startswith("test_") and test.endswith("_runs")}
    assert names == here | {"audit", "dht"}  # which have files of their own
