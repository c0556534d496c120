"""The computing process of a rig: `python -m tensorlink.compute`, started by `smartnodes_core/sandbox.py`.

It has torch, and neither keys nor sockets. One thread takes messages and computes, one reads the pipe, one hashes
what was computed. Everything in a message is distrusted: it comes from peers by way of the node. Neighbours:
`compute_stages.py` serves stages (the protocol is written there), `audit/examine.py` re-executes others' work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from smartnodes_core.errors import ProtocolError, SmartnodesError
from smartnodes_core.sandbox_child import ChildChannel, Incoming
from tensorlink.allocator import keep_freed_memory
from tensorlink.compute_errors import translated

if TYPE_CHECKING:
    from tensorlink.compute_stages import Stages

Serve = Callable[[dict[str, Any]], dict[str, Any]]


class Compute:
    """The main loop: messages first, then one action of some stage, and again; it sleeps where there is neither."""

    def __init__(self, channel: ChildChannel, stages: Stages) -> None:
        from tensorlink.audit.examine import Examiner

        self._channel = channel
        self._stages = stages
        self._examiner = Examiner()
        self._serve: dict[str, Serve] = {
            **stages.methods,
            "measure": self._measure,
            "examine": self._examine,
        }

    def run(self) -> None:
        """Until the node closes the pipe, which ends the process."""
        while True:
            worked = self._stages.run_one()
            message = self._channel.receive(0 if worked else None)
            while message is not None:
                self.serve(message)
                message = self._channel.receive(0)

    def serve(self, message: Incoming) -> None:
        """Serves one message; whatever goes wrong is answered, or told as the event `failed`."""
        try:
            if message.method == "prepare":
                self._stages.prepare(message.call_id, message.params)  # answers when all micro-batches are in
                return
            if message.method == "decide":
                self._stages.decide(message.call_id, message.params)  # answers before it hashes
                return
            method = self._serve.get(message.method)
            if method is None:
                raise ProtocolError(f"the computing process has no method {message.method[:64]!r}")
            self._channel.reply(message.call_id, method(message.params))
        except Exception as error:
            self._report(message, translated(error))

    def _report(self, message: Incoming, error: SmartnodesError) -> None:
        if message.call_id:
            self._channel.fail(message.call_id, error)
        else:
            self._stages.fail(str(message.params.get("key", "")), error)

    def _measure(self, params: dict[str, Any]) -> dict[str, Any]:
        import torch

        from tensorlink import measure

        return {
            "flops_per_s": measure.flops_per_s(),
            "memory_bytes": measure.memory_bytes(self._channel.limits.memory_bytes),
            "numeric_class": measure.numeric_class(),
            "num_threads": torch.get_num_threads(),
        }

    def _examine(self, params: dict[str, Any]) -> dict[str, Any]:
        offset = int(params["offset"])
        try:
            return self._examiner.examine(params, self._channel.inbound.view(offset, int(params["num_bytes"])))
        finally:
            self._channel.release(offset)


def main(make_stages: Callable[[ChildChannel], Stages] | None = None) -> None:
    """Entry point; `make_stages` lets tests serve stages that cheat."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    channel = ChildChannel.open()
    keep_freed_memory()
    # torch comes after privileges and limits are set: its threads inherit them
    import torch

    from tensorlink.compute_stages import Stages

    torch.set_num_threads(channel.limits.num_threads)
    Compute(channel, (make_stages or Stages)(channel)).run()


if __name__ == "__main__":
    main()
