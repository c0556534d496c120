"""Which version of each message a node speaks: of what a method takes and answers, of what a stream's header holds.

A version is (major, minor) in the frame's field `version`; a frame without one is of (1, 0), and so is every message
that nothing else is declared of. A minor version adds fields, which who does not know them ignores. A major version
changes what is there: one that is not spoken is refused with both versions named, before a body is read. Signed records
have versions of their own (`records.py`), the transport too (`transport/welcome.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from smartnodes_core.errors import ProtocolError, VersionError
from smartnodes_core.transport.base import Peer
from smartnodes_core.wire import Header

MAX_NUMBER = 1 << 16


class Version(NamedTuple):
    """Of one message."""

    major: int
    minor: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


FIRST = Version(1)


def stream_of(topic: str) -> str:
    """The name under which the version of a stream is declared, beside methods of the same name."""
    return f"stream {topic}"


class Versions:
    """What one node speaks. Declare before anything is sent."""

    def __init__(self) -> None:
        self._spoken: dict[str, tuple[Version, int]] = {}

    def declare(self, message: str, version: Version, oldest_major: int | None = None) -> None:
        """Speak `version` of a message, and understand major versions from `oldest_major` on (None: that one alone)."""
        oldest = version.major if oldest_major is None else oldest_major
        if not 1 <= oldest <= version.major < MAX_NUMBER or not 0 <= version.minor < MAX_NUMBER:
            raise ValueError(f"{message}: version {version}, understood from {oldest} on, is none")
        self._spoken[message] = (version, oldest)

    def of(self, message: str) -> Version:
        """What this node sends."""
        return self._spoken.get(message, (FIRST, 1))[0]

    def answering(self, message: str, asked: Version) -> Version:
        """What this node answers who asked in version `asked`: never of another major version."""
        spoken = self.of(message)
        return spoken if spoken.major == asked.major else asked

    def check(self, peer: Peer, message: str, header: Header) -> Version:
        """The version of what `peer` sent. Raises VersionError where it is not spoken here, ProtocolError for none."""
        found = _version_in(peer, message, header.get("version", FIRST))
        spoken, oldest = self._spoken.get(message, (FIRST, 1))
        if not oldest <= found.major <= spoken.major:
            since = f" and versions from {oldest}.0 on" if oldest < spoken.major else ""
            raise VersionError(
                f"{peer} speaks version {found} of {message}, here is {spoken}{since}: update the older of the two"
            )
        return found


def _version_in(peer: Peer, message: str, value: Any) -> Version:
    whole = isinstance(value, list | tuple) and len(value) == 2 and all(type(number) is int for number in value)
    if not whole or not 0 <= min(value) <= max(value) < MAX_NUMBER:
        raise ProtocolError(f"{peer} sent {message} of no version: two small numbers, [major, minor], are needed")
    return Version(*value)
