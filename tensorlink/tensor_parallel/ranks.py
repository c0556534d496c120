"""The ranks of a rig: a thread for each device, joined in a process group, all doing the same work at the same time.

Who gives work waits for all of it. A rank that fails where the others do not has left them waiting in a collective or
about to wait in the wrong one: nothing can be computed any more, and the process is to end, as it would with a device.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NoReturn, TypeVar

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from tensorlink.tensor_parallel.group import COLLECTIVE_TIMEOUT_S, Group

T = TypeVar("T")

#: What fails on all ranks fails at the same place, within about this time.
GRACE_S = 5.0


def quiet_nccl() -> None:
    """NCCL connects over the process's own loopback, at once, and makes no files: later it could do neither."""
    os.environ.update(NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1", NCCL_SHM_DISABLE="1", NCCL_RUNTIME_CONNECT="0")


class Ranks:
    """`num_devices` threads, of `device` "cpu" or "cuda".

    `on_lost(reason)` is called, and does not return, when the ranks can no longer work together. `lock` is for what
    only one rank at a time may do.
    """

    def __init__(
        self,
        num_devices: int,
        device: str,
        on_lost: Callable[[str], NoReturn],
        timeout_s: float = COLLECTIVE_TIMEOUT_S,
    ) -> None:
        self.lock = threading.Lock()
        self._on_lost = on_lost
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"rank-{rank}") for rank in range(num_devices)]
        store = HashStore()

        def join(rank: int) -> Group:
            place = torch.device("cpu") if device == "cpu" else torch.device(device, rank)
            if device != "cpu":
                torch.cuda.set_device(place)
            return Group(rank, num_devices, store, place, timeout_s)

        joining = [thread.submit(join, rank) for rank, thread in enumerate(self._threads)]
        self.groups = [future.result() for future in joining]

    def __repr__(self) -> str:
        return f"Ranks({', '.join(str(group.device) for group in self.groups)})"

    @property
    def num_devices(self) -> int:
        """How many ranks there are."""
        return len(self.groups)

    def each(self, work: Callable[[Group], T]) -> list[T]:
        """What `work` gives on each rank, in their order. Raises what it raises on all of them."""
        grad = torch.is_grad_enabled()

        def run(group: Group) -> T:
            with torch.set_grad_enabled(grad):
                return work(group)

        futures = [thread.submit(run, group) for thread, group in zip(self._threads, self.groups, strict=True)]
        failed = [error for future in self._ended(futures) if (error := future.exception()) is not None]
        if not failed:
            return [future.result() for future in futures]
        broken = any(group.broken for group in self.groups)
        if broken or len(failed) < len(futures) or len({type(error) for error in failed}) > 1:
            self._on_lost(f"a rank was lost: {type(failed[0]).__name__}: {str(failed[0])[:300]}")
        raise failed[0]

    def _ended(self, futures: list[Future[T]]) -> list[Future[T]]:
        """All futures, done; those that failed where others are still busy after a while."""
        done, waiting = wait(futures, return_when="FIRST_EXCEPTION")
        if waiting:
            _, waiting = wait(waiting, GRACE_S)
        return futures if not waiting else [future for future in done if future.exception() is not None]

    def stop(self) -> None:
        """Ends the threads."""
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(RuntimeError):
            for group in self.groups:
                group.close()
