"""Hostile code inside the computing process is refused everything but computing."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from smartnodes_core.errors import SandboxError
from smartnodes_core.sandbox import Limits, Sandbox

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="namespaces, Landlock and seccomp are Linux's, and known here for x86-64 and ARM64",
)
CHILD = [sys.executable, str(Path(__file__).with_name("hostile_child.py"))]
#: Names alone; what they do is done in the child.
_spec = importlib.util.spec_from_file_location("attacks", Path(__file__).parent / "attacks.py")
_attacks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_attacks)
ATTACKS = list(_attacks.attacks("", 0))


def started(limits=None, command=CHILD):
    sandbox = Sandbox(
        command,
        limits=limits or Limits(),
        inbound_bytes=1 << 20,
        outbound_bytes=1 << 20,
        on_event=lambda name, params: None,
        on_exit=lambda reason: None,
    )
    sandbox.start()
    return sandbox


@pytest.fixture(scope="module", params=[1, 2], ids=["one device", "two devices"])
def found(tmp_path_factory, request):
    """What came of each attack, the child's status, and the folder with the key, as they are afterwards; of a process
    that has never had a socket, and of one whose ranks have connected."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "key").write_text("secret")
    sandbox = started(Limits(num_devices=request.param))
    try:
        status = sandbox.call("status", {}, 30.0)
        if any(what.startswith(("files", "system calls")) for what in status["missing"]):
            pytest.skip(f"this system lacks what is tested: {status['missing']}")
        yield sandbox.call("attack", {"folder": str(folder)}, 30.0), status, folder, sandbox
    finally:
        sandbox.stop()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(found, name):
    assert found[0][name].startswith("refused: "), found[0][name]


def test_the_attacks_succeed_outside(tmp_path):
    """Otherwise their refusal would prove nothing; those that need root, or harm, are left out."""
    (tmp_path / "key").write_text("secret")
    wanted = [
        "open a socket", "make a pair of sockets", "read the key", "list the key's folder", "read the password file",
        "list the home folder", "list processes", "write a file", "write over a file", "make a folder", "run a program",
        "fork", "kill the node", "a handle of the node", "an anonymous file", "raise its limits", "watch files",
    ]  # fmt: skip
    every = _attacks.attacks(str(tmp_path), os.getppid())
    code = (
        f"import sys, os; sys.path.insert(0, {str(Path(__file__).parent)!r}); import attacks\n"
        f"every = attacks.attacks({str(tmp_path)!r}, os.getppid())\n"
        f"[every[name]() for name in {wanted!r}]"
    )
    assert set(wanted) <= set(every)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_nothing_was_changed_by_the_attacks(found):
    _, _, folder, _ = found
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("key", "secret")]


def test_what_computing_needs_still_works(found):
    assert found[3].call("work", {}, 30.0) == {"works": True}


def test_ranks_that_have_connected_talk_and_nothing_connects_any_more():
    sandbox = started(Limits(num_devices=2))
    try:
        missing = sandbox.call("status", {}, 30.0)["missing"]
        if any(what.startswith("system calls") for what in missing):
            pytest.skip(f"this system lacks what is tested: {missing}")
        assert sandbox.call("talk", {}, 30.0) == {"came": "x"}
        assert set(sandbox.call("use", {}, 30.0).values()) == {f"[Errno {errno.EPERM}] Operation not permitted"}
    finally:
        sandbox.stop()


def test_the_kernel_confirms_what_is_in_force(found):
    status = found[1]["status"]
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert {status[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {""}


def test_the_network_is_its_own_and_empty(found):
    if any(what.startswith("namespaces") for what in found[1]["missing"]):
        pytest.skip(f"no namespaces here: {found[1]['missing']}")
    pid = found[3].pid
    assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    interfaces = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] in (["lo"], [])


def test_an_action_over_its_deadline_ends_the_process_and_says_why():
    sandbox = started(Limits(action_s=0.2))
    with pytest.raises(SandboxError, match=r"took longer than 0\.2 s for one action and was ended"):
        sandbox.call("spin", {}, 30.0)
    sandbox.restart()
    assert sandbox.call("status", {}, 30.0)["status"]
    sandbox.stop()


def _for_everybody(path):
    return path and all(
        part.stat().st_mode & stat.S_IXOTH for part in (Path(path).resolve(), *Path(path).resolve().parents)
    )


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="starts as another user, which root can"
)
@pytest.mark.parametrize(
    ("start", "says"),
    [
        ([], "which owns nothing"),
        (["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"], "own user, network"),
    ],
    ids=["by root", "by an unprivileged user"],
)
def test_whoever_starts_it_every_attack_is_refused(tmp_path_factory, start, says):
    """Root becomes a user that owns nothing; an unprivileged user gets its namespaces inside one for users."""
    python = next(
        (path for path in (sys.executable, shutil.which("python3", path="/usr/bin")) if _for_everybody(path)), None
    )
    if python is None:
        pytest.skip("no interpreter here that every user may run")
    root = Path(__file__).parents[3]
    code = (
        f"import sys, os, json; sys.path[:0] = [{str(root)!r}, {str(Path(__file__).parent)!r}]\n"
        "from types import SimpleNamespace; from smartnodes_core.confinement import confine; import attacks\n"
        "parent = os.getppid(); wanted = SimpleNamespace(memory_bytes=0, num_files=256, file_bytes=0, device='cpu',"
        " num_devices=1)\n"
        "done = confine(wanted, 0, parent)\n"
        "print(json.dumps([done.applied, done.missing, attacks.outcomes('/usr/share', parent), attacks.works()]))"
    )
    done = subprocess.run([*start, python, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    applied, missing, outcomes, works = json.loads(done.stdout)
    if missing:
        pytest.skip(f"this system lacks what is tested: {missing}")
    assert any(says in what for what in applied), applied
    assert [name for name, outcome in outcomes.items() if outcome == "done"] == []
    assert works


@pytest.mark.parametrize("file_bytes", [0, 8192])
def test_a_file_that_it_was_given_is_written_as_far_as_its_limit(file_bytes):
    with tempfile.TemporaryFile() as file:
        code = (
            "import os\n"
            "from smartnodes_core.confinement import confine; from smartnodes_core.sandbox import Limits\n"
            f"confine(Limits(file_bytes={file_bytes}), 0, os.getppid())\n"
            f"file, found, read = {file.fileno()}, [], bytearray(4096)\n"
            "for at in (0, 4096, 8192):\n"
            "    try:\n"
            "        assert os.pwrite(file, b'x' * 4096, at) == 4096 == os.preadv(file, [read], at) and any(read)\n"
            "        found.append(at)\n"
            "    except OSError as error:\n"
            "        found.append(os.strerror(error.errno))\n"
            "os.write(1, repr(found).encode())"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, pass_fds=[file.fileno()])
    too_large = os.strerror(errno.EFBIG)
    assert done.stdout == repr([at if at < file_bytes else too_large for at in (0, 4096, 8192)]), done.stderr


def test_elsewhere_it_says_what_it_cannot_do():
    code = (
        "import sys; sys.platform = 'darwin'\n"
        "from smartnodes_core.confinement import confine; from smartnodes_core.sandbox import Limits\n"
        "import os; done = confine(Limits(), 0, os.getppid()); os.write(1, repr((done.applied, done.missing)).encode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "darwin has no namespaces" in done.stdout
    assert "limits: no core dumps" in done.stdout, done.stderr


def test_nothing_fails_to_import_where_there_are_no_resource_limits():
    code = "import sys; sys.modules['resource'] = None; import smartnodes_core.sandbox_child, smartnodes_core.sandbox"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
