"""What a program costs, found without data and before anything is allocated; refused where it is over a limit.

Both graphs are run on the meta device: every shape is known, no byte of a tensor exists. The figures are integers
that depend on the program and the batch alone, so that a worker, its user and an auditor arrive at the same
`work_units`. Neighbours: `dryrun.py` (the run), `flops.py` (the formulas), `admission.py` (sizes met at run time).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tensorlink.errors import OverLimitError, ProgramError
from tensorlink.program import flops
from tensorlink.program.dryrun import META, Placeholders, dry_run
from tensorlink.program.graph import BufferSpec, Constant, Graph, LossProgram, Node, ParameterSpec, StageProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.ops import ALLOWED
from tensorlink.program.values import DTYPES, Arg, Buffer, Parameter, Value
from tensorlink.records import Cut


@dataclass(frozen=True)
class Estimate:
    """Cost of one micro-batch in training. `node_flops` maps node ids to (forward, backward) operations.

    `peak_activation_bytes` is the most that forward holds at once, values kept for the backward (`saved_bytes`)
    included; gradients and optimizer state are not in it. `parameter_bytes` counts parameters, buffers and constants.
    """

    flops_forward: int
    flops_backward: int
    peak_activation_bytes: int
    saved_bytes: int
    parameter_bytes: int
    output_bytes: int
    node_flops: dict[int, tuple[int, int]]
    value_bytes: dict[int, int]

    @property
    def work_units(self) -> int:
        """Operations of forward and backward together: the basis of pay."""
        return self.flops_forward + self.flops_backward


def check(program: StageProgram, *, batch: int, max_bytes: int, max_flops: int) -> Estimate:
    """The cost of a micro-batch of `batch` samples. Raises ProgramError naming the node that goes over a limit.

    `max_bytes` bounds parameters, buffers and activations together, `max_flops` forward and backward of one
    micro-batch.
    """
    meter = measure(
        program.train, program.parameters, program.buffers, program.inputs, batch, max_bytes, max_flops, "train"
    )
    measure(
        program.eval,
        program.parameters,
        program.buffers,
        program.inputs,
        batch,
        max_bytes,
        max_flops,
        "eval",
        grad=False,
    )
    return meter


def check_loss(program: LossProgram, *, batch: int, max_bytes: int, max_flops: int) -> Estimate:
    """The same for a loss program."""
    cut = Cut(
        slots=[
            msgspec.structs.replace(slot, shape=[batch * rows, *slot.shape[1:]]) if rows else slot
            for slot, rows in zip(program.inputs.slots, program.rows, strict=True)
        ]
    )
    return measure(program.graph, {}, program.constants, cut, batch, max_bytes, max_flops, "loss")


def measure(
    graph: Graph,
    parameters: Mapping[str, ParameterSpec],
    buffers: Mapping[str, BufferSpec | Constant],
    inputs: Cut,
    batch: int,
    max_bytes: int,
    max_flops: int,
    mode: str,
    grad: bool = True,
    entering: Sequence[Tensor | int] | None = None,
) -> Estimate:
    """Runs one graph without data, with a meter that refuses at the first node over a limit.

    `entering` are the very sizes to find the cost for; without them they are those of the cut for `batch`. Raises
    OverLimitError for what costs too much, ProgramError for what cannot be run at all.
    """
    specs = [*parameters.values(), *buffers.values()]
    held = sum(prod(spec.shape) * DTYPES[spec.dtype].itemsize for spec in specs)
    if held > max_bytes:
        raise OverLimitError(f"parameters and buffers take {held} bytes, at most {max_bytes} are allowed here")
    if batch < 1:
        raise ProgramError(f"a micro-batch of {batch} samples: at least 1 is needed")
    placeholders = Placeholders.of(parameters, buffers, inputs, batch, graph)
    if entering is not None:
        placeholders.inputs = [placeholders.like(item) if isinstance(item, Tensor) else item for item in entering]
    state = {**placeholders.parameters, **placeholders.buffers}
    meter = _Meter(graph, placeholders.inputs, state, max_bytes - held, max_flops, mode)
    with torch.autograd.graph.saved_tensors_hooks(meter.save, _never), meter.within:
        outputs = dry_run(graph, placeholders, inputs, meter.observe, grad)
    for value, tensor in zip(graph.outputs, outputs, strict=True):  # views too are written out where they leave
        if isinstance(tensor, Tensor) and _num_bytes(tensor) > max_bytes:
            raise OverLimitError(
                f"{mode} node {value} is an output of {_num_bytes(tensor)} bytes, at most {max_bytes} are allowed here"
            )
    return Estimate(
        flops_forward=sum(forward for forward, _ in meter.node_flops.values()),
        flops_backward=sum(backward for _, backward in meter.node_flops.values()),
        peak_activation_bytes=meter.peak,
        saved_bytes=meter.saved_bytes,
        parameter_bytes=held,
        output_bytes=sum(_num_bytes(tensor) for tensor in flops.tensors_in(outputs)),
        node_flops=meter.node_flops,
        value_bytes=meter.value_bytes,
    )


class _Within(TorchDispatchMode):
    """Notes the largest tensor that a kernel makes, or may have to write out, inside a node."""

    def __init__(self) -> None:
        super().__init__()
        self._largest = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the default imports the whole compiler, for a case that does not occur here

    def take(self) -> int:
        """The bytes of the largest since the last time."""
        largest, self._largest = self._largest, 0
        return largest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [tensor.untyped_storage().nbytes() for tensor in flops.tensors_in(result)]
        if not all(item.alias_info is not None for item in func._schema.returns):
            made += [_num_bytes(tensor) for tensor in flops.tensors_in(args)]  # an expanded operand is written out
        self._largest = max([self._largest, *made])
        return result


class _Meter:
    """Watches a dry run: adds up operations, and the memory that values and saved tensors hold."""

    def __init__(
        self,
        graph: Graph,
        inputs: Sequence[Any],
        state: Mapping[str, Tensor],
        max_bytes: int,
        max_flops: int,
        mode: str,
    ) -> None:
        self.max_bytes, self.max_flops, self.mode = max_bytes, max_flops, mode
        self.node_flops: dict[int, tuple[int, int]] = {}
        self.value_bytes: dict[int, int] = {}
        self.peak = self.saved_bytes = self._current = self._flops = self._index = 0
        self.within = _Within()
        self._state = state
        self._values: dict[int, Any] = dict(zip(graph.inputs, inputs, strict=True))
        self._holders: dict[int, int] = {}
        self._saved: dict[int, Tensor] = {}
        self._frees: dict[int, list[int]] = {}
        for value, index in graph.last_uses().items():
            self._frees.setdefault(index, []).append(value)
        for value, entering in self._values.items():
            for tensor in flops.tensors_in(entering):
                self._hold(tensor.untyped_storage())
                self.value_bytes[value] = _num_bytes(tensor)

    def save(self, tensor: Tensor) -> Tensor:
        """Called by autograd for what it keeps; parameters are held anyway."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._saved and not _is_parameter(tensor):
            self._saved[storage._cdata] = tensor.detach()
            self.saved_bytes += storage.nbytes()
            self._hold(storage)
        return tensor

    def observe(self, node: Node, result: Any) -> None:
        """Called after each node of the dry run."""
        outputs = list(flops.tensors_in(result))
        args = [self._resolve(arg) for arg in (*node.args, *_in_order(node))]
        forward, backward, inner_bytes = self._dearer(node, args) or (*self._counted(node, args, result), 0)
        self._flops += forward + backward
        self.node_flops[node.id] = (forward, backward)
        self.value_bytes[node.id] = sum(_num_bytes(tensor) for tensor in outputs)
        self._values[node.id] = result
        for tensor in outputs:
            self._hold(tensor.untyped_storage())
        self.peak = max(self.peak, self._current + inner_bytes)
        if self._flops > self.max_flops:
            raise OverLimitError(
                f"{self.mode} {node}: {self._flops} operations so far, at most {self.max_flops} are allowed here"
            )
        needed = max(self._current + inner_bytes, self.within.take())
        if needed > self.max_bytes:
            raise OverLimitError(
                f"{self.mode} {node}: {needed} bytes are needed at once, at most {self.max_bytes} are allowed here"
            )
        for value in self._frees.get(self._index, ()):
            for tensor in flops.tensors_in(self._values.get(value)):
                self._release(tensor.untyped_storage())
        self._index += 1

    def _counted(self, node: Node, args: list[Any], result: Any) -> tuple[int, int]:
        """Forward and backward operations. Raises ProgramError for a call that no formula fits."""
        try:
            return flops.count(node, args, result)
        except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise ProgramError(f"{self.mode} {node}: its operations cannot be counted: {str(error)[:200]}") from error

    def _dearer(self, node: Node, args: list[Any]) -> tuple[int, int, int] | None:
        """Forward and backward operations and bytes of a cond, the most of its branches; None for any other node."""
        costs = []
        for branch in node.branches:
            free = self.max_bytes - self._current, self.max_flops - self._flops
            inner = _Meter(branch, args[1], {}, *free, f"{self.mode} {node}, in a branch,")
            device = next((t.device for t in flops.tensors_in(args)), META)
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, _never):
                Interpreter(branch, {}, {}, device=device).evaluate(args[1], lambda key: 0, inner.observe)
            forward, backward = (sum(part) for part in zip((0, 0), *inner.node_flops.values(), strict=True))
            costs.append((forward, backward, inner.peak))
        return (max(c[0] for c in costs), max(c[1] for c in costs), max(c[2] for c in costs)) if costs else None

    def _hold(self, storage: torch.UntypedStorage) -> None:
        count = self._holders.get(storage._cdata, 0)
        self._holders[storage._cdata] = count + 1
        if count == 0:
            self._current += storage.nbytes()

    def _release(self, storage: torch.UntypedStorage) -> None:
        count = self._holders.get(storage._cdata, 0)
        if count == 1:
            self._current -= storage.nbytes()
        if count:
            self._holders[storage._cdata] = count - 1

    def _resolve(self, arg: Arg) -> Any:
        if isinstance(arg, Value):
            return self._values[arg.id]
        if isinstance(arg, tuple):
            return [self._resolve(item) for item in arg]
        if isinstance(arg, Parameter | Buffer):
            return self._state[arg.name]
        return arg


def _in_order(node: Node) -> list[Arg]:
    """The keyword arguments as if they had been given by position: formulas count positions."""
    given = dict(node.kwargs)
    schema = ALLOWED[node.op]._schema.arguments if node.op in ALLOWED else ()
    return [given[argument.name] for argument in schema if argument.name in given]


def _is_parameter(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter or a view of one."""
    return isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _never(tensor: Tensor) -> Tensor:
    raise RuntimeError("a dry run has no backward")
