"""Landlock: a process forbids itself every file but those it names (Linux 5.13 and later, no privileges needed).

The structures are those of `linux/landlock.h`; what a kernel does not know yet is left out by its ABI's number.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from smartnodes_core.confinement.system import syscall

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_VERSION_FLAG = 1
_PATH_BENEATH = 1

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FILES_SINCE_1 = (1 << 13) - 1
_FILES_LATER = ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV))
_TCP = 0b11  # to bind and to connect
_SCOPES = 0b11  # abstract Unix sockets of others, signals to others


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def restrict(libraries: Iterable[Path], readable: Iterable[Path], devices: Iterable[Path], connects: bool) -> str:
    """From now on only these can be opened: `libraries` and `readable` to be read, `devices` to be used. No TCP, unless
    it `connects` to itself first.

    Raises OSError where the kernel has no Landlock. Needs `no_new_privileges`. What is open already stays open.
    """
    abi = syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    handled = _FILES_SINCE_1
    for since, right in _FILES_LATER:
        handled |= right if abi >= since else 0
    rules = _Ruleset(handled, _TCP if abi >= 4 and not connects else 0, _SCOPES if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for path in (*libraries, *readable):
            _allow(ruleset, path, _READ_FILE | _READ_DIR)
        for path in devices:
            _allow(ruleset, path, (_READ_FILE | _READ_DIR | _WRITE_FILE | _IOCTL_DEV) & handled)
        syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return f"files: its libraries, read-only (Landlock {abi})"


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what cannot be opened needs no permission
    try:
        rule = _Beneath(rights if path.is_dir() else rights & ~_READ_DIR, fd)
        syscall(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(fd)
