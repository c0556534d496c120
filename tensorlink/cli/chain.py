"""`tensorlink devnet`, `deploy` and `claim`: run an embedded chain, put the contracts on one, take what was earned."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import checksum
from smartnodes_core.config import UserConfig, load
from smartnodes_core.errors import ConfigError
from smartnodes_core.jobs import job_named


def add_commands(commands: Any) -> None:
    """Register the commands."""
    devnet = commands.add_parser("devnet", help="run the embedded chain for development")
    devnet.add_argument("--port", type=int, default=8545)
    devnet.add_argument("--journal", type=Path, help="file that survives a kill")
    devnet.set_defaults(run=run_devnet)

    deploy = commands.add_parser("deploy", help="put the contracts on a chain, and write the addresses file")
    deploy.add_argument("settings", type=Path, help="TOML file with a table [chain]")
    deploy.add_argument("--rpc-url", required=True)
    deploy.add_argument("--chain-id", type=int, help="refuse any other chain")
    deploy.add_argument("--account", type=Path, required=True, help="key file of the account that pays")
    deploy.add_argument(
        "--passphrase-file", type=Path, help="file with the passphrase that seals the key file, if one does"
    )
    deploy.add_argument(
        "--addresses", type=Path, default=Path("addresses.json"), help="file to write (default: %(default)s)"
    )
    deploy.set_defaults(run=run_deploy)

    claim = commands.add_parser(
        "claim", help="pay out what an account has earned and what jobs have paid it; it is the owner who is paid"
    )
    claim.add_argument(
        "--config", type=Path, required=True, help="TOML file with the settings of a user, who may be anyone"
    )
    claim.add_argument(
        "--for", dest="owner", metavar="ACCOUNT", help="the account that earned (default: the user's own)"
    )
    claim.add_argument(
        "--take-back", metavar="JOB", help="first end the escrow of this job of the user's own, after its deadline"
    )
    claim.set_defaults(run=run_claim)


def run_devnet(options: argparse.Namespace) -> int:
    """Run the chain until it is told to end."""
    from smartnodes_core.chain.devnet.__main__ import main

    journal = ["--journal", str(options.journal)] if options.journal else []
    return main(["--port", str(options.port), *journal])


def run_deploy(options: argparse.Namespace) -> int:
    """Deploy and write the addresses file. After an interruption the same command goes on where it ended."""
    from smartnodes_core.chain.account import load_account_key
    from smartnodes_core.chain.deploy import deploy
    from smartnodes_core.keyfile import read_passphrase

    passphrase = None if options.passphrase_file is None else read_passphrase(options.passphrase_file)
    settings, key = ChainSettings.from_toml(options.settings), load_account_key(options.account, passphrase)
    target, record = options.addresses, options.addresses.with_name(options.addresses.name + ".begun")
    if target.exists():
        raise ConfigError(
            f"{target} exists, so nothing was sent: contracts that were deployed before are named there; name another "
            "file with --addresses, or delete it"
        )
    addresses = deploy(options.rpc_url, key, settings, record, options.chain_id)
    addresses.write(target)
    record.unlink()
    sys.stdout.write(f"deployed on chain {addresses.chain_id}; addresses in {target}\n")
    return 0


def run_claim(options: argparse.Namespace) -> int:
    """Claim for an account, the user's own if none is named: the emission it earned, and what escrows hold for it."""
    from smartnodes_core.nodes.paying import take_back, withdraw
    from smartnodes_core.nodes.rewards import claim
    from tensorlink.network import connect

    owner = _account(options.owner) if options.owner else None
    job = job_named(options.take_back) if options.take_back else None
    with connect(load(UserConfig, options.config)) as network:
        station = network.station
        account = owner or station.chain.account
        if job is not None:
            left = take_back(station.chain, network.network_id, job)
            sys.stdout.write(f"took back {left / SNO:.6f} that job {job.hex()[:16]} has not cost\n")
        paid = claim(station.node, station.chain, network.network_id, network.validators(), account)
        sys.stdout.write(f"claimed {paid / SNO:.6f} SNO for {checksum(account)}\n")
        sno, coin = withdraw(station.chain, account)
    sys.stdout.write(f"jobs have paid it {sno / SNO:.6f} SNO and {coin / SNO:.6f} of the chain's coin\n")
    return 0


def _account(text: str) -> bytes:
    try:
        account = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        account = b""
    if len(account) != 20:
        raise ConfigError(f"found --for {text}, needed an account: 0x and 40 hexadecimal digits")
    return account
