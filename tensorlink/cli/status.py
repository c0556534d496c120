"""`tensorlink status`: the members of a network and its rounds, as on chain."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from smartnodes_core.chain.client import ChainClient
from smartnodes_core.chain.settings import SNO, Addresses
from smartnodes_core.chain.signing import checksum
from smartnodes_core.config import UserConfig, load


def add_commands(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("status", help="members, reputations and rounds of a network, as on chain")
    parser.add_argument("--config", type=Path, required=True, help="TOML file with rpc_url, addresses and network_id")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print one row per member and the state of the rounds; reads only, needs no key."""
    config = load(UserConfig, options.config)
    chain = ChainClient(config.rpc_url, Addresses.read(config.addresses))
    state = chain.round_state(config.network_id)
    rows = [f"round {state.number}, the next {state.earliest_at_s - state.chain_time_s} s from now"]
    rows.append(f"{'account':42}  {'role':9}  {'reputation':>10}  {'stake SNO':>12}  live")
    for member in chain.members(config.network_id):
        stake = f"{member.stake_wei / SNO:.0f}"
        live = "yes" if member.live else "no"
        rows.append(f"{checksum(member.account)}  {member.role:9}  {member.reputation:10d}  {stake:>12}  {live}")
    sys.stdout.write("\n".join(rows) + "\n")
    return 0
