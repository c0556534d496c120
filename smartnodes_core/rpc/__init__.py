"""Calls with ids and deadlines, one-way notifications, and streams of tensors, over a transport's connections.

`endpoint.py` is the whole of it in one class; `serving.py` says what peers may call, `inbound.py` runs it,
`pending.py` keeps the calls that wait for replies, `pace.py` how long they took, `uses.py` which connections nobody
needs, `versions.py` which messages are understood, `striping.py` tensors that cross over several connections, `pool.py`
the threads.
"""

from smartnodes_core.rpc.endpoint import MAX_REPLY_BODY_BYTES, CallOptions, RpcEndpoint
from smartnodes_core.rpc.inbound import called_version, is_cancelled
from smartnodes_core.rpc.pending import PendingCall, Reply
from smartnodes_core.rpc.serving import DEFAULT_MAX_BODY_BYTES, Handler, Result, allow
from smartnodes_core.rpc.versions import Version

__all__ = [
    "DEFAULT_MAX_BODY_BYTES",
    "MAX_REPLY_BODY_BYTES",
    "CallOptions",
    "Handler",
    "PendingCall",
    "Reply",
    "Result",
    "RpcEndpoint",
    "Version",
    "allow",
    "called_version",
    "is_cancelled",
]
