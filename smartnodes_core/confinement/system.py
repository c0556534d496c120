"""The system's own calls, through ctypes: namespaces, user, capabilities. Each raises OSError where it is refused."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1

_CAPABILITY_VERSION = 0x20080522
_MAX_CAPABILITIES = 64
#: Each process that leaves root gets a user of its own from here on, which owns no file and no other process.
FIRST_USER = 1_879_048_192


def prctl(option: int, argument: int, third: int = 0) -> None:
    _check(_libc().prctl(option, argument, third, 0, 0), f"prctl({option})")


def syscall(number: int, *arguments: object) -> int:
    """A system call by its number; its result."""
    return _check(_libc().syscall(number, *arguments), f"system call {number}")


def die_first() -> str:
    """Where memory runs out, the system ends this process before any other."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    return "first to end where the machine runs out of memory"


def leave_namespaces(loopback: bool) -> str:
    """A network of its own, in which nothing is up but `loopback` if that is wanted, and its own System V objects.
    Without privileges, inside a user namespace.
    """
    kinds = _leave_namespaces()
    if loopback:
        _raise_loopback()
    return f"own {kinds} namespaces" + (", with a loopback of its own" if loopback else "")


def _leave_namespaces() -> str:
    wanted = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    try:
        _unshare(wanted)
    except PermissionError:
        _unshare(wanted | CLONE_NEWUSER)
        return "user, network, ipc and uts"
    return "network, ipc and uts"


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        fcntl.ioctl(end, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def become_nobody(libraries: Iterable[Path]) -> str:
    """Leaves root for a user that nothing belongs to, provided that user can read what is still to be imported."""
    if os.geteuid() != 0:
        return "an unprivileged user"
    closed = [path for path in libraries if not _open_to_all(path)]
    if closed:
        raise PermissionError(f"it stays root (without capabilities), for only root can read {closed[0]}")
    user = FIRST_USER + os.getpid()
    for number in range(_MAX_CAPABILITIES):
        _libc().prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    return f"user {user}, which owns nothing"


def drop_capabilities() -> str:
    """None now, none to be had by running a program."""
    libc = _libc()
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for number in range(_MAX_CAPABILITIES):
        libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)  # refused to who has none to drop
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    return "no capabilities"


def no_new_privileges() -> str:
    """No program that it might run has more rights than it has."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    return "no new privileges"


def die_with_parent(parent_pid: int) -> None:
    """The kernel ends this process when the thread that started it ends. A change of user would undo it."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)  # it ended before we asked to be told


def _unshare(flags: int) -> None:
    _check(_libc().unshare(flags), "unshare")


def _open_to_all(path: Path) -> bool:
    """Whether every user may list `path`, an existing folder."""
    return all(part.stat().st_mode & stat.S_IXOTH for part in [path, *path.resolve().parents])


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
