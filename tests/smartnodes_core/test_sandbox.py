"""The node outlives its computing process, whatever that does."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from smartnodes_core.errors import AuditError, LocalError, ProtocolError, SandboxError
from smartnodes_core.pipe import MAX_MESSAGE_BYTES
from smartnodes_core.sandbox import Limits, Sandbox
from smartnodes_core.sandbox_child import ChildChannel

CHILD = [sys.executable, str(Path(__file__).with_name("echo_child.py"))]


class Rig:
    def __init__(self, limits=None, scratch=None):
        self.events, self.exits = queue.Queue(), queue.Queue()
        self.sandbox = Sandbox(
            CHILD,
            limits=limits or Limits(),
            inbound_bytes=1 << 20,
            outbound_bytes=1 << 20,
            on_event=lambda name, params: self.events.put((name, params)),
            on_exit=self.exits.put,
            scratch=scratch,
        )
        self.sandbox.start()


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    made = []

    def start(limits=None, scratch=None):
        made.append(Rig(limits, scratch))
        return made[-1]

    yield start
    for rig in made:
        rig.sandbox.stop()


def in_thread(function, *args):
    results = queue.Queue()

    def run():
        try:
            results.put(function(*args))
        except Exception as error:
            results.put(error)

    threading.Thread(target=run, daemon=True).start()
    return results


def test_calls_posts_and_events_go_both_ways(make):
    rig = make()
    assert rig.sandbox.call("echo", {"a": b"1", "n": [1, "x"]}, 10.0) == {"a": b"1", "n": [1, "x"]}
    rig.sandbox.post("tell", {"n": 5})
    assert rig.events.get(timeout=10) == ("told", {"n": 5})


def test_data_crosses_in_shared_memory(make):
    rig = make()
    piece = rig.sandbox.inbound.allocate(1000, 1.0)
    piece.view[:] = b"\x02" * 1000
    assert rig.sandbox.call("sum", {"offset": piece.offset, "num_bytes": 1000}, 10.0) == {"sum": 2000}
    assert rig.events.get(timeout=10) == ("released", {"offset": piece.offset})
    offset = rig.sandbox.call("fill", {"num_bytes": 700_000}, 10.0)["offset"]
    assert bytes(rig.sandbox.outbound.view(offset, 3)) == b"xxx"
    waiting = in_thread(rig.sandbox.call, "fill", {"num_bytes": 700_000}, 10.0)
    rig.sandbox.post("sent", {"offset": offset})  # the child waits for exactly this space
    assert waiting.get(timeout=10) == {"offset": offset}


def test_an_error_arrives_as_its_class(make):
    with pytest.raises(AuditError, match="not that one"):
        make().sandbox.call("fail", {}, 10.0)


def test_no_answer_in_time_is_an_error_and_the_child_lives_on(make):
    rig = make()
    with pytest.raises(SandboxError, match=r"did not answer hang within 0\.05 s"):
        rig.sandbox.call("hang", {}, 0.05)
    assert rig.sandbox.call("echo", {}, 10.0) == {}


def test_a_killed_child_fails_all_pending_calls_at_once(make):
    rig = make()
    waiting = [in_thread(rig.sandbox.call, "hang", {}, 60.0) for _ in range(3)]
    rig.sandbox.call("echo", {}, 10.0)
    began = time.monotonic()
    os.kill(rig.sandbox.pid, signal.SIGKILL)
    for results in waiting:
        error = results.get(timeout=10)
        assert isinstance(error, SandboxError)
        assert "SIGKILL" in str(error)
    assert time.monotonic() - began < 2
    assert "SIGKILL" in rig.exits.get(timeout=10)
    with pytest.raises(SandboxError, match="SIGKILL"):
        rig.sandbox.call("echo", {}, 10.0)
    rig.sandbox.restart()
    assert rig.sandbox.call("echo", {}, 10.0) == {}


def test_the_last_words_of_a_child_are_in_the_error(make):
    rig = make()
    with pytest.raises(SandboxError, match=r"exit code 3\n  the last words"):
        rig.sandbox.call("exit", {}, 10.0)


def test_a_child_that_breaks_the_protocol_is_ended(make):
    rig = make()
    with pytest.raises(SandboxError, match="broke the protocol: a message of 4294967295 bytes"):
        rig.sandbox.call("torn", {}, 10.0)


def test_an_oversize_message_is_refused_before_it_is_sent(make):
    rig = make()
    with pytest.raises(ProtocolError, match="shared memory"):
        rig.sandbox.call("echo", {"data": bytes(MAX_MESSAGE_BYTES)}, 10.0)
    assert rig.sandbox.call("echo", {}, 10.0) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds mapped memory on Linux only")
def test_memory_beyond_the_limit_is_not_given(make):
    rig = make(Limits(memory_bytes=200 << 20))
    assert rig.sandbox.call("grow", {"num_bytes": 50 << 20}, 10.0) == {}
    with pytest.raises(SandboxError, match="MemoryError"):
        rig.sandbox.call("grow", {"num_bytes": 400 << 20}, 10.0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_has_no_secrets_no_descriptors_and_no_way_to_privileges(make):
    found = make(Limits(nice=3, num_threads=2)).sandbox.call("inspect", {}, 10.0)
    assert "A_SECRET" not in found["environment"]
    assert "SMARTNODES_SANDBOX" not in found["environment"]
    assert found["environment"]["OMP_NUM_THREADS"] == "2"
    assert found["environment"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert found["num_fds"] <= 9  # 0 to 2, pipe, two arenas, a copy of each by its mapping, the listing itself
    assert found["no_new_privs"]
    assert (found["core"], found["nice"]) == (0, 3 + os.nice(0))


def test_a_call_from_the_reading_thread_is_refused(make):
    rig = make()
    answers = queue.Queue()

    def on_event(name, params):
        try:
            rig.sandbox.call("echo", {}, 1.0)
        except SandboxError as error:
            answers.put(str(error))

    rig.sandbox._child._on_event = on_event
    rig.sandbox.post("tell", {})
    assert "use post" in answers.get(timeout=10)


def test_stop_is_idempotent_and_silent(make):
    rig = make()
    pid = rig.sandbox.pid
    rig.sandbox.stop()
    rig.sandbox.stop()
    assert rig.exits.empty()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_child_ends_with_its_node(tmp_path):
    script = (
        "import sys, threading\n"
        "from smartnodes_core.sandbox import Limits, Sandbox\n"
        f"s = Sandbox({CHILD!r}, limits=Limits(), inbound_bytes=4096, outbound_bytes=4096,\n"
        "            on_event=lambda n, p: None, on_exit=lambda r: None)\n"
        "s.start(); s.call('echo', {}, 30.0); print(s.pid, flush=True); threading.Event().wait()\n"
    )
    node = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(node.stdout.readline())
    node.kill()
    node.wait()
    node.stdout.close()
    deadline = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline:
        os.sched_yield()
    assert not _alive(pid)


def _alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except OSError:
        return False


def test_what_cannot_be_started_is_an_error():
    sandbox = Sandbox(
        ["/nonexistent"],
        limits=Limits(),
        inbound_bytes=1,
        outbound_bytes=1,
        on_event=lambda name, params: None,
        on_exit=lambda reason: None,
    )
    with pytest.raises(SandboxError, match="could not be started"):
        sandbox.start()


def test_a_child_started_by_hand_says_so():
    with pytest.raises(LocalError, match="not by hand"):
        ChildChannel.open()


def test_a_child_writes_to_its_scratch_file_as_far_as_it_may_and_the_folder_stays_empty(make, tmp_path):
    rig = make(Limits(file_bytes=1 << 16), tmp_path)
    assert rig.sandbox.call("scratch", {"data": b"kept", "offset": 1000}, timeout_s=10) == {"data": b"kept"}
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SandboxError):
        rig.sandbox.call("scratch", {"data": b"kept", "offset": 1 << 16}, timeout_s=10)
