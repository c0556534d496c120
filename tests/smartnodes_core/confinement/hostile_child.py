"""A computing process whose code is hostile: it tries what it is told and says what came of it."""

import os
import socket
from pathlib import Path

import attacks

from smartnodes_core.sandbox_child import ChildChannel


def connect_to_itself(channel):
    """As ranks do before they are sealed: a connection, and a socket that still listens."""
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    late = socket.socket()  # made in time, and not connected
    channel.seal()
    return near, far, listener, late


def uses(held):
    """What comes of using what was made in time."""
    _, _, listener, late = held
    there = listener.getsockname()
    return {
        "accept": refused(listener.accept),
        "connect": refused(lambda: late.connect(there)),
        "bind": refused(lambda: late.bind(there)),
    }


def refused(act):
    try:
        act()
    except OSError as error:
        return str(error)
    return ""


def main():
    channel = ChildChannel.open()
    held = connect_to_itself(channel) if channel.limits.num_devices > 1 else None
    while True:
        message = channel.receive()
        if message is None:
            continue
        if message.method == "attack":
            channel.reply(message.call_id, attacks.outcomes(message.params["folder"], os.getppid()))
        elif message.method == "work":
            channel.reply(message.call_id, {"works": attacks.works()})
        elif message.method == "status":
            status = Path("/proc/self/status").read_text()
            channel.reply(
                message.call_id,
                {
                    "status": dict(line.split(":\t") for line in status.splitlines()),
                    "applied": channel.confinement.applied,
                    "missing": channel.confinement.missing,
                },
            )
        elif message.method == "talk":
            held[0].sendall(b"x")
            channel.reply(message.call_id, {"came": held[1].recv(1).decode()})
        elif message.method == "use":
            channel.reply(message.call_id, uses(held))
        elif message.method == "spin":
            with channel.deadline():
                while True:
                    pass


main()
