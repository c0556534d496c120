"""The file with the secret key of a node's account on chain."""

from __future__ import annotations

import os

from smartnodes_core.chain.signing import address_of, checksum
from smartnodes_core.errors import ConfigError, IdentityError
from smartnodes_core.keyfile import read_key_file, secret_fields, secret_in, write_key_file


def save_account_key(path: str | os.PathLike[str], key: bytes, passphrase: str | None = None) -> None:
    """Write the 32-byte secret `key`, sealed by `passphrase` if given. Raises IdentityError where the file exists."""
    write_key_file(path, {"account": checksum(address_of(key)), **secret_fields("private_key", key, passphrase)})


def load_account_key(path: str | os.PathLike[str], passphrase: str | None = None) -> bytes:
    """The 32-byte secret key in the file. Raises IdentityError."""
    fields = read_key_file(path)
    try:
        key = secret_in(fields, "private_key", passphrase, path)
        account = checksum(address_of(key))
    except (KeyError, ValueError, ConfigError) as error:
        raise IdentityError(f"{path} is not the key file of an account: {error}") from None
    if fields.get("account") != account:
        raise IdentityError(f"{path} names another account than its key gives: the file is damaged")
    return key
