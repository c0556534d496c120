"""A private network over two machines, with the commands of the README as they stand there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smartnodes_core.errors import ConfigError
from tensorlink.home import decode_code, encode_code

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(desk|shed)\$ (.*?)(?:\s{2,}#.*)?$", README, re.MULTILINE)
TRAIN = """
import torch, tensorlink
module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
x, y = torch.randn(8, 8), torch.randint(0, 4, (8,))
with tensorlink.connect("~/.tensorlink/home/config.toml") as network:
    endpoints = {worker.endpoints[0] for worker in network.find_workers(2, 60)}
    model = tensorlink.DistributedModel(module, network=network, stages=2, micro_batches=2, example_inputs=(x,))
    optimizer = tensorlink.DistributedOptimizer(model, torch.optim.SGD, lr=0.1)
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(losses[1] < losses[0], *sorted(endpoints))
"""


class Machine:
    def __init__(self, namespaces, name, home):
        self.namespaces, self.name, self.home = namespaces, name, home
        home.mkdir()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "HOME": str(home), "PATH": path}

    def start(self, command):
        return self.namespaces.popen(
            self.name,
            command.split(),
            env=self.environment,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=open(self.home / "errors", "a"),
            text=True,
        )

    @property
    def errors(self):
        return (self.home / "errors").read_text()[-3000:]


def until(process, pattern, machine):
    """The first match of `pattern` in what a process says."""
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found
    raise AssertionError(machine.errors)


@pytest.mark.timeout(180)
def test_two_machines_train_after_three_commands(namespaces, tmp_path):
    namespaces.add("desk", "shed")
    namespaces.link("desk", "192.168.1.10/24", "shed", "192.168.1.11/24")
    namespaces.default_route("desk", "192.168.1.11")
    desk, shed = (Machine(namespaces, name, tmp_path / name) for name in ("desk", "shed"))
    (machine, start), (other, join), (again, train) = COMMANDS
    assert (machine, other, again) == ("desk", "shed", "desk")

    first = desk.start(start)
    code = until(first, r"tensorlink home join 192\.168\.1\.10:9001 (\w+)", desk)[1]
    second = shed.start(join.replace("CODE", code))
    until(second, r'"endpoint": "192.168.1.11:9002"', shed)
    (desk.home / "train.py").write_text(TRAIN)
    done = desk.start(train)
    assert done.stdout.read().split() == ["True", "192.168.1.10:9002", "192.168.1.11:9002"], desk.errors
    for process, owner in ((second, shed), (first, desk)):
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, owner.errors
    assert "Traceback" not in desk.errors + shed.errors


def test_a_code_names_the_gate_and_the_secret():
    code = encode_code(bytes(range(32)), b"s" * 16)
    assert decode_code(code) == (bytes(range(32)), b"s" * 16)
    assert code.isalnum()


@pytest.mark.parametrize("code", ["", "abc", "!" * 77, encode_code(bytes(32), b"s" * 16)[:-2]])
def test_a_code_that_is_none_is_named(code):
    with pytest.raises(ConfigError, match="77 letters"):
        decode_code(code)
