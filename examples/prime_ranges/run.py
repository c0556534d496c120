"""A network of this machine that looks for primes: `python examples/prime_ranges/run.py demo --below 1000000`.

`demo` starts a chain, a validator and workers as processes and is the user; the processes are this program's
`validator SETTINGS.toml` and `worker SETTINGS.toml`. With `--lazy N` the last N workers find nothing and say so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

from primes import PrimeAuditor, PrimeHandler, confidence, none_at_all, primes_of
from searching import search

from smartnodes_core.chain.client import ChainClient
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of
from smartnodes_core.config import UserConfig, ValidatorConfig, WorkerConfig, load
from smartnodes_core.nodes.founding import found, settings_of
from smartnodes_core.nodes.process import NodeProcess
from smartnodes_core.nodes.running import running_validator, running_worker
from smartnodes_core.nodes.station import Station
from smartnodes_core.nodes.validator import ValidatorSettings
from smartnodes_core.records import Role
from smartnodes_core.reputation import NEWCOMER

NETWORK = 1


def demo(below: int, num_workers: int, num_lazy: int, audited_percent: int) -> None:
    """Starts everything, searches, and waits until rounds have told the chain what was found of the workers."""
    members: dict[str, tuple[Role, int]] = {"user": ("user", 1), "validator": ("validator", 2)}
    members |= {f"worker-{number}": ("worker", 3 + number) for number in range(num_workers)}
    genesis = {address_of(devnet_key(2)): 1_000_000 * SNO}
    with tempfile.TemporaryDirectory() as name, DevnetProcess() as devnet:
        folder, nodes = Path(name), []
        settings = ChainSettings(round_interval_s=2, claim_delay_s=2, genesis=genesis)
        chain = ChainClient(devnet.url, found(folder, devnet.url, NETWORK, members, settings))
        try:
            nodes.append(start(folder, devnet.url, "validator", "validator", []))
            bootstrap = [nodes[0].wait_ready(60)]
            for number in range(num_workers):
                lazy = ["--lazy"] if number >= num_workers - num_lazy else []
                nodes.append(start(folder, devnet.url, "worker", f"worker-{number}", bootstrap, *lazy))
            for node in nodes[1:]:
                node.wait_ready(60)
            station = Station.open(load(UserConfig, write(folder, devnet.url, "user", bootstrap)), "user")
            try:
                station.join()
                count = search(station, below, audited_percent)
                reputations = settled(chain, {name: account for name, (_, account) in members.items()})
            finally:
                station.close()
            sys.stdout.write(json.dumps({"primes": count, "reputations": reputations}) + "\n")
        finally:
            for node in nodes:
                node.terminate()
            for node in nodes:
                node.finish(10)


def settled(chain: ChainClient, accounts: dict[str, int], timeout_s: float = 60.0) -> dict[str, int]:
    """The workers' reputations, once a round has carried what audits found of each."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while True:
        members = {member.account: member.reputation for member in chain.members(NETWORK)}
        workers = {name: number for name, number in accounts.items() if name.startswith("worker")}
        reputations = {name: members[address_of(devnet_key(number))] for name, number in workers.items()}
        if NEWCOMER not in reputations.values() or time.monotonic() > deadline:
            return reputations
        pause.wait(0.5)


def start(folder: Path, url: str, role: str, name: str, bootstrap: list[str], *flags: str) -> NodeProcess:
    """A node's process, whose log lies beside its keys."""
    command = [sys.executable, __file__, role, str(write(folder, url, name, bootstrap)), *flags]
    return NodeProcess(name, command, folder / name / "log")


def write(folder: Path, url: str, name: str, bootstrap: list[str]) -> Path:
    """A node's settings."""
    values = {**settings_of(folder, name, url), "bootstrap": bootstrap, "chain_poll_interval_s": 2.0}
    if name != "user":
        values["data_dir"] = str(folder / name)
    path = folder / name / "settings.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


def serve(station: Station) -> None:
    """Says that it is ready, and serves until its starter ends it or has ended."""
    sys.stdout.write(json.dumps({"endpoint": station.node.endpoint}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for role in ("validator", "worker"):
        commands.add_parser(role).add_argument("settings", type=Path)
    commands.choices["worker"].add_argument("--lazy", action="store_true", help="finds nothing, and says so")
    flags = commands.add_parser("demo")
    for name, default in (("below", 1_000_000), ("workers", 2), ("lazy", 0), ("audited-percent", 25)):
        flags.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.command == "demo":
        demo(options.below, options.workers, options.lazy, options.audited_percent)
    elif options.command == "validator":
        settings = ValidatorSettings(list_interval_s=0.1, poll_s=0.5, reputation_rule=confidence)
        with running_validator(load(ValidatorConfig, options.settings), PrimeAuditor(), settings) as station:
            serve(station)
    else:
        handler = PrimeHandler(none_at_all if options.lazy else primes_of)
        with running_worker(load(WorkerConfig, options.settings), handler) as station:
            serve(station)


if __name__ == "__main__":
    main()
