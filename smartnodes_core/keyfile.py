"""Files that hold a secret: JSON, readable by their owner alone, written once and never overwritten."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from smartnodes_core.errors import IdentityError

MAX_KEY_FILE_BYTES = 4096
VERSION = 1


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
