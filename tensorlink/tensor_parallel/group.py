"""The ranks of one rig as a process group of torch's, each a thread of the computing process, and its collectives.

Threads, not processes: one confinement, one memory limit and one end for all of them, and groups that are formed over
a store in memory. Gloo connects CPU ranks over the loopback of the process's own network namespace, NCCL GPU ranks;
both connect when the group is made, and no socket can be opened afterwards (`smartnodes_core/confinement/`). The
functions that change between whole and split values are Megatron's f and g (Shoeybi et al., 2019, arXiv:1909.08053),
with their counterparts for gathering. Neighbours: `ranks.py` (the threads), `shard_interpreter.py` (calls these).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import HashStore, ProcessGroupGloo  # type: ignore[attr-defined]

from tensorlink.tensor_parallel.split import Split

#: Ranks do the same work at the same time: one that keeps the others waiting longer than this is lost.
COLLECTIVE_TIMEOUT_S = 60.0
LOOPBACK = "127.0.0.1"


class Group:
    """One rank's end of the group; a rank that is alone connects to nobody.

    All methods are called from that rank's thread, in the same order on all ranks.
    """

    def __init__(
        self, rank: int, size: int, store: HashStore, device: torch.device, timeout_s: float = COLLECTIVE_TIMEOUT_S
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        #: A collective failed: the ranks may no longer agree on which comes next, and the group is of no more use.
        self.broken = False
        self._timeout = datetime.timedelta(seconds=timeout_s)
        if size == 1:
            return
        make = self._gloo if device.type == "cpu" else self._nccl
        self._backend = make(store)
        self.all_reduce(torch.zeros(1, device=device))  # backends that connect late connect here
        self.all_gather(torch.zeros(1, device=device))

    def _gloo(self, store: HashStore) -> Any:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._threads, options._timeout = 1, self._timeout
        return ProcessGroupGloo(store, self.rank, self.size, options)

    def _nccl(self, store: HashStore) -> Any:
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        return ProcessGroupNCCL(store, self.rank, self.size, options)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; `tensor` itself is overwritten."""
        return self._wait(lambda: self._backend.allreduce([tensor]), tensor)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """What each rank gave, in their order; a contiguous tensor of the same shape on each."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        return self._wait(lambda: self._backend.allgather([parts], [tensor]), parts)

    def _wait(self, begin: Callable[[], Any], result: Any) -> Any:
        try:
            begin().wait()
        except RuntimeError:
            self.broken = True
            raise
        return result

    def close(self) -> None:
        """Leaves the group."""
        if self.size > 1:
            self._backend.shutdown()

    def gather(self, tensor: Tensor, split: Split) -> Tensor:
        """The whole of a tensor that is split over the ranks."""
        return split.whole(self.all_gather(tensor.contiguous()))

    def part(self, tensor: Tensor, split: Split) -> Tensor:
        """This rank's part of a whole tensor, contiguous."""
        return split.part(tensor, self.rank, self.size)


class Enter(torch.autograd.Function):
    """Megatron's f: a whole value enters what is split; its gradient is the sum of what each rank found."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.group.all_reduce(gradient.clone(memory_format=torch.contiguous_format)), None


class Reduce(torch.autograd.Function):
    """Megatron's g: the sum of what each rank found; its gradient is whole on each."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        return group.all_reduce(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class Gather(torch.autograd.Function):
    """A split value made whole; each rank takes its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, split: Split) -> Tensor:
        ctx.group, ctx.split = group, split
        return group.gather(tensor, split)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.group.part(gradient, ctx.split), None, None


class Take(torch.autograd.Function):
    """A rank's part of a whole value; the parts of the gradient are gathered."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, split: Split) -> Tensor:
        ctx.group, ctx.split = group, split
        return group.part(tensor, split)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.group.gather(gradient, ctx.split), None, None


__all__ = ["COLLECTIVE_TIMEOUT_S", "Enter", "Gather", "Group", "Reduce", "Take"]
