"""A worker, a validator or a user whose hashes are a constant, who neither signs nor checks signatures, and whose
frames cross in the clear: what a step costs then, beside the real one, is what protection costs.

    python benchmarks/yardstick/unprotected.py worker|validator [flags of the real one]

All else is the real code. The handshake is TLS's, so that both ends are who they were; the socket is plain after it.
Only the benchmark can do this: the product has no such switch.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from OpenSSL import SSL

ROLES = ("worker", "validator")


def main() -> object:
    """A node; the worker starts this file again as `compute`, its computing process."""
    role, *flags = sys.argv[1:]
    if role == "compute":
        return _compute()
    import tensorlink.cli.validator
    from yardstick.rig import run_worker

    hash_nothing()
    sign_and_encrypt_nothing()
    if role == "worker":
        return run_worker((sys.executable, str(Path(__file__).resolve()), "compute"), flags)
    return tensorlink.cli.validator.main(flags)


def _compute() -> None:
    from tensorlink.compute import main
    from tensorlink.compute_stages import Stages

    def make_stages(channel: Any) -> Stages:
        hash_nothing()
        return Stages(channel)

    main(make_stages)


def hash_nothing() -> None:
    """Every digest of a tensor and every root over digests is 32 zero bytes, in the modules loaded so far."""
    from smartnodes_core.records import NO_DIGEST
    from tensorlink import records

    digests = sys.modules.get("tensorlink.steplog.digests")  # where there is torch
    for real in (
        records.streamed_digest,
        records.tensor_digest,
        records.set_root,
        *([digests.digest] if digests else []),
    ):
        _replace(real, lambda *args: NO_DIGEST)


def sign_and_encrypt_nothing() -> None:
    """Signatures are zeros and pass; connections, once both ends are admitted, are plain. In the modules loaded so
    far."""
    from smartnodes_core import identity
    from smartnodes_core.transport import tls
    from smartnodes_core.transport.tls_connection import TlsConnection

    class PlainConnection(TlsConnection):
        def _pump(self) -> None:
            self._stream = _Plain(self._tcp)  # type: ignore[assignment]
            super()._pump()

    identity.Identity.sign_bytes = lambda self, domain, data: bytes(64)  # type: ignore[method-assign]
    _replace(identity.verify_bytes, lambda *args: None)
    tls.TlsConnection = PlainConnection  # type: ignore[misc]


class _Plain:
    """What a connection asks of TLS, or of a sealed stream, from its socket; reads as much as there is."""

    def __init__(self, tcp: socket.socket):
        self._tcp = tcp

    def recv_into(self, buffer: memoryview, _num_bytes: int) -> int:
        try:
            count = self._tcp.recv_into(buffer)
        except BlockingIOError:
            raise SSL.WantReadError from None
        if not count:
            raise SSL.ZeroReturnError
        return count

    def send(self, data: memoryview) -> int:
        try:
            return self._tcp.send(data)
        except BlockingIOError:
            raise SSL.WantWriteError from None

    def shutdown(self) -> None:
        """The socket is closed next: that is goodbye enough."""


def _replace(real: Callable[..., Any], stand_in: Callable[..., Any]) -> None:
    """Wherever a loaded module of ours knows `real` by its own name."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("smartnodes_core", "tensorlink")) and getattr(module, real.__name__, None) is real:
            setattr(module, real.__name__, stand_in)


if __name__ == "__main__":
    sys.exit(main())
