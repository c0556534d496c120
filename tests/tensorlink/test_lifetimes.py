"""However a script ends, everything that it started ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.starts_network

WITHIN_S = 5.0
#: Says on standard output which phase it is in; `{end}` is what happens when it is through.
SCRIPT = """
import sys, threading
import torch
import tensorlink
from torch import nn
from torch.nn import functional as F

def tell(phase):
    print(phase, flush=True)

tell("start")
network = tensorlink.LocalNetwork(workers=2, validators=1, round_interval_s=5)
with network:
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    tell("trace")
    x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    with tensorlink.DistributedModel(module, network=network, stages=2, example_inputs=(x,)) as model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)
        for step in range({steps}):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step == 3:
                tell("train")
        {end}
    tell("settle")
    threading.Event().wait()
"""


class Script:
    """A user's script in a session of its own; its processes are known by a variable in their environment."""

    def __init__(self, processes, tmp_path, steps=100_000, end="pass"):
        self._processes = processes
        self.folder = tmp_path
        self._marker = f"LIFETIME_OF={tmp_path}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(steps=steps, end=end)],
            env={**os.environ, "TMPDIR": str(tmp_path), "LIFETIME_OF": str(tmp_path), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def wait_for(self, phase):
        for line in self.process.stdout:
            if line.strip() == phase:
                return
        pytest.fail(f"{phase} was not reached: {self.process.stderr.read()}")

    def started(self):
        return [self.process.pid, *self._processes.descendants(self.process.pid)]

    def assert_ends(self, started):
        took = self._processes.wait_until(lambda: not self._processes.alive(started), WITHIN_S)
        assert took is not None, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self._processes.alive(started)]
        return self.process.communicate(timeout=5)

    def end(self):
        self.process.kill()
        for pid in self._processes.with_marker(self._marker):  # what a failed test has left
            os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=10)


@pytest.fixture
def script(processes, tmp_path):
    made = []

    def make(**options):
        made.append(Script(processes, tmp_path, **options))
        return made[-1]

    yield make
    for each in made:
        each.end()


def leftovers(folder):
    return [path.name for path in folder.glob("tensorlink-*")]


@pytest.mark.parametrize(
    ("phase", "after_s"),
    [("start", 1.5), ("start", 4.0), ("trace", 0.5), ("train", 0.3), ("settle", 0.2)],
)
def test_ctrl_c_in_every_phase_ends_all_processes(script, processes, phase, after_s):
    running = script(steps=10 if phase == "settle" else 100_000)
    running.wait_for(phase)
    processes.wait_until(lambda: False, after_s)
    started = running.started()
    os.kill(running.process.pid, signal.SIGINT)
    _, said = running.assert_ends(started)
    assert leftovers(running.folder) == []
    assert said.count("Traceback") <= 1 + said.count("During handling"), said  # that of KeyboardInterrupt itself
    assert "KeyboardInterrupt" in said
    assert "Exception in thread" not in said


def test_an_exception_inside_ends_all_processes(script):
    running = script(steps=2, end="raise RuntimeError('of the user')")
    _, said = running.process.communicate(timeout=60)
    assert running.process.returncode == 1
    assert said.strip().endswith("RuntimeError: of the user")
    assert said.count("Traceback") == 1
    assert leftovers(running.folder) == []


def test_a_script_that_is_killed_takes_its_processes_along(script):
    running = script()
    running.wait_for("train")
    started = running.started()
    assert len(started) >= 7
    os.kill(running.process.pid, signal.SIGKILL)
    running.assert_ends(started)


def test_a_network_that_is_never_closed_ends_with_its_script(processes, tmp_path):
    code = "import tensorlink, os; n = tensorlink.LocalNetwork(workers=1); print(n.log_dir.exists())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path), "UNCLOSED": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "True", "")
    assert leftovers(tmp_path) == []
    assert processes.wait_until(lambda: not processes.with_marker(f"UNCLOSED={tmp_path}"), WITHIN_S) is not None
    assert tempfile.gettempdir() != str(tmp_path)
