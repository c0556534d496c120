"""`tensorlink status`: the members of a network and its rounds, as on chain; a node of this machine, as it says; a
job's record, as its keepers show it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from smartnodes_core.chain.client import ChainClient
from smartnodes_core.chain.settings import SNO, Addresses
from smartnodes_core.chain.signing import checksum
from smartnodes_core.config import UserConfig, load
from smartnodes_core.errors import ConfigError, PeerUnreachableError, ProtocolError
from tensorlink.cli.job_status import as_author, from_node, rows
from tensorlink.cli.options import printable, start_logging


def add_commands(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("status", help="members, reputations and rounds of a network, as on chain")
    parser.add_argument("--config", type=Path, help="TOML file with rpc_url, addresses and network_id")
    parser.add_argument("--node", metavar="PORT", help="a running node's metrics: port on this machine, or host:port")
    parser.add_argument("--job", metavar="ID", help="the record of this job: asked of --node, or as its author")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print one row per member and the state of the rounds; reads only, needs no key. With --job, that job's record."""
    if options.config is None and not (options.job and options.node):
        raise ConfigError("no settings are named: give --config FILE, or --job and --node")
    if options.job:
        start_logging("ERROR")
        job = (
            from_node(options.node, options.job)
            if options.node
            else as_author(load(UserConfig, options.config), options.job)
        )
        sys.stdout.write("".join(printable(row) + "\n" for row in rows(job)))
        return 0
    if options.node:
        sys.stdout.write("\n".join(node_rows(options.node)) + "\n\n")
    config = load(UserConfig, options.config)
    chain = ChainClient(config.rpc_url, Addresses.read(config.addresses))
    state = chain.round_state(config.network_id)
    lines = [f"round {state.number}, the next {state.earliest_at_s - state.chain_time_s} s from now"]
    lines.append(f"{'account':42}  {'role':9}  {'reputation':>10}  {'stake SNO':>12}  live")
    for member in chain.members(config.network_id):
        stake = f"{member.stake_wei / SNO:.0f}"
        live = "yes" if member.live else "no"
        lines.append(f"{checksum(member.account)}  {member.role:9}  {member.reputation:10d}  {stake:>12}  {live}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def node_rows(where: str) -> Iterator[str]:
    """What the node says whose metrics are served at `where`. Raises PeerUnreachableError, ProtocolError."""
    from prometheus_client.parser import text_string_to_metric_families

    address = where if ":" in where else f"127.0.0.1:{where}"
    try:
        answer = requests.get(f"http://{address}/metrics", timeout=5)
        samples = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
    except requests.RequestException:
        raise PeerUnreachableError(f"no node tells its metrics at {address}: start it with --metrics {where}") from None
    except ValueError:
        samples = []
    info = next((sample.labels for sample in samples if sample.name == "smartnodes_node_info"), None)
    if info is None:
        raise ProtocolError(f"what {address} serves is no node's metrics")
    yield f"{info['role']} {info['node_key']}"
    if "reached" in info:
        yield f"reached at {info['endpoint']}, {info['reached']}: {info['why']}"
    shown = {"peers": "peers", "bytes_total": "bytes", "calls_served_total": "calls", "verdicts_total": "verdicts"}
    for name, title in (*shown.items(), ("refused_peers_total", "refused"), ("rounds_total", "rounds")):
        found = [sample for sample in samples if sample.name == f"smartnodes_{name}" and sample.value]
        if found:
            parts = (f"{' '.join(sample.labels.values())} {sample.value:.0f}" for sample in found)
            yield f"{title}: {', '.join(parts)}"
