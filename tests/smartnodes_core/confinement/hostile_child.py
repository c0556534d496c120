"""A computing process whose code is hostile: it tries what it is told and says what came of it."""

import os
from pathlib import Path

import attacks

from smartnodes_core.sandbox_child import ChildChannel


def main():
    channel = ChildChannel.open()
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
        elif message.method == "spin":
            with channel.deadline():
                while True:
                    pass


main()
