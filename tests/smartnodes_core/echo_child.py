"""A computing process without torch, for the tests of the sandbox: answers, fails, crashes and hangs as it is told."""

import os
import resource
import sys
from pathlib import Path

from smartnodes_core.errors import AuditError
from smartnodes_core.sandbox_child import ChildChannel


def serve(channel, message):
    method, params = message.method, message.params
    if method == "echo":
        channel.reply(message.call_id, params)
    elif method == "sum":
        data = channel.inbound.view(params["offset"], params["num_bytes"])
        channel.release(params["offset"])
        channel.reply(message.call_id, {"sum": sum(data)})
    elif method == "fill":
        piece = channel.outbound.allocate(params["num_bytes"], 10.0)
        piece.view[:] = b"x" * params["num_bytes"]
        channel.reply(message.call_id, {"offset": piece.offset})
    elif method == "fail":
        channel.fail(message.call_id, AuditError("not that one"))
    elif method == "tell":
        channel.event("told", params)
    elif method == "exit":
        sys.stderr.write("the last words\n")
        sys.exit(3)
    elif method == "grow":
        bytearray(params["num_bytes"])
        channel.reply(message.call_id, {})
    elif method == "scratch":
        os.pwrite(channel.scratch, params["data"], params["offset"])
        channel.reply(message.call_id, {"data": os.pread(channel.scratch, len(params["data"]), params["offset"])})
    elif method == "torn":
        channel._pipe._socket.sendall(b"\xff\xff\xff\xff")
    elif method == "inspect":
        fds = [int(fd) for fd in os.listdir("/proc/self/fd")] if os.path.isdir("/proc/self/fd") else []
        status = Path("/proc/self/status").read_text() if fds else ""
        channel.reply(
            message.call_id,
            {
                "environment": dict(os.environ),
                "num_fds": len(fds),
                "no_new_privs": "NoNewPrivs:\t1" in status,
                "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
                "nice": os.getpriority(os.PRIO_PROCESS, 0),
            },
        )


def main():
    channel = ChildChannel.open()
    while True:
        message = channel.receive()
        if message is not None and message.method != "hang":
            serve(channel, message)


main()
