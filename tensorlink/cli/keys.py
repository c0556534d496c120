"""`tensorlink keys`: make the two key files of a node."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from smartnodes_core.chain.account import save_account_key
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.signing import address_of, checksum, new_key
from smartnodes_core.errors import ConfigError
from smartnodes_core.identity import Identity
from smartnodes_core.keyfile import read_passphrase


def add_commands(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("keys", help="make a node's identity and account key files")
    parser.add_argument("--folder", type=Path, default=Path("~/.smartnodes"), help="where (default: %(default)s)")
    parser.add_argument(
        "--account-key-variable",
        help="take the account's secret from this environment variable instead of making a new one",
    )
    parser.add_argument(
        "--devnet-account", type=int, metavar="N", help="use funded account number N of the embedded chain (`devnet`)"
    )
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        help="seal both files by the passphrase on the first line of this file; nodes then need it as passphrase_file",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write identity.json and account.json; existing files are never overwritten."""
    folder = options.folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = _account_key(options)
    passphrase = None if options.passphrase_file is None else read_passphrase(options.passphrase_file)
    identity = Identity.create()
    identity.save(folder / "identity.json", passphrase)
    save_account_key(folder / "account.json", key, passphrase)
    sys.stdout.write(f"node key {identity.node_key.hex()}\naccount  {checksum(address_of(key))}\nin {folder}\n")
    return 0


def _account_key(options: argparse.Namespace) -> bytes:
    """A new secret, or the one that the flags name. Raises ConfigError."""
    if options.devnet_account is not None:
        try:
            return devnet_key(options.devnet_account)
        except IndexError as error:
            raise ConfigError(f"--devnet-account: {error}, numbered from 0") from None
    if options.account_key_variable:
        try:
            key = bytes.fromhex(os.environ[options.account_key_variable].removeprefix("0x"))
            address_of(key)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"the environment variable {options.account_key_variable} holds no secret key: 32 bytes in "
                "hexadecimal are needed"
            ) from error
        return key
    return new_key()
