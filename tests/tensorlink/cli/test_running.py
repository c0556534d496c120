"""A node's process ends when it is told to, in order, at any time."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import sys, threading, types
from tensorlink.cli.running import EndedEarly, Life
life = Life(exit_with_parent={exit_with_parent})
try:
    print("starting", flush=True)
    if {ready}:
        life.say_ready(types.SimpleNamespace(endpoint="127.0.0.1:1", node_key=b"k"))
        life.wait()
    else:
        threading.Event().wait()
except EndedEarly:
    print("ended early", flush=True)
finally:
    print("closed", flush=True)
"""


def run(ready, exit_with_parent=False):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(ready=ready, exit_with_parent=exit_with_parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "starting\n"
    if ready:
        assert process.stdout.readline() == '{"endpoint": "127.0.0.1:1", "node_key": "6b"}\n'
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("ready", "says"), [(True, "closed\n"), (False, "ended early\nclosed\n")])
def test_a_signal_ends_it_in_order(number, ready, says):
    process = run(ready)
    process.send_signal(number)
    assert process.communicate(timeout=10) == (says, "")
    assert process.returncode == 0


@pytest.mark.parametrize(("ready", "says"), [(True, "closed\n"), (False, "ended early\nclosed\n")])
def test_the_end_of_its_starter_ends_it(ready, says):
    process = run(ready, exit_with_parent=True)
    assert process.communicate(timeout=10) == (says, "")
    assert process.returncode == 0
