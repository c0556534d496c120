"""The same training in one plain process: the oracle.

`Reference` computes what `DistributedModel` computes, with plain torch: the same micro-batches, forwards in order,
and gradients added in the order of `(call, micro_batch)`. Without dropout it runs the module itself; with dropout,
the uncut program with the masks that the stages draw. Losses and gradients of a distributed run on the same thread
count are bitwise equal to these. Where a parameter is tied over a cut, its gradients are added stage by stage: tell
the reference the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tensorlink.pipeline.batching import (
    LossReduction,
    bind_batch,
    check_outputs,
    divided,
    flat_inputs,
    joined,
    loss_weights,
    split_targets,
)
from tensorlink.pipeline.batching import micro_batches as split_into
from tensorlink.pipeline.seeds import seed_for
from tensorlink.plain_stages import PlainStages
from tensorlink.program import autocast as autocasts
from tensorlink.program.alignment import aligned
from tensorlink.program.graph import StageProgram
from tensorlink.program.inputs import flatten_inputs, unflatten_outputs
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.trace import TracedModel, trace

CPU = torch.device("cpu")


class Reference(torch.nn.Module):
    """`module` trained in this process as the network would train it; its own parameters hold weights and gradients.

    Use any torch optimizer on `module.parameters()`; call `end_step()` after each of its steps, so that dropout masks
    follow the same numbering as in the network (`train_step` does both). `stages` are the programs of a partition
    (`DistributedModel.programs`): gradients of tied parameters are then sums over each stage, added in stage order.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        micro_batches: int = 8,
        example_inputs: tuple[Any, ...] | dict[str, Any],
        seed: int = 0,
        stages: Sequence[StageProgram] = (),
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        self.module = module
        self.traced: TracedModel = trace(module, example_inputs, autocast=autocast)
        check_outputs(self.traced, micro_batches)
        self._autocast = autocasts.name_of(autocast)
        self._micro_batches = micro_batches
        self._by_keyword = isinstance(example_inputs, dict)
        self._seed = seed
        self._step_index = self._num_calls = 0
        if not stages and self._draws_masks(example_inputs):
            stages = [self.traced.whole()]
        self._stages = PlainStages(self.traced, stages) if stages else None
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output for a batch, one micro-batch after the other."""
        flat = flat_inputs(self.traced, args, kwargs)
        call, self._num_calls = self._num_calls, self._num_calls + 1
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        outputs = _InOrder.apply(self, call, anchor, *flat)
        return unflatten_outputs(self.traced, list(outputs))

    def train_step(
        self,
        *batch: Any,
        loss_fn: Callable[..., torch.Tensor],
        optimizer: torch.optim.Optimizer,
        loss_reduction: LossReduction = "mean",
    ) -> torch.Tensor:
        """As `DistributedModel.train_step`, with a plain torch optimizer."""
        optimizer.zero_grad()
        args, kwargs, target = bind_batch(batch, self._by_keyword)
        pieces, samples = split_into(self.traced, flat_inputs(self.traced, args, kwargs), self._micro_batches)
        targets = split_targets(target, samples)
        weights = loss_weights(loss_reduction, samples, targets)
        call, losses = self._num_calls, []
        self._before_backward()
        for micro_batch, piece in enumerate(pieces):
            outputs = unflatten_outputs(self.traced, self._run(piece, call, micro_batch))
            with autocasts.region(CPU, self._autocast):
                loss = loss_fn(outputs, targets[micro_batch])
            loss.backward(torch.tensor(weights[micro_batch], dtype=loss.dtype))
            losses.append(loss.item())
        self._after_backward()
        optimizer.step()
        self.end_step()
        return torch.tensor(sum(w * value for w, value in zip(weights, losses, strict=True)), dtype=loss.dtype)

    def end_step(self) -> None:
        """The optimizer has stepped: the next forward is call 0 of the next step."""
        self._step_index, self._num_calls = self._step_index + 1, 0

    def _draws_masks(self, example_inputs: Any) -> bool:
        """Whether the training graph has dropout: a run on copies of the buffers asks for a seed."""
        whole = self.traced.whole()
        asked: list[int] = []
        args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (tuple(example_inputs), {})
        state = self.traced.state(whole)
        interpreter = Interpreter(
            whole.train,
            {name: state[name] for name in whole.parameters},
            {name: state[name].clone() for name in whole.buffers},
        )

        def seed(node: int) -> int:
            asked.append(node)
            return 0

        with torch.no_grad():
            interpreter.run(flatten_inputs(self.traced, args, kwargs), seed)
        return bool(asked)

    def _run(self, piece: list[Any], call: int, micro_batch: int) -> list[Any]:
        if self._stages is None:
            # as tensors enter a stage: another alignment is another rounding in small products
            args, kwargs = self.traced.binding.rebuild([aligned(tensor) for tensor in piece])
            with autocasts.region(CPU, self._autocast):
                leaves = pytree.tree_leaves(self.module(*args, **kwargs))
            return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return self._stages.run(piece, seed_for(self._seed, 0, self._step_index, call, micro_batch), self.training)

    def _before_backward(self) -> None:
        if self._stages is not None:
            self._stages.before_backward()

    def _after_backward(self) -> None:
        if self._stages is not None:
            self._stages.after_backward()


class _InOrder(torch.autograd.Function):
    """All micro-batches as one node of the user's graph, whose backward goes through them in order."""

    @staticmethod
    def forward(ctx: Any, reference: Reference, call: int, anchor: torch.Tensor, *flat: torch.Tensor) -> Any:
        ctx.reference, ctx.dynamic = reference, reference.traced.binding.dynamic
        ctx.wanted = [slot for slot, tensor in enumerate(flat) if anchor.requires_grad and tensor.requires_grad]
        detached = [tensor.detach() for tensor in flat]
        pieces, ctx.samples = split_into(reference.traced, detached, reference._micro_batches)
        ctx.pieces = [
            [tensor.detach().requires_grad_(slot in ctx.wanted) for slot, tensor in enumerate(piece)]
            for piece in pieces
        ]
        with torch.set_grad_enabled(anchor.requires_grad):
            ctx.runs = [reference._run(piece, call, index) for index, piece in enumerate(ctx.pieces)]
        ctx.slots = reference.traced.outputs.slots
        outputs = [
            joined(slot, [run[index].detach() for run in ctx.runs], ctx.samples) for index, slot in enumerate(ctx.slots)
        ]
        ctx.mark_non_differentiable(
            *[o for o, made in zip(outputs, ctx.runs[0], strict=True) if not made.requires_grad]
        )
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        retain = torch._C._autograd._get_current_graph_task_keep_graph()
        split = [
            divided(ctx.slots[index], gradient, [run[index].shape for run in ctx.runs], ctx.samples)
            for index, gradient in enumerate(gradients)
        ]
        for piece in ctx.pieces:
            for slot in ctx.wanted:
                piece[slot].grad = None
        ctx.reference._before_backward()
        for index, run in enumerate(ctx.runs):
            wanted = [(out, split[slot][index]) for slot, out in enumerate(run) if out.requires_grad]
            torch.autograd.backward(
                [out for out, _ in wanted], [aligned(gradient) for _, gradient in wanted], retain_graph=retain
            )
        ctx.reference._after_backward()
        found: list[torch.Tensor | None] = [None] * len(ctx.dynamic)
        for slot in ctx.wanted:
            parts = [torch.zeros_like(p[slot]) if p[slot].grad is None else p[slot].grad for p in ctx.pieces]
            found[slot] = torch.cat(parts) if ctx.dynamic[slot] else sum(parts[1:], parts[0])
        return None, None, None, *found


reference = Reference
