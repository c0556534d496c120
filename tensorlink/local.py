"""The processes of a `LocalNetwork`: started in order, watched, ended together, nothing left behind."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.anvil import AnvilProcess, start_chain
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.proposal import UNCAPPED
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of
from smartnodes_core.config import UserConfig, load
from smartnodes_core.errors import ConfigError
from smartnodes_core.nodes.founding import found, settings_of
from smartnodes_core.nodes.process import NodeProcess, children, resident_bytes
from smartnodes_core.records import Role

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 3.0
NETWORK_ID = 1
#: What workers say of their lines, which never leave this machine.
LOOPBACK_MBIT = 10_000
USER_SNO = 100_000


@dataclass(frozen=True)
class LocalSettings:
    """Of a network on one machine. Times in seconds; `audit_rates` per micro-batch and per step.

    `commands` puts another program in the place of a node's own, by the node's name ("worker-1"): the flags follow it.
    It is how the demo and tests start nodes that cheat; nothing else uses it. `flags` gives a node settings of its
    own, by its name ({"worker-0": {"max-memory-bytes": 1 << 30}}). Nodes in `late` are members that are not running
    yet: `start_node` starts them.
    """

    workers: int = 2
    validators: int = 1
    threads_per_worker: int = 1
    slots_per_worker: int = 1
    round_interval_s: int = 10
    claim_delay_s: int = 10
    audit_window_steps: int = 16
    audit_rates: tuple[float, float] = (0.01, 0.05)
    log_level: str = "INFO"
    say: Callable[[str], None] = lambda line: None
    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    late: Sequence[str] = ()

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
        self._devnet: AnvilProcess | DevnetProcess | None = None
        self._nodes: list[NodeProcess] = []
        self._stopping = threading.Lock()
        atexit.register(self.stop)  # for a script that ends without closing its network

    def start(self) -> None:
        """Bring everything up; returns when every node says that it is ready."""
        say = self.settings.say
        say("starting the chain …")
        self._devnet = start_chain()
        self.chain_url = self._devnet.url
        names: dict[str, Role] = {"user": "user"}
        names |= {f"validator-{index}": "validator" for index in range(self.settings.validators)}
        names |= {f"worker-{index}": "worker" for index in range(self.settings.workers)}
        members = {name: (role, number) for number, (name, role) in enumerate(names.items(), start=1)}
        say("deploying the contracts …")
        found(self.folder, self.chain_url, NETWORK_ID, members, self._chain_settings(members))
        say("starting validators and workers …")
        first, *others = [name for name, role in names.items() if role != "user"]
        endpoint = self._launch(first, names[first], []).wait_ready(READY_TIMEOUT_S)
        for node in [self._launch(name, names[name], [endpoint]) for name in others if name not in self.settings.late]:
            node.wait_ready(READY_TIMEOUT_S)
        self._bootstrap = endpoint

    def user_config(self) -> UserConfig:
        """What the calling process needs to join as the user."""
        flags = {"bootstrap": [self._bootstrap], "network_id": NETWORK_ID, "chain_poll_interval_s": 5.0}
        return load(UserConfig, env={}, flags={**settings_of(self.folder, "user", self.chain_url), **flags})

    def processes(self) -> list[dict[str, Any]]:
        """Name, process id and resident memory in bytes of this process and all that it started, children included."""
        pids = {"user (this process)": os.getpid()}
        if self._devnet is not None:
            pids["chain"] = self._devnet.process.pid
        pids |= {node.name: node.process.pid for node in self._nodes}
        found = []
        for name, pid in pids.items():
            found.append({"name": name, "pid": pid, "resident_bytes": resident_bytes(pid)})
            if pid != os.getpid():
                for child in children(pid):
                    row = {"name": f"{name} compute", "pid": child, "resident_bytes": resident_bytes(child)}
                    found.append(row)
        return found

    def kill(self, name: str) -> None:
        """End a node at once, as a power cut would: for tests of what the others make of it."""
        self._named(name).kill()

    def start_node(self, name: str) -> None:
        """Start a node of `settings.late`, or one that has ended once more, with the identity and the folder that it
        had; returns when it is ready."""
        for ended in [node for node in self._nodes if node.name == name]:
            ended.kill()
            self._nodes.remove(ended)
        bootstrap = [self._bootstrap] if name != "validator-0" else []
        self._launch(name, "worker" if name.startswith("worker") else "validator", bootstrap).wait_ready(
            READY_TIMEOUT_S
        )

    def node_named(self, name: str) -> subprocess.Popen[bytes]:
        """The process of a node."""
        return self._named(name).process

    def name_at(self, endpoint: str) -> str:
        """The name of the node that listens there."""
        return next(node.name for node in self._nodes if node.endpoint == endpoint)

    def log_of(self, name: str) -> str:
        """What a node has written so far."""
        return self._named(name).log.read_text(errors="replace")

    def _named(self, name: str) -> NodeProcess:
        found = next((node for node in self._nodes if node.name == name), None)
        if found is None:
            raise ConfigError(f"found no node {name!r}, needed one of {[node.name for node in self._nodes]}")
        return found

    def stop(self) -> None:
        """End every process, politely and then not, and remove the folder. Idempotent."""
        with self._stopping:
            try:
                self._end_nodes()
            finally:
                if self._devnet is not None:
                    self._devnet.stop()
                    self._devnet = None
                shutil.rmtree(self.folder, ignore_errors=True)
                atexit.unregister(self.stop)

    def _end_nodes(self) -> None:
        for node in self._nodes:
            node.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        try:
            for node in self._nodes:
                node.finish(max(0.0, deadline - time.monotonic()))
        finally:  # a second Ctrl-C: no more patience
            for node in self._nodes:
                node.kill()
            self._nodes.clear()

    # -- parts ------------------------------------------------------------------------------------------------------

    def _chain_settings(self, members: Mapping[str, tuple[Role, int]]) -> ChainSettings:
        sno = {"validator": 1_000_000 * SNO, "user": USER_SNO * SNO}
        return ChainSettings(
            round_interval_s=self.settings.round_interval_s,
            claim_delay_s=self.settings.claim_delay_s,
            kappa_bps=UNCAPPED,  # a subsidy: jobs here pay no fees that workers could earn
            genesis={address_of(devnet_key(number)): sno[role] for role, number in members.values() if role in sno},
        )

    def _launch(self, name: str, role: Role, bootstrap: list[str]) -> NodeProcess:
        folder = self.folder / name
        flags: dict[str, Any] = {
            **settings_of(self.folder, name, self.chain_url),
            "network-id": NETWORK_ID,
            "data-dir": folder,
            "log-level": self.settings.log_level,
            "chain-poll-interval-s": 5.0,
        }
        if role == "validator":
            flags["round-interval-s"] = self.settings.round_interval_s
        else:
            flags["num-threads"] = self.settings.threads_per_worker
            flags["num-slots"] = self.settings.slots_per_worker
            flags["up-mbit"] = flags["down-mbit"] = LOOPBACK_MBIT
        flags |= self.settings.flags.get(name, {})
        program = self.settings.commands.get(name, (sys.executable, "-m", f"tensorlink.cli.{role}"))
        command = [*program, "--exit-with-parent"]
        for key, value in flags.items():
            command += [f"--{key.replace('_', '-')}", str(value)]
        for endpoint in bootstrap:
            command += ["--bootstrap", endpoint]
        node = NodeProcess(name, command, folder / "log")
        self._nodes.append(node)
        return node
