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

SNIFF = """
import socket, sys
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
with open(sys.argv[1], "wb", buffering=0) as file:
    print("ready", flush=True)
    while True:
        file.write(tap.recv(65536))
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

    def start_python(self, program, *arguments):
        command = [sys.executable, "-c", program, *arguments]
        return self.namespaces.popen(self.name, command, stdout=subprocess.PIPE, text=True)

    @property
    def errors(self):
        return (self.home / "errors").read_text()[-20_000:]


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


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("symmetric", "route"), [(False, "punched"), (True, "relayed")])
def test_rigs_at_two_homes_train_one_model(homes, tmp_path, pytestconfig, symmetric, route):
    if not pytestconfig.getoption("--across-routers"):
        pytest.skip("half a minute each: --across-routers runs them")
    net = homes(symmetric=symmetric)
    public, one, other = (Machine(net, name, tmp_path / name) for name in ("public0", "homeA", "homeB"))
    capture = tmp_path / "capture"
    sniffer = public.start_python(SNIFF, str(capture))
    assert sniffer.stdout.readline() == "ready\n"
    first = public.start("tensorlink home start --address 203.0.113.50 --no-worker")
    join = until(first, r"(tensorlink home join 203\.0\.113\.50:9001 \w+)", public)[1]
    rigs = [rig.start(join) for rig in (one, other)]
    until(rigs[0], r'"endpoint": "192.168.1.2:9002"', one)
    until(rigs[1], r'"endpoint": "192.168.2.2:9002"', other)
    (public.home / "train.py").write_text(TRAIN)
    done = public.start("python train.py")
    assert done.stdout.read().split() == ["True", "192.168.1.2:9002", "192.168.2.2:9002"], public.errors
    ways = re.findall(r"is reached (\w+): through", one.errors + other.errors)
    assert set(ways) == {route}
    assert len(ways) >= 3  # each other, told by both, and the user
    seen = capture.read_bytes()
    assert len(seen) > 100_000
    for name in (b"activation", b"micro_batch", b"aten."):
        assert name not in seen
    assert (b"SNR1" in seen) == symmetric


def test_a_code_names_the_gate_and_the_secret():
    code = encode_code(bytes(range(32)), b"s" * 16)
    assert decode_code(code) == (bytes(range(32)), b"s" * 16)
    assert code.isalnum()


@pytest.mark.parametrize("code", ["", "abc", "!" * 77, encode_code(bytes(32), b"s" * 16)[:-2]])
def test_a_code_that_is_none_is_named(code):
    with pytest.raises(ConfigError, match="77 letters"):
        decode_code(code)
