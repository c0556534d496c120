"""Files that hold a secret: JSON, readable by their owner alone, written once and never overwritten.

On request the secret is sealed by a passphrase (Argon2id, then XSalsa20-Poly1305): who copies the file has nothing.
"""

from __future__ import annotations

import json
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any

import nacl.exceptions
import nacl.pwhash
import nacl.secret
import nacl.utils

from smartnodes_core.errors import IdentityError

MAX_KEY_FILE_BYTES = 4096
VERSION = 1
_OPSLIMIT = nacl.pwhash.argon2id.OPSLIMIT_INTERACTIVE
_MEMLIMIT = nacl.pwhash.argon2id.MEMLIMIT_INTERACTIVE


def write_key_file(path: str | os.PathLike[str], fields: dict[str, Any]) -> None:
    """Write `fields` durably with mode 0600. Raises IdentityError where the file exists or cannot be written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise IdentityError(f"{path} exists already: a key file is never overwritten, move it away first") from None
    except OSError as error:
        raise IdentityError(f"the key file {path} cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as file:
        json.dump({"version": VERSION, **fields}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_key_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a key file. Raises IdentityError, also when others than its owner may read it."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise IdentityError(
            f"the key file {path} cannot be read ({error.strerror}): make one with `tensorlink keys`, or name another"
        ) from None
    mode = stat.S_IMODE(status.st_mode)
    if os.name == "posix" and mode & 0o077:
        raise IdentityError(f"{path} can be read by others (mode {mode:o}): run chmod 600 {path}")
    try:
        fields = json.loads(data)
    except ValueError:
        fields = None
    if len(data) > MAX_KEY_FILE_BYTES or not isinstance(fields, dict) or fields.get("version") != VERSION:
        raise IdentityError(f"{path} is not a key file of version {VERSION}")
    return fields


def hold_key_file(path: str | os.PathLike[str]) -> FileIO:
    """The key file at `path`, held until it is closed or this process ends. Raises IdentityError where another process
    holds it: peers keep one connection with each key, and two nodes would take them from each other.
    """
    file = FileIO(path, "r")
    try:
        import fcntl  # not on every platform

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        file.close()
        raise IdentityError(
            f"{path} is in use by a node that runs: stop it, ask it with `tensorlink status --node` if it has metrics, "
            "or take another identity"
        ) from None
    return file


def secret_fields(name: str, secret: bytes, passphrase: str | None) -> dict[str, str]:
    """The fields that keep `secret`: as hexadecimal under `name`, or sealed where a passphrase is given."""
    if passphrase is None:
        return {name: secret.hex()}
    salt = nacl.utils.random(nacl.pwhash.argon2id.SALTBYTES)
    box = nacl.secret.SecretBox(_stretch(passphrase, salt))
    return {"kdf": "argon2id-interactive", "salt": salt.hex(), "sealed": bytes(box.encrypt(secret)).hex()}


def secret_in(fields: dict[str, Any], name: str, passphrase: str | None, path: str | os.PathLike[str]) -> bytes:
    """The secret that `secret_fields` kept. Raises IdentityError for a passphrase that is wrong or missing, KeyError or
    ValueError for fields that are no such thing.
    """
    if "sealed" not in fields:
        return bytes.fromhex(str(fields[name]))
    if passphrase is None:
        raise IdentityError(f"{path} is sealed by a passphrase: name the file that holds it (passphrase_file)")
    try:
        box = nacl.secret.SecretBox(_stretch(passphrase, bytes.fromhex(str(fields["salt"]))))
        return box.decrypt(bytes.fromhex(str(fields["sealed"])))
    except nacl.exceptions.ValueError as error:
        raise ValueError(str(error)) from None
    except nacl.exceptions.CryptoError:
        raise IdentityError(f"the passphrase does not open {path}") from None


def _stretch(passphrase: str, salt: bytes) -> bytes:
    return nacl.pwhash.argon2id.kdf(nacl.secret.SecretBox.KEY_SIZE, passphrase.encode(), salt, _OPSLIMIT, _MEMLIMIT)


def read_passphrase(path: str | os.PathLike[str]) -> str:
    """The first line of a file that only its owner may read. Raises IdentityError."""
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            line = file.readline(MAX_KEY_FILE_BYTES).decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(f"the passphrase file {path} cannot be read: {error}") from None
    if os.name == "posix" and mode & 0o077:
        raise IdentityError(f"{path} can be read by others (mode {mode:o}): run chmod 600 {path}")
    if not line:
        raise IdentityError(f"the passphrase file {path} is empty: write the passphrase on its first line")
    return line
