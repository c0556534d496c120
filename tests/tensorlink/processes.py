"""Processes of this machine as /proc shows them: what a test started, and whether it has ended."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

MOST_PATIENCE = 8.0


def descendants(pid):
    """Process ids of everything that `pid` has started, directly or not."""
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    except OSError:
        pass
    return found


def alive(pids):
    """Those of `pids` that run (a zombie does not)."""
    running = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state != "Z":
            running.append(pid)
    return running


def patience_s(seconds):
    """What takes `seconds` where nothing else runs may take as many times longer as there is work for the cores."""
    return seconds * min(MOST_PATIENCE, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def wait_until(condition, timeout_s):
    """Seconds until `condition()` held, or None after `timeout_s`, stretched as `patience_s` says."""
    began = time.monotonic()
    pause = threading.Event()
    while time.monotonic() - began < patience_s(timeout_s):
        if condition():
            return time.monotonic() - began
        pause.wait(0.02)
    return None


def with_marker(marker):
    """Ids of processes whose environment has `marker`, this one left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if marker.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
