"""The computing process of a rig: `python -m tensorlink.compute`, started by `smartnodes_core/sandbox.py`.

It has torch, and neither keys nor sockets (`smartnodes_core/confinement/`). One thread takes messages and computes,
one reads the pipe, one (`later.py`) hashes what was computed when there is time; a rig of several devices has one for
each besides (`tensor_parallel/`). Everything in a message is distrusted: it comes from peers by way of the node.
Neighbours: `compute_stages.py` serves stages (the protocol is written there), `audit/examine.py` re-executes others'
work.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from smartnodes_core.errors import ProtocolError, SmartnodesError
from smartnodes_core.sandbox_child import ChildChannel, Incoming
from smartnodes_core.usage import USAGE
from tensorlink.allocator import keep_freed_memory
from tensorlink.compute_errors import translated

if TYPE_CHECKING:
    from tensorlink.compute_stages import Stages
    from tensorlink.tensor_parallel.ranks import Ranks

#: Hashing begins after an action that took this long, or when there has been nothing to do for this long: beside short
#: actions, and while an answer is on its way, it would be in the way.
SHORT_S = 0.001

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
            "usage": lambda params: USAGE.read(),
            "examine": self._examine,
            "warm_up": self._warm_up,
        }

    def run(self) -> None:
        """Until the node closes the pipe, which ends the process."""
        busy_s = time.monotonic()
        while True:
            began_s = time.monotonic()
            with self._channel.deadline():
                worked = self._stages.run_one()
            message = self._channel.receive(0 if worked else self._patience_s())
            now_s = time.monotonic()
            if now_s - (began_s if worked else busy_s) >= SHORT_S and message is None:
                self._stages.begin_hashing()
            while message is not None:
                with self._channel.deadline():
                    self.serve(message)
                message = self._channel.receive(0)
                worked = True
            self._stages.tend_prepares()
            if worked:
                busy_s = time.monotonic()

    def _patience_s(self) -> float | None:
        patience_s = self._stages.patience_s()
        if not self._stages.has_hashing:
            return patience_s
        return SHORT_S if patience_s is None else min(SHORT_S, patience_s)

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
        from tensorlink.compute_stages import MAX_STAGE_FLOPS
        from tensorlink.program.admission import Bounds

        ranks = self._stages.ranks
        if ranks is None:
            flops_per_s = measure.flops_per_s()
        else:
            flops_per_s = sum(ranks.each(lambda group: measure.flops_per_s(group.device)))
        memory_bytes = measure.memory_bytes(self._channel.limits.memory_bytes)
        action_s = self._channel.limits.action_s or math.inf
        self._stages.bounds = self._examiner.bounds = Bounds(
            memory_bytes, int(min(flops_per_s * action_s, MAX_STAGE_FLOPS))
        )
        return {
            "flops_per_s": flops_per_s,
            "memory_bytes": memory_bytes,
            "confinement": self._channel.confinement.applied,
            "unconfined": self._channel.confinement.missing,
            "numeric_class": measure.numeric_class() + ("" if ranks is None else f" on {ranks}"),
            "num_threads": torch.get_num_threads(),
        }

    def _warm_up(self, params: dict[str, Any]) -> dict[str, Any]:
        """Imports what torch would import with the first program, over a second: one that has to be taken over from a
        lost rig does not wait for it."""
        import torch._dynamo  # noqa: F401

        return {}

    def _examine(self, params: dict[str, Any]) -> dict[str, Any]:
        offset = int(params["offset"])
        if self._examiner.bounds is None:
            self._measure({})
        try:
            return self._examiner.examine(params, self._channel.inbound.view(offset, int(params["num_bytes"])))
        finally:
            self._channel.release(offset)


def main(make_stages: Callable[[ChildChannel], Stages] | None = None) -> None:
    """Entry point; `make_stages` lets tests serve stages that cheat."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    channel = ChildChannel.open()
    keep_freed_memory()
    # torch makes this folder where it is missing, and there is none that could be made
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/"
    # torch comes after privileges and limits are set: its threads inherit them
    import torch

    from tensorlink.compute_stages import Stages

    torch.set_num_threads(channel.limits.num_threads)
    stages = (make_stages or Stages)(channel)
    stages.ranks = _join_ranks(channel)
    Compute(channel, stages).run()


def _join_ranks(channel: ChildChannel) -> Ranks | None:
    """A rank for each device, connected; nothing can be connected afterwards. None where one CPU rank is all."""
    limits = channel.limits
    if limits.num_devices == 1 and limits.device == "cpu":
        return None
    from tensorlink.tensor_parallel.ranks import Ranks, quiet_nccl

    quiet_nccl()
    ranks = Ranks(limits.num_devices, limits.device, _end)
    if limits.num_devices > 1:
        channel.seal()
    return ranks


def _end(reason: str) -> NoReturn:
    """The ranks cannot go on together: this process ends, and its node starts another."""
    sys.stderr.write(f"{reason}\n")
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
