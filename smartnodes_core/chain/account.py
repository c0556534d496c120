"""The file with the secret key of a node's account on chain."""

from __future__ import annotations

import os

from smartnodes_core.chain.signing import address_of, checksum
from smartnodes_core.errors import ConfigError, IdentityError
from smartnodes_core.keyfile import read_key_file, write_key_file


def save_account_key(path: str | os.PathLike[str], key: bytes) -> None:
    """Write the 32-byte secret `key`. Raises IdentityError where the file exists."""
    write_key_file(path, {"account": checksum(address_of(key)), "private_key": key.hex()})


def load_account_key(path: str | os.PathLike[str]) -> bytes:
    """The 32-byte secret key in the file. Raises IdentityError."""
    fields = read_key_file(path)
    try:
        key = bytes.fromhex(str(fields["private_key"]))
        account = checksum(address_of(key))
    except (KeyError, ValueError, ConfigError) as error:
        raise IdentityError(f"{path} is not the key file of an account: {error}") from None
    if fields.get("account") != account:
        raise IdentityError(f"{path} names another account than its key gives: the file is damaged")
    return key
