"""The processes of a `LocalNetwork`: started in order, watched, ended together, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smartnodes_core.chain.account import save_account_key
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of
from smartnodes_core.config import UserConfig
from smartnodes_core.errors import ConfigError, LocalError
from smartnodes_core.identity import Identity

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 3.0
NETWORK_ID = 1
USER_SNO = 100_000


@dataclass(frozen=True)
class LocalSettings:
    """Of a network on one machine. Times in seconds; `audit_rates` per micro-batch and per step."""

    workers: int = 2
    validators: int = 1
    threads_per_worker: int = 1
    round_interval_s: int = 10
    claim_delay_s: int = 10
    audit_window_steps: int = 16
    audit_rates: tuple[float, float] = (0.01, 0.05)
    log_level: str = "INFO"
    say: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        if self.workers < 1 or self.validators < 1:
            raise ConfigError(
                f"found {self.workers} workers and {self.validators} validators, needed at least 1 of each"
            )


class LocalProcesses:
    """Chain, validators and workers, each a process of its own that also ends when this one does, however it does."""

    def __init__(self, settings: LocalSettings):
        self.settings = settings
        self.folder = Path(tempfile.mkdtemp(prefix="tensorlink-"))
        self.chain_url = ""
        self._devnet: DevnetProcess | None = None
        self._nodes: list[_NodeProcess] = []
        self._num_keys = 1  # account 0 deploys

    def start(self) -> None:
        """Bring everything up; returns when every node says that it is ready."""
        say = self.settings.say
        say("starting the chain …")
        self._devnet = DevnetProcess()
        self.chain_url = self._devnet.url
        self._make_keys("user")
        names = {
            "validator": [f"validator-{index}" for index in range(self.settings.validators)],
            "worker": [f"worker-{index}" for index in range(self.settings.workers)],
        }
        validator_accounts = [self._make_keys(name) for name in names["validator"]]
        for name in names["worker"]:
            self._make_keys(name)
        say("deploying the contracts …")
        self._deploy(validator_accounts)
        say("starting validators and workers …")
        first = self._launch(names["validator"][0], "validator", [])
        endpoint = first.wait_ready(READY_TIMEOUT_S)
        rest = [self._launch(name, "validator", [endpoint]) for name in names["validator"][1:]]
        rest += [self._launch(name, "worker", [endpoint]) for name in names["worker"]]
        for node in rest:
            node.wait_ready(READY_TIMEOUT_S)
        self._bootstrap = endpoint

    def user_config(self) -> UserConfig:
        """What the calling process needs to join as the user."""
        return UserConfig(
            identity=self.folder / "user" / "identity.json",
            account=self.folder / "user" / "account.json",
            rpc_url=self.chain_url,
            addresses=self.folder / "addresses.json",
            bootstrap=[self._bootstrap],
            network_id=NETWORK_ID,
            chain_poll_interval_s=5.0,
        )

    def processes(self) -> list[dict[str, Any]]:
        """Name, process id and resident memory in bytes of this process and all that it started, children included."""
        pids = {"user (this process)": os.getpid()}
        if self._devnet is not None:
            pids["chain"] = self._devnet.process.pid
        pids |= {node.name: node.process.pid for node in self._nodes}
        found = []
        for name, pid in pids.items():
            found.append({"name": name, "pid": pid, "resident_bytes": _resident_bytes(pid)})
            if pid != os.getpid():
                for child in _children(pid):
                    row = {"name": f"{name} compute", "pid": child, "resident_bytes": _resident_bytes(child)}
                    found.append(row)
        return found

    def kill(self, name: str) -> None:
        """End a node at once, as a power cut would: for tests of what the others make of it."""
        node = next(node for node in self._nodes if node.name == name)
        node.process.kill()
        node.process.wait()

    def node_named(self, name: str) -> subprocess.Popen[bytes]:
        """The process of a node."""
        return next(node for node in self._nodes if node.name == name).process

    def stop(self) -> None:
        """End every process, politely and then not, and remove the folder. Idempotent."""
        for node in self._nodes:
            node.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for node in self._nodes:
            node.finish(max(0.1, deadline - time.monotonic()))
        self._nodes.clear()
        if self._devnet is not None:
            self._devnet.stop()
            self._devnet = None
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- parts ------------------------------------------------------------------------------------------------------

    def _make_keys(self, name: str) -> bytes:
        """Key files for one node; returns its account."""
        folder = self.folder / name
        folder.mkdir()
        key = devnet_key(self._num_keys)
        self._num_keys += 1
        Identity.create().save(folder / "identity.json")
        save_account_key(folder / "account.json", key)
        return address_of(key)

    def _deploy(self, validators: list[bytes]) -> None:
        from smartnodes_core.chain.deploy import deploy

        user = address_of(devnet_key(1))
        settings = ChainSettings(
            round_interval_s=self.settings.round_interval_s,
            claim_delay_s=self.settings.claim_delay_s,
            genesis={**{account: 1_000_000 * SNO for account in validators}, user: USER_SNO * SNO},
        )
        deploy(self.chain_url, devnet_key(0), settings).write(self.folder / "addresses.json")

    def _launch(self, name: str, role: str, bootstrap: list[str]) -> _NodeProcess:
        folder = self.folder / name
        flags = {
            "identity": folder / "identity.json",
            "account": folder / "account.json",
            "addresses": self.folder / "addresses.json",
            "rpc-url": self.chain_url,
            "network-id": NETWORK_ID,
            "data-dir": folder,
            "log-level": self.settings.log_level,
            "chain-poll-interval-s": 5.0,
        }
        if role == "validator":
            flags["round-interval-s"] = self.settings.round_interval_s
        else:
            flags["num-threads"] = self.settings.threads_per_worker
        command = [sys.executable, "-m", f"tensorlink.cli.{role}", "--exit-with-parent"]
        for key, value in flags.items():
            command += [f"--{key}", str(value)]
        for endpoint in bootstrap:
            command += ["--bootstrap", endpoint]
        node = _NodeProcess(name, command, folder / "log")
        self._nodes.append(node)
        return node


class _NodeProcess:
    """One node: its log goes to a file, its first line on standard output says that it is ready."""

    def __init__(self, name: str, command: list[str], log: Path):
        self.name, self._log = name, log
        with open(log, "wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C reaches the starter, which then ends its children in order
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_ready(self, timeout_s: float) -> str:
        """The endpoint, once the node listens. Raises LocalError with the end of its log."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            line = ""
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)  # its output ends a moment before it does
            code = self.process.poll()
            what = f"was not ready within {timeout_s:.0f} s" if code is None else f"ended with code {code}"
            raise LocalError(f"{self.name} {what}; the end of its log:\n{_tail(self._log)}")
        return str(json.loads(line)["endpoint"])

    def terminate(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def finish(self, timeout_s: float) -> None:
        """Wait for the end, kill at the deadline."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        stdout = self.process.stdout
        if stdout is not None:
            with contextlib.suppress(ValueError, OSError):
                self._lines.put(stdout.readline().decode(errors="replace").strip())


def _tail(path: Path, num_lines: int = 15) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:])
    except OSError as error:
        return f"(no log: {error})"


def _resident_bytes(pid: int) -> int:
    """Resident memory, 0 where the system does not say (it is Linux that does)."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found
