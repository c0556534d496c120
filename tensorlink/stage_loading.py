"""How a stage's state arrives in the computing process: begun, part by part, ended.

    load | set_state | set_optimizer_state  →  load_part, once for each part  →  load_end

`load` checks the program against the rig's limits and only then allocates what it declares; parts go from shared
memory straight into those tensors. Until `load_end` there is no stage, and a running one keeps its state. Neighbours:
`compute_stages.py` serves these methods, `program/parts.py` says what a part is, `weight_sending.py` sends them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from smartnodes_core.errors import ProtocolError
from tensorlink.errors import TensorError
from tensorlink.program.parts import Assembly
from tensorlink.program.weights import CONSTANT_PREFIX, Expected, constant_digest
from tensorlink.steplog.digests import digest

State = dict[str, Tensor]
#: Gets the tensors and their digests, by name; None for tensors that did not come from outside.
Finish = Callable[[State, Mapping[str, bytes] | None], dict[str, Any]]


class Arriving:
    """The tensors `expected` on their way. `finish` gets all of them and makes the answer to `load_end`."""

    def __init__(self, expected: Expected, finish: Finish):
        self.finish = finish
        self._assembly = Assembly(expected)
        self._digests: dict[str, bytes] = {}
        self._hash(self._assembly.empty())

    def put(self, part: int, data: memoryview) -> None:
        """Take a part; a tensor is hashed when the last of it is in. Raises TensorError."""
        self._hash(self._assembly.put(part, data))

    def end(self) -> dict[str, Any]:
        """Raises TensorError naming what is missing."""
        return self.finish(self._assembly.finish(), self._digests)

    def _hash(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith(CONSTANT_PREFIX) and name != CONSTANT_PREFIX + constant_digest(tensor):
                raise TensorError(f"{name!r} does not hold the constant that its name binds")
            self._digests[name] = digest(name, tensor)


class Loading:
    """The states that are on their way, by the stage's key; a state begun anew replaces one that was not ended."""

    def __init__(self) -> None:
        self._arriving: dict[str, Arriving] = {}

    def begin(self, key: str, expected: Expected, finish: Finish) -> None:
        """Allocate what is to come."""
        self._arriving.pop(key, None)  # first, so that its memory is free
        self._arriving[key] = Arriving(expected, finish)

    def put(self, key: str, part: int, data: memoryview) -> None:
        """Take a part."""
        self._of(key).put(part, data)

    def end_with(self, key: str, state: State) -> dict[str, Any]:
        """The answer of `finish`, for a whole state that was here already, in place of parts."""
        finish = self._of(key).finish
        self.drop(key)
        return finish(state, None)

    def end(self, key: str) -> dict[str, Any]:
        """The answer of `finish`; after an error, missing parts may still come."""
        answer = self._of(key).end()
        self.drop(key)
        return answer

    def drop(self, key: str) -> None:
        """The stage is gone, or nobody waits for its state any more."""
        self._arriving.pop(key, None)

    def _of(self, key: str) -> Arriving:
        arriving = self._arriving.get(key)
        if arriving is None:
            raise ProtocolError(
                f"no state is on its way to stage {key!r:.80}: begin with load, set_state or set_optimizer_state"
            )
        return arriving
