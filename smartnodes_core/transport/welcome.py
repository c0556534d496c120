"""The first frame in each direction: the sender has verified and admitted the other side, or says why not.

It belongs to the transport: no sink sees it, and none sees anything before it was exchanged.
"""

from __future__ import annotations

from smartnodes_core.errors import AuthorityError, ProtocolError, SmartnodesError
from smartnodes_core.remote_errors import from_wire, to_wire
from smartnodes_core.transport.base import Peer
from smartnodes_core.wire import Header, encode_prefix_and_header

TRANSPORT_VERSION = 1


def welcome() -> bytes:
    """The frame that says: admitted."""
    return encode_prefix_and_header({"transport": TRANSPORT_VERSION}, 0)


def refusal(error: SmartnodesError) -> bytes:
    """The frame that says: refused, and why."""
    return encode_prefix_and_header({"transport": TRANSPORT_VERSION, "refused": to_wire(error)}, 0)


def check_welcome(header: Header, peer: Peer) -> None:
    """Raises the error with which `peer` refused us, or ProtocolError for anything but a welcome."""
    version = header.get("transport")
    if not isinstance(version, int) or isinstance(version, bool):
        raise ProtocolError(f"{peer} sent something else before it had admitted us")
    refused = header.get("refused")
    if refused is not None:
        fields = refused if isinstance(refused, dict) else {}
        raise from_wire(fields, f"{peer} at {peer.endpoint} refused us", peer.node_key)
    if version != TRANSPORT_VERSION:
        raise ProtocolError(
            f"{peer} speaks transport version {version}, here is {TRANSPORT_VERSION}: update the older one"
        )


def no_body(header: Header, num_bytes: int) -> memoryview:
    """The `allocate` of the first frame, which has no body."""
    if num_bytes:
        raise ProtocolError(f"a first frame with a body of {num_bytes} bytes")
    return memoryview(bytearray())


def refused_before(peer: Peer) -> AuthorityError:
    """For a peer that hung up before it admitted us and gave no reason."""
    return AuthorityError(f"{peer} at {peer.endpoint} ended the connection without admitting us")
