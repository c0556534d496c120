"""The TLS handshake of one connection and the checks that follow it: before the first frame, within one deadline."""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from OpenSSL import SSL, crypto

from smartnodes_core.errors import ConnectionLostError, DeadlineError, ProtocolError, SmartnodesError
from smartnodes_core.transport.base import LINGER_S, Admit, FrameSink, Peer
from smartnodes_core.transport.certificate import Expectations, check_certificate, check_expected, read_certificate
from smartnodes_core.transport.welcome import check_welcome, refusal, refused_before, welcome
from smartnodes_core.wire import Frame, FrameReader

logger = logging.getLogger(__name__)

#: Names of the two kinds of connection in the handshake (ALPN); a dialler that names none means the first.
ALPN_CALLS, ALPN_BULK = b"smartnodes/1", b"smartnodes-bulk/1"


@dataclass(frozen=True)
class Terms:
    """What a connection's handshake is checked against."""

    sink: FrameSink
    admit: Admit
    expectations: Expectations | None
    expected_node_key: bytes | None
    deadline_s: float  # of the monotonic clock, for the whole handshake
    bulk: bool | None = None  # the kind that was dialled; None: whichever the dialler asks for
    introduced: bool = False  # came about by introduction, so that no other can be dialled beside it


class Handshake:
    """Runs on the connection's owner thread, on its non-blocking socket; `cancelled` tells when to give up."""

    def __init__(
        self,
        tcp: socket.socket,
        tls: SSL.Connection,
        poll: select.poll,
        terms: Terms,
        endpoint: str,
        cancelled: Callable[[], bool],
    ) -> None:
        self._tcp, self._tls, self._poll = tcp, tls, poll
        self._terms, self._endpoint, self._cancelled = terms, endpoint, cancelled

    def run(self, reader: FrameReader) -> Peer:
        """The peer, verified and admitted, once it has admitted us too. `reader` is where its first frame is decoded.

        Raises AuthorityError, SignatureError, RecordError, ProtocolError, DeadlineError, or as TLS and the socket do.
        """
        self._repeat(self._tls.do_handshake)
        bulk = self._tls.get_alpn_proto_negotiated() == ALPN_BULK
        if self._terms.bulk not in (None, bulk):
            raise ProtocolError(f"{self._endpoint} makes no bulk connections: it has to be updated")
        shown = self._tls.get_peer_certificate()
        if shown is None:
            raise ProtocolError(f"{self._endpoint} showed no certificate")
        try:
            certificate = read_certificate(crypto.dump_certificate(crypto.FILETYPE_ASN1, shown))
            peer = check_certificate(certificate, self._terms.expectations, self._endpoint, bulk=bulk)
            check_expected(peer, self._terms.expected_node_key)
            self._terms.admit(peer)
        except SmartnodesError as error:
            self._refuse(error)
            raise
        self._write_all(welcome())
        try:
            frame = self._read_frame(reader)
        except (SSL.ZeroReturnError, SSL.SysCallError):
            raise refused_before(peer) from None
        check_welcome(frame.header, peer)
        if bulk and self._tls.pending():
            raise ProtocolError(f"{peer} sent frames of a bulk connection unsealed")
        return peer

    def _refuse(self, error: SmartnodesError) -> None:
        """Tells the peer why, then waits a moment for it to hang up, lest a reset overtake the message."""
        try:
            self._write_all(refusal(error))
            self._tls.shutdown()
            self._tcp.shutdown(socket.SHUT_WR)
            self._poll.modify(self._tcp, select.POLLIN)
            deadline_s = min(self._terms.deadline_s, time.monotonic() + LINGER_S)
            while (left_s := deadline_s - time.monotonic()) > 0 and not self._cancelled():
                if self._poll.poll(left_s * 1000) and not self._tcp.recv(4096):
                    return
        except (OSError, SSL.Error, DeadlineError, ConnectionLostError) as failed:
            logger.debug("%s did not wait to be refused: %s", self._endpoint, failed)

    def _repeat(self, step: Callable[[], Any]) -> Any:
        """The result of a non-blocking TLS operation, repeated whenever the socket is ready, until the deadline."""
        while True:
            if self._cancelled():
                raise ConnectionLostError(f"{self._endpoint}: closed during the handshake")
            try:
                return step()
            except SSL.WantReadError:
                events = select.POLLIN
            except SSL.WantWriteError:
                events = select.POLLOUT
            self._poll.modify(self._tcp, events)
            left_s = self._terms.deadline_s - time.monotonic()
            if left_s <= 0 or not self._poll.poll(left_s * 1000):
                raise DeadlineError(f"{self._endpoint} did not finish its handshake in time")

    def _write_all(self, data: bytes) -> None:
        self._repeat(lambda: self._tls.send(data))  # without partial writes: all or again

    def _read_frame(self, reader: FrameReader) -> Frame:
        while True:
            count = self._repeat(lambda: self._tls.recv_into(reader.target()))
            frame = reader.advance(count)
            if frame is not None:
                return frame
