"""The filter's decisions, by a small machine that runs its instructions as the kernel does."""

from __future__ import annotations

import errno
import struct

import pytest

from smartnodes_core.confinement import seccomp, syscalls

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
PID = 4242


def decide(code, number, arguments=(), architecture=0xC000003E):
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    at, word = 0, 0
    while True:
        op, if_true, if_false, value = struct.unpack_from("HBBI", code, 8 * at)
        at += 1
        if op == 0x20:
            (word,) = struct.unpack_from("<I", data, value)
        elif op == 0x54:
            word &= value
        elif op == 0x15:
            at += if_true if word == value else if_false
        elif op == 0x35:
            at += if_true if word >= value else if_false
        else:
            assert op == 0x06
            return value


@pytest.fixture(scope="module")
def code():
    return seccomp.assemble("x86_64", syscalls.ALWAYS, seccomp.rules(PID))


NUMBERS = syscalls.X86_64
THREAD = 0x3D0F00


@pytest.mark.parametrize(
    ("name", "arguments", "decision"),
    [
        ("read", (3, 4), ALLOW),
        ("mmap", (0, 4096, 7), ALLOW),
        ("clone", (THREAD,), ALLOW),
        ("clone", (17,), EPERM),  # a process: SIGCHLD
        ("clone", (THREAD | 0x10000000,), EPERM),
        ("clone", (THREAD | 0x40000000,), EPERM),
        ("clone3", (1, 2), ENOSYS),
        ("openat", (0, 0, 0o2000000), ALLOW),
        ("openat", (0, 0, 1), EPERM),
        ("openat", (0, 0, 2), EPERM),
        ("openat", (0, 0, 0o100), EPERM),
        ("open", (0, 0o1000), EPERM),
        ("tgkill", (PID, PID, 6), ALLOW),
        ("tgkill", (PID + 1, PID, 6), EPERM),
        ("sendto", (3, 1, 1, 0, 0, 0), ALLOW),
        ("sendto", (3, 1, 1, 0, 1 << 40, 16), EPERM),  # an address whose low half is zero
        ("prctl", (15,), ALLOW),
        ("prctl", (4,), EPERM),
        ("fcntl", (3, 3), ALLOW),
        ("fcntl", (3, 8), EPERM),  # F_SETOWN: signals to others
        ("ioctl", (3, 0x5401), ALLOW),
        ("ioctl", (3, 0x5412), EPERM),  # TIOCSTI: types into a terminal
        ("prlimit64", (0, 7, 0), ALLOW),
        ("prlimit64", (0, 7, 1 << 33), EPERM),
        ("seccomp", (1,), EPERM),
    ],
)
def test_a_call_is_decided(code, name, arguments, decision):
    assert decide(code, NUMBERS[name], arguments) == decision


def test_calls_that_no_list_names_are_refused(code):
    for number in (41, 42, 57, 59, 62, 101, 165, 310, 321, 425, 500):
        assert decide(code, number) == EPERM


def test_the_second_abi_of_x86_64_is_refused(code):
    assert decide(code, NUMBERS["read"] | 0x40000000) == EPERM


def test_calls_of_another_architecture_end_the_process(code):
    assert decide(code, 3, architecture=0x40000003) == KILL


def test_the_same_rules_hold_on_arm():
    code = seccomp.assemble("aarch64", syscalls.ALWAYS, seccomp.rules(PID))
    arm = 0xC00000B7
    assert decide(code, syscalls.AARCH64["mmap"], architecture=arm) == ALLOW
    assert decide(code, syscalls.AARCH64["clone"], (THREAD,), arm) == ALLOW
    assert decide(code, syscalls.AARCH64["clone"], (17,), arm) == EPERM
    assert decide(code, 198, architecture=arm) == EPERM  # socket
    assert decide(code, 221, architecture=arm) == EPERM  # execve


def test_a_cuda_process_may_control_its_device_and_still_open_no_socket():
    code = seccomp.assemble("x86_64", [*syscalls.ALWAYS, *syscalls.CUDA], seccomp.rules(PID))
    assert decide(code, NUMBERS["ioctl"], (5, 0xC020462A)) == ALLOW
    assert decide(code, NUMBERS["openat"], (0, 0, 2)) == ALLOW
    assert {decide(code, number) for number in (41, 42, 57, 59, 62)} == {EPERM}


def test_a_machine_whose_numbers_are_unknown_is_an_error():
    with pytest.raises(OSError, match="riscv64"):
        seccomp.assemble("riscv64", syscalls.ALWAYS, [])


def test_every_name_has_a_number():
    named = {*syscalls.ALWAYS, *syscalls.CUDA, *(rule.name for rule in seccomp.rules(1))}
    assert named <= syscalls.X86_64.keys()
    assert named - syscalls.AARCH64.keys() <= {
        "access", "alarm", "arch_prctl", "epoll_wait", "lstat", "open", "pause", "poll", "readlink", "select", "stat",
        "time",
    }  # fmt: skip


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_sockets_are_made_while_ranks_connect_and_never_after(machine):
    architecture, numbers = seccomp._MACHINES[machine]
    connecting, sealed = (
        seccomp.assemble(machine, [*syscalls.ALWAYS, *more], seccomp.rules(PID))
        for more in (syscalls.CONNECTING, syscalls.RANKS)
    )
    for name in ("socket", "bind", "listen", "accept4", "connect", "recvmsg", "seccomp", "pipe2"):
        assert decide(connecting, numbers[name], architecture=architecture) == ALLOW, name
        assert decide(sealed, numbers[name], architecture=architecture) == EPERM, name
    for name in ("epoll_ctl", "epoll_pwait", "recvfrom", "writev"):
        assert decide(sealed, numbers[name], architecture=architecture) == ALLOW, name
