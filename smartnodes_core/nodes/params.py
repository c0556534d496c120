"""A peer's parameters as their types: each `rpc_…` method reads them with these in its first lines.

What a peer sends is any plain data at all, or nothing; `bytes(10**12)` of an integer would allocate it. Every function
raises ProtocolError that names the parameter.
"""

from __future__ import annotations

from typing import Any

from smartnodes_core.errors import ProtocolError
from smartnodes_core.records import MAX_RECORD_BYTES

MAX_TEXT_CHARS = 256


def bytes_in(params: dict[str, Any], name: str, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """The bytes under `name`, at most `max_bytes`."""
    value = params.get(name)
    if not isinstance(value, bytes) or len(value) > max_bytes:
        raise ProtocolError(f"{name}: at most {max_bytes} bytes are needed, found {_shown(value)}")
    return value


def digest_in(params: dict[str, Any], name: str) -> bytes:
    """The 32 bytes under `name`."""
    value = params.get(name)
    if not isinstance(value, bytes) or len(value) != 32:
        raise ProtocolError(f"{name}: a digest of 32 bytes is needed, found {_shown(value)}")
    return value


def text_in(params: dict[str, Any], name: str, default: str | None = None, max_chars: int = MAX_TEXT_CHARS) -> str:
    """The text under `name`, at most `max_chars` long; `default`, where one is given, if there is none."""
    value = params.get(name, default)
    if not isinstance(value, str) or len(value) > max_chars:
        raise ProtocolError(f"{name}: text of at most {max_chars} characters is needed, found {_shown(value)}")
    return value


def map_in(params: dict[str, Any], name: str) -> dict[str, Any]:
    """The map under `name`, which the caller may change."""
    value = params.get(name)
    if not isinstance(value, dict):
        raise ProtocolError(f"{name}: a map is needed, found {_shown(value)}")
    return dict(value)


def count_in(params: dict[str, Any], name: str, most: int) -> int:
    """The whole number under `name`, from 0 to `most`."""
    value = params.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise ProtocolError(f"{name}: a number from 0 to {most} is needed, found {_shown(value)}")
    return value


def counts_in(params: dict[str, Any], name: str, max_items: int, most: int) -> list[int]:
    """The list of whole numbers from 0 to `most` under `name`, at most `max_items` of them."""
    value = params.get(name)
    if not isinstance(value, list) or len(value) > max_items:
        raise ProtocolError(f"{name}: a list of at most {max_items} numbers is needed, found {_shown(value)}")
    return [count_in({name: item}, name, most) for item in value]


def bytes_list_in(params: dict[str, Any], name: str, max_items: int) -> list[bytes]:
    """The list of byte strings under `name`, at most `max_items` of them."""
    value = params.get(name)
    if not isinstance(value, list) or len(value) > max_items or not all(isinstance(item, bytes) for item in value):
        raise ProtocolError(f"{name}: a list of at most {max_items} byte strings is needed, found {_shown(value)}")
    return value


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    size = f" of {len(value)}" if isinstance(value, bytes | str | list | dict) else ""
    return type(value).__name__ + size
