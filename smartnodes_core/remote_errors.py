"""How an error crosses a connection: as its class's `code` and its message, and back as the same class.

Classes are found among all subclasses of SmartnodesError, wherever they are declared. What comes back remembers which
peer raised it (`raised_by`), so that a fault found here is never confused with one that a peer reports.
"""

from __future__ import annotations

import re

from smartnodes_core.errors import RemoteError, SmartnodesError

MAX_MESSAGE_CHARS = 2000
_PATH = re.compile(r"(?<![\w/:])(?:/[\w.@+~-]+){2,}/?")


def to_wire(error: SmartnodesError) -> dict[str, str]:
    """The header fields of `error`: file paths are removed, the message is cut to its cap."""
    message = _PATH.sub("<path>", str(error))[:MAX_MESSAGE_CHARS]
    return {"code": error.code, "message": message}


def from_wire(fields: dict[str, object], peer_name: str, node_key: bytes) -> SmartnodesError:
    """The error that a peer reported, as our class of that code, or RemoteError when this version has none."""
    code, message = str(fields.get("code", ""))[:64], str(fields.get("message", ""))[:MAX_MESSAGE_CHARS]
    found = _class_of(code)
    error: SmartnodesError
    if found is None:
        error = RemoteError(f"{peer_name}: {code}: {message}")
    else:
        try:
            error = found(f"{peer_name}: {message}")
        except TypeError:  # a class with a constructor of its own
            error = RemoteError(f"{peer_name}: {code}: {message}")
    error.__dict__["raised_by"] = node_key
    return error


def raised_by(error: BaseException) -> bytes | None:
    """The node key of the peer that raised `error`; None when it was raised here."""
    key = error.__dict__.get("raised_by")
    return key if isinstance(key, bytes) else None


_classes: dict[str, type[SmartnodesError]] = {}


def _class_of(code: str) -> type[SmartnodesError] | None:
    if code not in _classes:
        _collect(SmartnodesError)  # again on a miss: a network's own classes may have been imported since
    return _classes.get(code)


def _collect(parent: type[SmartnodesError]) -> None:
    if "code" in parent.__dict__:  # an inherited code names the class that declared it
        _classes.setdefault(parent.code, parent)
    for child in parent.__subclasses__():
        _collect(child)
