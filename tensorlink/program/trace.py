"""From a module to a program: once in training mode, once in evaluation mode, without touching the module.

Neighbours: `capture.py` (torch.export), `lowering.py` (fx to nodes), `state.py` (names), `inputs.py` (what the user
passes), `loss.py` (loss functions), `sharding/partition.py` (cuts what is made here).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils import _pytree as pytree

from tensorlink.errors import ProgramError, TraceError
from tensorlink.program import structure
from tensorlink.program.capture import capture
from tensorlink.program.dryrun import Placeholders, dry_run
from tensorlink.program.graph import BufferSpec, Graph, Node, ParameterSpec, StageProgram
from tensorlink.program.inputs import Binding, bind_example
from tensorlink.program.loss import trace_loss
from tensorlink.program.lowering import Lowered, ValueInfo, lower
from tensorlink.program.state import ModuleState
from tensorlink.program.values import DTYPE_NAMES
from tensorlink.records import Cut, Slot


@dataclass
class TracedModel:
    """A traced module: the whole program, and the user's side of it.

    `parameters` and `buffers` are the module's own tensors by canonical name (the first of a tied parameter's names);
    `aliases` maps the other names to it. `constants` are tensors that the trace found in the code; their names are
    digests of their content. `state_names` are the keys of the module's state_dict. `gradients` holds the ids of
    training values that need a gradient.
    """

    train: Lowered
    eval: Lowered
    parameters: dict[str, Parameter]
    buffers: dict[str, Tensor]
    constants: dict[str, Tensor]
    parameter_specs: dict[str, ParameterSpec]
    buffer_specs: dict[str, BufferSpec]
    aliases: dict[str, str]
    state_names: tuple[str, ...]
    binding: Binding
    inputs: Cut
    outputs: Cut
    gradients: frozenset[int]
    output_spec: structure.Spec
    output_tree: pytree.TreeSpec
    output_leaves: list[Any]
    autocast: torch.dtype | None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the flat inputs: the forward's argument names, with a path where an argument holds several
        tensors."""
        return self.binding.names

    def whole(self) -> StageProgram:
        """The uncut program, as the only stage."""
        return StageProgram(
            stage_index=0,
            num_stages=1,
            train=self.train.graph,
            eval=self.eval.graph,
            parameters=self.parameter_specs,
            buffers=self.buffer_specs,
            inputs=self.inputs,
            outputs=self.outputs,
        )

    def example_outputs(self, batch: int) -> list[Tensor]:
        """Zeros of the shapes and dtypes of the training outputs for `batch` samples."""
        placeholders = Placeholders.of(self.parameter_specs, self.buffer_specs, self.inputs, batch, self.train.graph)
        outputs = dry_run(self.train.graph, placeholders, self.inputs)
        return [torch.zeros(output.shape, dtype=output.dtype) for output in outputs]

    def state(self, program: StageProgram) -> dict[str, Tensor]:
        """The tensors that a stage starts from, by name: its parameters, buffers and constants, detached and not
        copied."""
        known: dict[str, Tensor] = {**self.parameters, **self.buffers, **self.constants}
        return {name: known[name].detach() for name in (*program.parameters, *program.buffers)}


def trace(
    module: Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    *,
    static_inputs: Collection[str] = (),
    autocast: torch.dtype | None = None,
) -> TracedModel:
    """Traces `module` on example inputs, a tuple of positional or a dict of keyword arguments.

    Dimension 0 of every tensor that has the batch size of the first is the batch and stays open; inputs named in
    `static_inputs` (and tensors of another size) are passed whole to each micro-batch. A batch of one is traced as
    two. With `autocast` the program computes what the module computes under `torch.autocast` with that dtype; without,
    what it computes under none, whatever holds around this call. The module keeps mode and state. Raises TraceError
    that names the user's line and a remedy.
    """
    binding, tensors = bind_example(module, example_inputs, static_inputs)
    state = ModuleState.of(module)
    names = tuple(module.state_dict().keys())
    train_capture, eval_capture = (
        capture(module, tensors, binding.dynamic, binding.rebuild, training, autocast) for training in (True, False)
    )
    output_spec = structure.describe(train_capture.tree, train_capture.leaves)
    if output_spec != structure.describe(eval_capture.tree, eval_capture.leaves):
        raise TraceError(
            "the model returns another structure in training than in evaluation mode; return the same in both"
        )
    train, evaluation = lower(train_capture, state), lower(eval_capture, state)
    inputs = Cut(
        slots=[
            _slot(name, train.info[value], tensor.requires_grad)
            for name, value, tensor in zip(binding.names, train.graph.inputs, tensors, strict=True)
        ]
    )
    parameters, buffers = state.parameter_specs(), state.buffer_specs()
    gradients = _checked_run(train, parameters, buffers, inputs, binding.batch)
    _checked_run(evaluation, parameters, buffers, inputs, binding.batch)
    return TracedModel(
        train=train,
        eval=evaluation,
        parameters=state.parameters,
        buffers=state.buffers,
        constants=state.constants,
        parameter_specs=parameters,
        buffer_specs=buffers,
        aliases=state.aliases,
        state_names=names,
        binding=binding,
        inputs=inputs,
        outputs=_outputs(train, evaluation, gradients),
        gradients=gradients,
        output_spec=output_spec,
        output_tree=train_capture.tree,
        output_leaves=train_capture.leaves,
        autocast=autocast,
    )


def _checked_run(
    lowered: Lowered, parameters: dict[str, ParameterSpec], buffers: dict[str, BufferSpec], inputs: Cut, batch: int
) -> frozenset[int]:
    """Runs the program without data, compares what comes out with the trace; returns the ids that need a gradient."""
    found = {value for value, slot in zip(lowered.graph.inputs, inputs.slots, strict=True) if slot.requires_grad}

    def observe(node: Node, result: Any) -> None:
        info = lowered.info[node.id]
        if not isinstance(result, Tensor):
            return
        dtype, sizes = DTYPE_NAMES.get(result.dtype), tuple(result.shape)
        fits = len(sizes) == len(info.shape) and all(a in (-1, b) for a, b in zip(info.shape, sizes, strict=True))
        if info.type == "tensor" and (dtype != info.dtype or not fits):
            raise TraceError(
                f"{node} gives {dtype} {list(sizes)} where the module computed {info.dtype} {list(info.shape)} at "
                f"{info.line}; "
                "if the line writes in place, compute a new tensor instead"
            )
        if result.requires_grad:
            found.add(node.id)

    try:
        dry_run(lowered.graph, Placeholders.of(parameters, buffers, inputs, batch, lowered.graph), inputs, observe)
    except ProgramError as error:
        raise TraceError(f"the traced program does not run: {error}") from error
    return frozenset(found)


def _outputs(train: Lowered, evaluation: Lowered, gradients: frozenset[int]) -> Cut:
    slots = []
    for at, (value, other) in enumerate(zip(train.graph.outputs, evaluation.graph.outputs, strict=True)):
        info, eval_info = train.info[value], evaluation.info[other]
        if (info.type, info.dtype, info.shape) != (eval_info.type, eval_info.dtype, eval_info.shape):
            raise TraceError(
                f"output {at} is {info.dtype} {list(info.shape)} in training and {eval_info.dtype} "
                f"{list(eval_info.shape)} in "
                "evaluation mode; return the same in both"
            )
        slots.append(_slot(f"output.{at}", info, value in gradients))
    return Cut(slots=slots)


def _slot(name: str, info: ValueInfo, requires_grad: bool) -> Slot:
    kind: Any = info.type
    return Slot(name=name, type=kind, dtype=info.dtype, shape=list(info.shape), requires_grad=requires_grad)


__all__ = ["Graph", "TracedModel", "trace", "trace_loss"]
