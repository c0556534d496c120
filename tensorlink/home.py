"""A private network over one owner's machines: chain, validator and a worker on the first, workers on the others.

Everything lies in one folder and is taken up again after a stop. The chain's accounts are those of the embedded chain,
whose secrets anybody knows: it listens on loopback, and other machines reach it through a gate that asks for the
owner's code (`smartnodes_core/nodes/chain_gate.py`). `cli/home.py` is the command line.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.proposal import UNCAPPED
from smartnodes_core.chain.settings import SNO, Addresses, ChainSettings
from smartnodes_core.chain.signing import address_of
from smartnodes_core.errors import ConfigError, ProtocolError
from smartnodes_core.identity import Identity
from smartnodes_core.keyfile import read_key_file, write_key_file
from smartnodes_core.nodes.chain_gate import ChainDoor, ChainGate
from smartnodes_core.nodes.founding import ADDRESSES, found, make_keys, settings_of
from smartnodes_core.nodes.params import map_in, text_in
from smartnodes_core.nodes.process import NodeProcess
from smartnodes_core.records import NodeKey, Role
from smartnodes_core.transport.base import join_endpoint

NETWORK_ID = 1
READY_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 10.0
SECRET_BYTES = 16
#: Accounts of the embedded chain: 0 deploys, the first machine's nodes come next, then those that join.
_MEMBERS: dict[str, tuple[Role, int]] = {"user": ("user", 1), "validator": ("validator", 2), "worker": ("worker", 3)}
_FIRST_GUEST = 4


@dataclass(frozen=True)
class HomeSettings:
    """Of the first machine. It listens at `address` on four ports from `port` on: validator, gate, worker, relay."""

    folder: Path
    address: str
    port: int = 9000
    worker: bool = True
    round_interval_s: int = 5


class Home:
    """The first machine's processes. `start` returns when all are ready; `stop` ends them in order."""

    def __init__(self, settings: HomeSettings) -> None:
        self.settings, self.folder = settings, settings.folder
        self._devnet: DevnetProcess | None = None
        self._gate: ChainGate | None = None
        self._nodes: list[NodeProcess] = []

    @property
    def config_path(self) -> Path:
        """The settings with which scripts on this machine `tensorlink.connect`."""
        return self.folder / "config.toml"

    @property
    def gate_endpoint(self) -> str:
        return join_endpoint(self.settings.address, self.settings.port + 1)

    def start(self) -> str:
        """Brings everything up; returns the code with which other machines join. Raises SmartnodesError."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._devnet = DevnetProcess(journal=self.folder / "chain.journal")
        if not (self.folder / ADDRESSES).exists():
            found(self.folder, self._url, NETWORK_ID, _MEMBERS, self._chain_settings())
        relay = join_endpoint(self.settings.address, self.settings.port + 3)
        more = {"round-interval-s": self.settings.round_interval_s, "relay": relay}
        validator = self._launch("validator", 0, more)
        validator.wait_ready(READY_TIMEOUT_S)
        if self.settings.worker:
            self._launch("worker", 2, {}).wait_ready(READY_TIMEOUT_S)
        self._write_config()
        return self._open_gate()

    def stop(self) -> None:
        """Harmless when repeated."""
        if self._gate is not None:
            self._gate.stop()
        for node in self._nodes:
            node.terminate()
        for node in self._nodes:
            node.finish(STOP_TIMEOUT_S)
        self._nodes.clear()
        if self._devnet is not None:
            self._devnet.stop()
            self._devnet = None

    def _chain_settings(self) -> ChainSettings:
        return ChainSettings(
            round_interval_s=self.settings.round_interval_s,
            claim_delay_s=self.settings.round_interval_s,
            kappa_bps=UNCAPPED,
            genesis={address_of(devnet_key(_MEMBERS["validator"][1])): 1_000_000 * SNO},
        )

    @property
    def _url(self) -> str:
        if self._devnet is None:
            raise ConfigError("this network is not started")
        return self._devnet.url

    def _launch(self, role: str, offset: int, more: dict[str, Any]) -> NodeProcess:
        flags = {
            **settings_of(self.folder, role, self._url),
            "data-dir": self.folder / role,
            "network-id": NETWORK_ID,
            "chain-poll-interval-s": 5.0,
            "endpoint": join_endpoint(self.settings.address, self.settings.port + offset),
            **more,
        }
        if role != "validator":
            flags["bootstrap"] = join_endpoint(self.settings.address, self.settings.port)
        command = [sys.executable, "-m", f"tensorlink.cli.{role}", "--exit-with-parent"]
        for key, value in flags.items():
            command += [f"--{key.replace('_', '-')}", str(value)]
        node = NodeProcess(role, command, self.folder / f"{role}.log")
        self._nodes.append(node)
        return node

    def _write_config(self) -> None:
        values = settings_of(self.folder, "user", self._url)
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        bootstrap = join_endpoint(self.settings.address, self.settings.port)
        lines += [f"bootstrap = [{json.dumps(bootstrap)}]", "chain_poll_interval_s = 5.0"]
        self.config_path.write_text("\n".join(lines) + "\n")

    def _open_gate(self) -> str:
        identity_path, code_path = self.folder / "gate.json", self.folder / "code.json"
        if not identity_path.exists():
            Identity.create().save(identity_path)
        if not code_path.exists():
            write_key_file(code_path, {"secret": secrets.token_hex(SECRET_BYTES)})
        identity = Identity.load(identity_path)
        secret = bytes.fromhex(str(read_key_file(code_path)["secret"]))
        members = self.folder / "machines.json"
        self._gate = ChainGate(identity, self.gate_endpoint, self._url, secret, members, self._welcome)
        self._gate.start()
        return encode_code(identity.node_key, secret)

    def _welcome(self, number: int) -> dict[str, Any]:
        """What a machine that joins needs to run a worker; `number` is its place among them."""
        return {
            "account": _FIRST_GUEST + number,
            "addresses": json.loads((self.folder / ADDRESSES).read_text()),
            "bootstrap": join_endpoint(self.settings.address, self.settings.port),
        }


def encode_code(gate_key: NodeKey, secret: bytes) -> str:
    """What `tensorlink home join` is given: whom to trust, and what to show."""
    return base64.b32encode(gate_key + secret).decode().rstrip("=").lower()


def decode_code(code: str) -> tuple[NodeKey, bytes]:
    """The inverse. Raises ConfigError."""
    try:
        data = base64.b32decode(code.upper() + "=" * (-len(code) % 8))
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != 32 + SECRET_BYTES:
        raise ConfigError(
            f"found code {code!r:.90}, needed the 77 letters and digits that `tensorlink home start` prints"
        )
    return data[:32], data[32:]


class Guest:
    """Another machine: keys in `folder`, and a door to the first machine's chain. `flags` are a worker's."""

    def __init__(self, folder: Path, gate: str, code: str) -> None:
        gate_key, self._secret = decode_code(code)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        if not (folder / "identity.json").exists():
            Identity.create().save(folder / "identity.json")
        self._door = ChainDoor(Identity.load(folder / "identity.json"), gate, gate_key)

    def join(self) -> dict[str, str]:
        """Shows the code and opens the door: the flags of this machine's worker, but for its endpoint."""
        welcome = self._door.join(self._secret)
        account, addresses = welcome.get("account"), map_in(welcome, "addresses")
        if type(account) is not int:
            raise ProtocolError("the first machine gave no account")
        make_keys(self._folder, account)
        path = self._folder / ADDRESSES
        path.write_text(json.dumps(addresses))
        Addresses.read(path)
        return {
            **settings_of(self._folder, "", self._door.open()),
            "data-dir": str(self._folder),
            "network-id": str(NETWORK_ID),
            "bootstrap": text_in(welcome, "bootstrap"),
            "chain-poll-interval-s": "5",
        }

    def close(self) -> None:
        self._door.close()


def address_towards(host: str) -> str:
    """The address of this machine from which `host` is reached; no packet is sent. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError as error:
            raise ConfigError(
                f"{host} is not reached from here ({error.strerror}): name this machine's --address"
            ) from None
        return str(probe.getsockname()[0])
