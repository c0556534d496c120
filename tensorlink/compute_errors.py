"""Foreign exceptions of the computing process as ours, in this one place."""

from __future__ import annotations

import logging

from smartnodes_core.errors import ProtocolError, SandboxError, SmartnodesError

logger = logging.getLogger(__name__)


def translated(error: Exception) -> SmartnodesError:
    """What the node is told of `error`: ours as they are, a malformed message as the peer's fault, the rest as this
    process's."""
    if isinstance(error, SmartnodesError) and "allocate memory" not in str(error):
        return error
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return SandboxError(
            f"out of memory: {str(error)[:300]}; raise memory_bytes, or use more stages or micro-batches"
        )
    if isinstance(error, KeyError | TypeError | ValueError | OverflowError):
        logger.info("malformed message", exc_info=True)
        return ProtocolError(f"a malformed message: {type(error).__name__}: {str(error)[:300]}")
    logger.error("unexpected error", exc_info=True)
    return SandboxError(f"{type(error).__name__}: {str(error)[:300]}")
