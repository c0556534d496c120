"""Gives up, for good, what a process that computes for strangers does not need.

In this order, each step on its own and none fatal: first in line for the out-of-memory killer, namespaces of its own
(an empty network), another user where it was started as root, no capabilities, resource limits, files (Landlock),
system calls (seccomp). Afterwards even foreign machine code inside the process can compute, read the libraries it
was started with, and answer over the descriptors it holds; that is all. `docs/security.md` says how far each system
goes. Called while the process has one thread and before anything large is loaded: threads inherit all of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from smartnodes_core.confinement import files, landlock, limits, seccomp, syscalls, system


class Wanted(Protocol):
    """The limits that a confined process runs under; `sandbox.Limits` is one. `device` is "cpu" or "cuda"; with
    `num_devices` over 1 it connects to itself before it calls `seal`."""

    @property
    def memory_bytes(self) -> int: ...
    @property
    def num_files(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def num_devices(self) -> int: ...


@dataclass(frozen=True)
class Confinement:
    """What is in force, and what could not be had and why: one line each, for people."""

    applied: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def attempt(self, name: str, step: Callable[[], str]) -> None:
        """Notes what `step` says it did, or the OSError that it ended with."""
        try:
            self.applied.append(step())
        except OSError as error:
            self.missing.append(f"{name}: {error}")


def confine(wanted: Wanted, shared_bytes: int, parent_pid: int) -> Confinement:
    """Confines this process, which also ends with its parent from now on where the system can see to it.

    `shared_bytes` is the shared memory that it will map besides its own. Raises OSError only where the end of the
    parent could not be tied to.
    """
    done, own_user, connects = Confinement(), False, wanted.num_devices > 1
    if sys.platform == "linux":
        done.attempt("out-of-memory score", system.die_first)
        done.attempt("namespaces", lambda: system.leave_namespaces(loopback=connects))
        done.attempt("user", lambda: system.become_nobody(files.libraries()))
        done.attempt("capabilities", system.drop_capabilities)
        system.die_with_parent(parent_pid)
        own_user = os.getuid() >= system.FIRST_USER
    done.attempt(
        "limits",
        lambda: limits.lower(
            wanted.memory_bytes, wanted.num_files, wanted.file_bytes, shared_bytes, wanted.device, own_user
        ),
    )
    if sys.platform == "linux":
        done.attempt("new privileges", system.no_new_privileges)
        done.attempt(
            "files",
            lambda: landlock.restrict(files.libraries(), files.system_files(connects), files.devices(wanted), connects),
        )
        more = syscalls.CONNECTING if connects else ()
        done.attempt("system calls", lambda: seccomp.install(wanted.device, os.getpid(), more))
    else:
        done.missing.append(
            f"{sys.platform} has no namespaces, Landlock or seccomp: the process keeps its user's rights"
        )
    return done


def seal(wanted: Wanted, done: Confinement) -> None:
    """The ranks of a rig of several devices have connected to each other: from now on none makes a socket or connects
    one. To be called before anything is taken from strangers; notes in `done` what is in force.

    Threads and descriptors that are there stay, and the filter holds for all of them.
    """
    if sys.platform == "linux":
        done.attempt(
            "system calls once the ranks have connected",
            lambda: f"ranks connected; {seccomp.install(wanted.device, os.getpid(), syscalls.RANKS)}",
        )
