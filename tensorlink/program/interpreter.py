"""Runs a graph: a loop over calls that were resolved and checked once.

A graph is compiled to steps over one flat list of values: constants, parameters and earlier results have fixed places
in it, so a step is a fetch, a call and a store, and values are dropped after their last use. What comes out is bit
for bit what eager PyTorch computes. Neighbours: `arguments.py` (checks), `ops.py` and `dropout.py` (what is called),
`limits.py` (bounds the cost beforehand).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorlink.errors import ProgramError, TensorError
from tensorlink.program import arguments, autocast, branches, drawing, dropout, fused
from tensorlink.program.alignment import aligned
from tensorlink.program.deferred import Deferred, deferrable_weights, deferring
from tensorlink.program.graph import Graph, Node
from tensorlink.program.guards import GUARDS, guarded
from tensorlink.program.ops import (
    ALLOWED,
    ATTENTION,
    COND,
    FACTORIES,
    MUTABLE_BUFFERS,
    SYMBOLIC,
    is_random,
    item_of,
    size_of,
)
from tensorlink.program.values import DTYPES, Arg, Buffer, Parameter, Value
from tensorlink.records import Cut, Slot

#: Called after each node with the node and its result; `limits.py` and `sharding/profile.py` watch runs through it.
Observer = Callable[[Node, Any], None]


#: What says that an op draws random numbers, given by name.
_HIDES = {ATTENTION: "dropout_p", "aten.rrelu.default": "training"}


class Step(NamedTuple):
    """One call: where its arguments are, where its result goes, what is no longer needed afterwards."""

    function: Callable[..., Any]
    fetch: Callable[[list[Any]], tuple[Any, ...]]
    lists: tuple[tuple[int, Callable[[list[Any]], tuple[Any, ...]]], ...]
    copies: tuple[int, ...]
    target: int
    frees: tuple[int, ...]
    grad: bool
    autocast: str
    node: Node


class Interpreter:
    """A graph ready to run.

    `parameters` and `buffers` hold at least the names that the graph uses. Parameters are read at each run and never
    changed. Buffers are values: no run writes into a buffer tensor; a run in which buffers change replaces their
    entries in the `buffers` dict given here by new tensors. A shallow copy of the dict is therefore a snapshot, and a
    forward that is still waiting for its backward keeps what it saw. `cut` gives the dtypes and ranks to expect of
    what enters.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        *,
        cut: Cut | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.graph = graph
        self.parameters = parameters
        self.buffers = buffers
        self.cut = cut
        #: Called at each run with what enters; raises where these sizes must not be run (`admission.py`).
        self.admit: Callable[[Sequence[Tensor | int]], None] | None = None
        self.device = torch.device(device) if device is not None else _device_of(parameters, buffers)
        if cut is not None and len(cut.slots) != len(graph.inputs):
            raise ProgramError(f"the graph has {len(graph.inputs)} inputs, its cut has {len(cut.slots)} slots")
        self._compile()

    def __repr__(self) -> str:
        return f"Interpreter({len(self._steps)} nodes, {len(self.graph.inputs)} inputs, {self.device})"

    # -- once ------------------------------------------------------------------------------------------------------

    def _compile(self) -> None:
        self._constants: list[Any] = [None, None]  # `seed_for` and `deferred` of a run
        self._deferrable = deferrable_weights(self.graph)
        self._parameter_places: dict[str, int] = {}
        self._buffer_places: dict[str, int] = {}
        self._places: dict[int, int] = {value: self._place() for value in self.graph.inputs}
        self._literals: dict[tuple[str, str], int] = {}
        last = self.graph.last_uses()
        frees: dict[int, list[int]] = {}
        for value, index in last.items():
            frees.setdefault(index, []).append(value)
        self._steps = [self._step(node, frees.get(index, [])) for index, node in enumerate(self.graph.nodes)]
        self._mutations = [(name, self._places[value]) for name, value in self.graph.mutations]
        written = {
            place: name
            for step in self._steps
            for place in step.copies
            for name, at in self._buffer_places.items()
            if at == place
        }
        self._written = [(name, place) for place, name in written.items()]
        self._outputs = [self._places[value] for value in self.graph.outputs]

    def _place(self, content: Any = None) -> int:
        self._constants.append(content)
        return len(self._constants) - 1

    def _step(self, node: Node, frees: list[int]) -> Step:
        self._check(node)
        missing = [value for value in node.values() if value not in self._places]
        if missing:
            raise ProgramError(f"{node}: uses value {missing[0]} before it is defined")
        lists: list[tuple[int, Callable[[list[Any]], tuple[Any, ...]]]] = []
        places = [self._argument(arg, lists) for arg in node.args]
        function = self._function(node, places)
        kwargs = node.kwargs
        if node.op in FACTORIES:  # left to torch, the device is the CPU, and the dry run allocates
            function = functools.partial(function, device=self.device)
            kwargs = tuple(item for item in kwargs if item[0] != "device")
        if kwargs and all(arguments.is_static(arg) for _, arg in kwargs):
            fixed = {name: arguments.literal(arg, self.device) for name, arg in kwargs}
            function = functools.partial(function, **fixed)
        elif kwargs:
            names = [name for name, _ in kwargs]
            keyword_places = [self._argument(arg, lists) for _, arg in kwargs]
            function = _with_keywords(function, len(places), names)
            places += keyword_places
        if node.id in self._places:
            raise ProgramError(f"{node}: id {node.id} is defined twice")
        self._places[node.id] = self._place()
        return Step(
            function,
            _getter(places),
            tuple(lists),
            self._copies(node),
            self._places[node.id],
            tuple(self._places[value] for value in frees),
            node.grad,
            node.autocast,
            node,
        )

    def _check(self, node: Node) -> None:
        arguments.check(node)

    def _function(self, node: Node, places: list[int]) -> Callable[..., Any]:
        if node.op == "sym_size":
            return size_of
        if node.op == "getitem":
            return item_of
        if node.op in SYMBOLIC:
            return SYMBOLIC[node.op]
        if node.op == COND:
            places[:0] = [0]
            if_true, if_false = (Interpreter(branch, {}, {}, device=self.device) for branch in node.branches)
            return functools.partial(branches.conditional, if_true.evaluate, if_false.evaluate)
        implementation: Callable[..., Any] | None = dropout.IMPLEMENTATIONS.get(node.op)
        if is_random(node.op, node.args):
            implementation = drawing.IMPLEMENTATIONS.get(node.op, implementation)
        if node.op == ATTENTION and is_random(node.op, node.args):
            implementation = dropout.attention
        if implementation is None:
            hidden = _HIDES.get(node.op) in dict(node.kwargs)  # where `is_random` does not look
            if hidden or is_random(node.op, node.args):
                raise ProgramError(f"{node}: draws random numbers of its own, which cannot be drawn again")
            function: Callable[..., Any] = ALLOWED[node.op]._op
            if node.op == ATTENTION and self.device.type == "meta":
                function = fused.attention
            guard = GUARDS.get(node.op)
            function = function if guard is None else guarded(guard, function)
            weights = self._deferrable.get(node.id)
            if weights:
                places[:0] = [1]
                function = deferring(function, weights)
            return function
        guard = GUARDS.get(node.op)
        if guard is not None:
            implementation = guarded(lambda seed_for, key, *args, **kwargs: guard(*args, **kwargs), implementation)
        places[:0] = [0, self._place(node.id)]
        return implementation

    def _argument(self, arg: Arg, lists: list[tuple[int, Callable[[list[Any]], tuple[Any, ...]]]]) -> int:
        if isinstance(arg, Value):
            return self._places[arg.id]
        if isinstance(arg, Parameter):
            return self._state_place(arg.name, self._parameter_places, self.parameters, "parameter")
        if isinstance(arg, Buffer):
            return self._state_place(arg.name, self._buffer_places, self.buffers, "buffer")
        if arguments.is_static(arg):
            return self._place(arguments.literal(arg, self.device))
        place = self._place()
        lists.append((place, _getter([self._argument(item, lists) for item in _items(arg)])))
        return place

    def _state_place(self, name: str, places: dict[str, int], state: dict[str, Tensor], kind: str) -> int:
        if name not in state:
            raise ProgramError(f"{kind} {name!r:.60} is used by the graph and was not given")
        if name not in places:
            places[name] = self._place()
        return places[name]

    def _copies(self, node: Node) -> tuple[int, ...]:
        write = MUTABLE_BUFFERS.get(node.op)
        if write is None or len(node.args) <= write.flag or node.args[write.flag] is not True:
            return ()
        written = [node.args[at] for at in write.buffers]
        if any(arg is not None and not isinstance(arg, Buffer) for arg in written):
            raise ProgramError(f"{node}: running statistics are buffers of the program, found {str(written)[:80]}")
        return tuple(self._buffer_places[arg.name] for arg in written if isinstance(arg, Buffer))

    # -- at every run ----------------------------------------------------------------------------------------------

    def run(
        self,
        inputs: Sequence[Tensor | int],
        seed_for: dropout.Seed | None = None,
        observer: Observer | None = None,
        deferred: Deferred | None = None,
    ) -> list[Any]:
        """The graph's outputs, in the order of its cut.

        `inputs` are tensors and sizes in the order of the cut; those not contiguous and 64-byte aligned are copied.
        `seed_for` maps a node id of the uncut program to the seed of its dropout mask, and is needed where the graph
        has dropout in training mode. Weight gradients that can be left for later go to `deferred` when the backward
        runs. Raises TensorError for inputs that do not fit, ProgramError naming the node where a call fails.
        """
        if self.admit is not None:
            self.admit(inputs)
        values = self._constants.copy()
        values[0] = seed_for if seed_for is not None else _no_seed
        values[1] = deferred
        for name, place in self._parameter_places.items():
            values[place] = self.parameters[name]
        for name, place in self._buffer_places.items():
            values[place] = self.buffers[name]
        for value, entered in zip(self.graph.inputs, self._enter(inputs), strict=True):
            values[self._places[value]] = entered
        outer = torch.is_grad_enabled()
        try:
            with autocast.region(self.device):
                if observer is None:
                    self._loop(self._steps, values, outer)
                else:
                    self._observed_loop(values, outer, observer)
        finally:
            torch.set_grad_enabled(outer)
        for name, place in self._written:
            self.buffers[name] = values[place]
        for name, place in self._mutations:
            self.buffers[name] = _replacement(name, self.buffers[name], values[place])
        outputs = [values[place] for place in self._outputs]
        if not all(isinstance(value, Tensor | int) for value in outputs):
            raise ProgramError(f"outputs are tensors and sizes, found {[type(value).__name__ for value in outputs]}")
        return outputs

    def evaluate(self, operands: Sequence[Any], seed_for: dropout.Seed, observer: Observer | None = None) -> list[Any]:
        """The outputs of a branch, whose operands enter as they are: in the middle of the run of its graph."""
        values = self._constants.copy()
        values[0] = seed_for
        for value, operand in zip(self.graph.inputs, operands, strict=True):
            values[self._places[value]] = operand
        outer = torch.is_grad_enabled()
        try:
            with autocast.region(self.device):
                if observer is None:
                    self._loop(self._steps, values, outer)
                else:
                    self._observed_loop(values, outer, observer)
        finally:
            torch.set_grad_enabled(outer)
        return [values[place] for place in self._outputs]

    def _loop(self, steps: Sequence[Step], values: list[Any], outer: bool) -> None:
        grad, casting = outer, None
        step = None
        try:
            for step in steps:
                function, fetch, lists, copies, target, frees, wanted, casts, _ = step
                if outer and wanted != grad:
                    torch.set_grad_enabled(wanted)
                    grad = wanted
                if casts != casting:
                    autocast.switch(self.device, casts)
                    casting = casts
                for place, items in lists:
                    values[place] = list(items(values))
                for place in copies:
                    values[place] = values[place].clone()
                values[target] = function(*fetch(values))
                for place in frees:
                    values[place] = None
        except (torch.OutOfMemoryError, ProgramError):  # one from a branch names its node already
            raise
        except Exception as error:
            if isinstance(error, MemoryError) and self.device.type != "meta":
                raise
            where = step.node if step is not None else "graph"
            raise ProgramError(f"{where}: {type(error).__name__}: {str(error)[:300]}") from error

    def _observed_loop(self, values: list[Any], outer: bool, observer: Observer) -> None:
        for step in self._steps:
            self._loop((step._replace(frees=()),), values, outer)
            torch.set_grad_enabled(outer)
            observer(step.node, values[step.target])
            for place in step.frees:
                values[place] = None

    def _enter(self, inputs: Sequence[Tensor | int]) -> list[Tensor | int]:
        if len(inputs) != len(self.graph.inputs):
            raise TensorError(f"{len(inputs)} inputs were given, the graph takes {len(self.graph.inputs)}")
        if self.cut is not None:
            for slot, item in zip(self.cut.slots, inputs, strict=True):
                _fits(slot, item)
        return [aligned(item) if isinstance(item, Tensor) else item for item in inputs]


def _replacement(name: str, before: Tensor, after: Any) -> Tensor:
    """What the buffer holds from now on; as large as before, or it would grow from run to run."""
    if not isinstance(after, Tensor) or (after.shape, after.dtype) != (before.shape, before.dtype):
        found = f"{str(after.dtype)[6:]} {list(after.shape)}" if isinstance(after, Tensor) else type(after).__name__
        raise ProgramError(
            f"buffer {name!r:.60} is {str(before.dtype)[6:]} {list(before.shape)}, a run leaves {found} in it"
        )
    after = after.detach()
    is_whole = after.untyped_storage().nbytes() <= after.numel() * after.element_size()
    return after if is_whole else after.clone()


def _items(arg: Arg) -> tuple[Arg, ...]:
    return arg if isinstance(arg, tuple) else (arg,)


def _getter(places: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    if not places:
        return lambda values: ()
    only = places[0]
    return lambda values: (values[only],)


def _with_keywords(function: Callable[..., Any], num_positional: int, names: list[str]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return function(*args[:num_positional], **dict(zip(names, args[num_positional:], strict=True)))

    functools.update_wrapper(call, function, assigned=("__name__",))
    return call


def _device_of(*states: dict[str, Tensor]) -> torch.device:
    return next((tensor.device for state in states for tensor in state.values()), torch.device("cpu"))


def _no_seed(key: int) -> int:
    raise ValueError(
        f"node {key} draws a dropout mask and no seed_for was given; pass the job's seed function, or use eval mode"
    )


def _fits(slot: Slot, item: Tensor | int) -> None:
    if slot.type == "symint":
        if type(item) is not int:
            raise TensorError(f"slot {slot.name!r} takes an integer, found {type(item).__name__}")
        return
    if not isinstance(item, Tensor):
        raise TensorError(f"slot {slot.name!r} takes a tensor, found {type(item).__name__}")
    shape = list(item.shape)
    fits = len(shape) == len(slot.shape) and all(
        want in (-1, size) for want, size in zip(slot.shape, shape, strict=True)
    )
    if item.dtype != DTYPES.get(slot.dtype) or not fits:
        raise TensorError(
            f"slot {slot.name!r} takes {slot.dtype} {slot.shape} (-1 is the batch), found {str(item.dtype)[6:]} {shape}"
        )
