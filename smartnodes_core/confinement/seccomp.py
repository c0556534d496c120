"""seccomp: a small program of the kernel's packet filter that decides about every system call of this process.

An allow-list. Most calls are decided by their number, which the kernel remembers in a bitmap, so that they cost
nothing; a few by their arguments too. The filter cannot be taken off, and every thread inherits it.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from smartnodes_core.confinement import syscalls
from smartnodes_core.confinement.system import syscall

# classic BPF: load a 32-bit word, compare, and, return
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_X32 = 0x40000000  # the second ABI of x86-64 has numbers of its own from here on

_SET_MODE_FILTER = 1
#: All threads; and no slower kernels for fear of Spectre, which older systems would otherwise switch on with a filter.
_FLAGS = 1 | 4

_MACHINES = {"x86_64": (0xC000003E, syscalls.X86_64), "aarch64": (0xC00000B7, syscalls.AARCH64)}

_CLONE_THREAD, _CLONE_NEW = 0x00010000, 0x7E020080
_WRITING = 0o3 | 0o100 | 0o1000 | 0o20000000  # O_ACCMODE, O_CREAT, O_TRUNC, O_TMPFILE
_FCNTLS = (0, 1, 2, 3, 4, 1030, 1034)  # duplicate, flags, seals: none that asks for signals
_IOCTLS = (0x5401, 0x5421, 0x5450, 0x5451)  # is it a terminal, (non-)blocking, close on exec
_PRCTLS = (3, 15, 16, 0x53564D41)  # dumpable?, the thread's name, names of memory


@dataclass(frozen=True)
class Rule:
    """Allows `name` where every (argument, mask, value) holds: `argument & mask == value`."""

    name: str
    conditions: tuple[tuple[int, int, int], ...]


def rules(pid: int) -> list[Rule]:
    """The calls that depend on their arguments, for the process `pid`."""
    whole, low = (1 << 64) - 1, (1 << 32) - 1
    return [
        Rule("clone", ((0, _CLONE_THREAD | _CLONE_NEW, _CLONE_THREAD),)),
        Rule("openat", ((2, _WRITING, 0),)),
        Rule("open", ((1, _WRITING, 0),)),
        Rule("tgkill", ((0, low, pid),)),
        Rule("sendto", ((4, whole, 0),)),
        Rule("prlimit64", ((2, whole, 0),)),
        Rule("sched_setaffinity", ((0, low, 0),)),
        Rule("setpriority", ((0, low, 0), (1, low, 0))),  # the calling thread's own, and without privileges only down
        *(Rule("prctl", ((0, low, option),)) for option in _PRCTLS),
        *(Rule("fcntl", ((1, low, command),)) for command in _FCNTLS),
        *(Rule("ioctl", ((1, low, command),)) for command in _IOCTLS),
    ]


def assemble(machine: str, always: Iterable[str], conditional: Sequence[Rule]) -> bytes:
    """The filter's instructions. Raises OSError for a machine whose numbers are not known here."""
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"the numbers of system calls on {machine} are not known here")
    architecture, numbers = _MACHINES[machine]
    refused = _ERRNO | errno.EPERM
    code = [
        *_unless_equal(_ARCHITECTURE, architecture, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, _X32, 0, 1),
        _instruction(_RETURN, refused),
    ]
    # their flags lie in memory, where a filter cannot look: the C library falls back on the older calls
    for name in ("clone3", "openat2"):
        code += _if_number(numbers[name], [_instruction(_RETURN, _ERRNO | errno.ENOSYS)])
    for name in always:
        if name in numbers:
            code += _if_number(numbers[name], [_instruction(_RETURN, _ALLOW)])
    for rule in conditional:
        if rule.name in numbers:
            code += _if_number(numbers[rule.name], _allow_where(rule.conditions))
    return b"".join([*code, _instruction(_RETURN, refused)])


def install(device: str, pid: int, more: Iterable[str] = ()) -> str:
    """Filters the system calls of this process from now on; `more` are allowed besides what computing needs.

    A second filter, where the first lets it be installed, can only take away. Needs `no_new_privileges`. Raises OSError
    where the system has no seccomp, or its numbers are not known here.
    """
    machine = platform.machine()
    always = [*syscalls.ALWAYS, *(syscalls.CUDA if device == "cuda" else ()), *more]
    code = assemble(machine, always, rules(pid))
    instructions = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions))
    number = _MACHINES[machine][1]["seccomp"]
    syscall(number, ctypes.c_uint(_SET_MODE_FILTER), ctypes.c_uint(_FLAGS), ctypes.c_char_p(program))
    return (
        f"system calls: {len(set(always) & _MACHINES[machine][1].keys())} and {len(rules(pid))} by argument (seccomp)"
    )


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _unless_equal(offset: int, value: int, result: int) -> list[bytes]:
    return [_instruction(_LOAD, offset), _instruction(_EQUAL, value, 1, 0), _instruction(_RETURN, result)]


def _if_number(number: int, block: list[bytes]) -> list[bytes]:
    """`block` where the call has this number, which is in the accumulator before and after."""
    return [_instruction(_EQUAL, number, 0, len(block)), *block]


def _allow_where(conditions: Sequence[tuple[int, int, int]]) -> list[bytes]:
    """Returns from the filter where all hold, otherwise loads the number again and falls through."""
    tests: list[tuple[list[bytes], int]] = []
    for argument, mask, value in conditions:
        for shift, half in ((0, 0), (32, 4)):  # little-endian halves
            if (mask >> shift) & 0xFFFFFFFF:
                offset = _ARGUMENTS + 8 * argument + half
                load = [_instruction(_LOAD, offset), _instruction(_AND, (mask >> shift) & 0xFFFFFFFF)]
                tests.append((load, (value >> shift) & 0xFFFFFFFF))
    block = [_instruction(_RETURN, _ALLOW), _instruction(_LOAD, _NUMBER)]
    for load, value in reversed(tests):
        # a test that fails jumps to the last instruction, which loads the number again
        block = [*load, _instruction(_EQUAL, value, 0, len(block) - 1), *block]
    return block
