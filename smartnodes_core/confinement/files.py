"""Which files a computing process needs: the libraries that it may still import, and what torch asks the system."""

from __future__ import annotations

import glob
import os
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_SYSTEM_FILES = (
    "/etc/ld.so.cache",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/dev/null",
    "/dev/urandom",
)
#: What Gloo reads to look for a fast network, and ends where it may not: which devices are on the machine's bus.
_BUS = ("/sys/bus/pci/devices", "/sys/devices/pci*")
_CUDA_FILES = (
    "/proc/driver/nvidia",
    "/proc/devices",
    "/proc/modules",
    "/sys/bus/pci",
    "/sys/devices/pci*",
    "/sys/module",
)


def libraries() -> list[Path]:
    """Folders of Python's own library, of installed packages, and of the packages that are loaded already.

    Not the whole of `sys.path`: the working directory is on it, which may hold anything.
    """
    paths = sysconfig.get_paths()
    found = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [entry for entry in [*site.getsitepackages(), *sys.path] if Path(entry).name.endswith("-packages")]
    found += [str(Path(sys.base_prefix) / "lib"), *_SYSTEM_LIBRARIES]
    found += os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    for name, module in list(sys.modules.items()):
        if "." not in name:
            found += list(getattr(module, "__path__", ()))
    return _existing(found)


def system_files(connects: bool) -> list[Path]:
    """What torch and the C library read of the machine; nothing of other processes."""
    bus = [path for pattern in _BUS for path in glob.glob(pattern)] if connects else []
    return _existing([*_SYSTEM_FILES, f"/proc/{os.getpid()}", *bus])


def devices(wanted: Any) -> list[Path]:
    """Device files that are read, written and controlled, with what their driver reads: none for "cpu"."""
    if wanted.device != "cuda":
        return []
    return _existing([path for pattern in ("/dev/nvidia*", *_CUDA_FILES) for path in glob.glob(pattern)])


def _existing(paths: list[str]) -> list[Path]:
    return [Path(path) for path in dict.fromkeys(paths) if path and os.path.exists(path)]
