"""What the computing process serves about a stage's state: read, replaced, kept for a take-over, taken from one.

`state`, `optimizer_state` read what is in force, `set_state`, `set_optimizer_state` begin to replace it (`load_part`
and `load_end` follow). `snapshot` shows the state with which a committed step began, part by part (`snapshot_part`);
`restore` begins a stage in the state that an older plan's stage on this rig has kept, and `state_root` says in which
state a stage is, for who compares. Neighbours: `compute_stages.py` has the stages, `stage_loading.py` what arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from smartnodes_core.errors import AuditError, ProtocolError
from smartnodes_core.sandbox_child import ChildChannel
from tensorlink.audit.opening import Opened
from tensorlink.audit.openings import Openings
from tensorlink.compute_port import put
from tensorlink.hosted import Hosted
from tensorlink.program.weights import dump
from tensorlink.records import state_root
from tensorlink.stage_loading import Loading
from tensorlink.steplog.digests import root
from tensorlink.steplog.shelf import from_shelf
from tensorlink.steplog.snapshots import Snapshot

REPLY_TIMEOUT_S = 30.0


class StateDesk:
    """Serves the calls; `of` finds the stage that a call names."""

    def __init__(self, channel: ChildChannel, of: Callable[[dict[str, Any]], Hosted], loading: Loading) -> None:
        self._channel, self._of, self._loading = channel, of, loading
        self._snapshots = Openings()  # apart from those of auditors, which authors must not be able to push out
        self.methods: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "state": self.state,
            "optimizer_state": self.optimizer_state,
            "set_state": self.set_state,
            "set_optimizer_state": self.set_optimizer_state,
            "snapshot": self.snapshot,
            "snapshot_part": self.snapshot_part,
            "restore": self.restore,
            "state_root": self.state_root,
        }

    def state(self, params: dict[str, Any]) -> dict[str, Any]:
        stage = self._of(params).stage
        held = {**stage.parameters, **stage.buffers}
        names = _names(params, held)
        return put(self._channel, dump({name: held[name] for name in names}), REPLY_TIMEOUT_S)

    def optimizer_state(self, params: dict[str, Any]) -> dict[str, Any]:
        stage = self._of(params).stage
        state = stage.optimizer.state_tensors() if stage.optimizer else {}
        names = set(_names(params, stage.parameters))
        wanted = {name: state[name] for name in state if name.rpartition("/")[0] in names}
        return put(self._channel, dump(wanted), REPLY_TIMEOUT_S)

    def set_state(self, params: dict[str, Any]) -> dict[str, Any]:
        """Begins to take new values of the parameters and buffers in `names`; they take effect with `load_end`."""
        one = self._of(params)
        program, expected = one.stage.program, one.stage.program.expected_state()

        def finish(state: dict[str, Tensor], digests: Mapping[str, bytes] | None) -> dict[str, Any]:
            one.wait_for_hashing()
            one.stage.set_state(
                {name: tensor for name, tensor in state.items() if name in program.parameters},
                {name: tensor for name, tensor in state.items() if name in program.buffers},
            )
            one.roots.forget()
            return {}

        self._loading.begin(one.key, {name: expected[name] for name in _names(params, expected)}, finish)
        return {}

    def set_optimizer_state(self, params: dict[str, Any]) -> dict[str, Any]:
        """Begins to take the optimizer state in `names` ("parameter/state name"); it takes effect with `load_end`."""
        one = self._of(params)
        if one.stage.optimizer is None:
            raise ProtocolError("no optimizer is set whose state this could be")

        def finish(state: dict[str, Tensor], digests: Mapping[str, bytes] | None) -> dict[str, Any]:
            one.wait_for_hashing()
            one.stage.set_optimizer_state(state)
            one.roots.forget()
            return {}

        self._loading.begin(one.key, one.stage.optimizer.expected_state(_texts(params.get("names"))), finish)
        return {}

    def snapshot(self, params: dict[str, Any]) -> dict[str, Any]:
        """The state before a committed step with which an interval began: `items` (labels `weights/NAME`,
        `buffers/NAME`, `optimizer/NAME`) lie one after the other in `num_bytes`, which `snapshot_part` gives; of one
        stage one snapshot is held at a time. Raises AuditError where it is not held."""
        one = self._of(params)
        kept = _kept(one, int(params["step"]))
        opened = Opened()
        for part in ("weights", "buffers", "optimizer"):
            opened.add_all(part, getattr(kept, part))
        self._snapshots.drop(one.key)
        number = self._snapshots.begin(one.key, opened, kept)
        return {"items": opened.items, "opening": number, "num_bytes": opened.num_bytes}

    def snapshot_part(self, params: dict[str, Any]) -> dict[str, Any]:
        """Bytes `at` and following of what `snapshot` named. Raises AuditError if it was given up."""
        number, at, num_bytes = (int(params[name]) for name in ("opening", "at", "num_bytes"))
        return self._snapshots.part(self._channel, number, at, num_bytes)

    def drop(self, key: str) -> None:
        """The stage is gone."""
        self._snapshots.drop(key)

    def restore(self, params: dict[str, Any]) -> dict[str, Any]:
        """Ends the loading of a stage, or of its optimizer's state, with what the stage `source` on this rig began
        `step` with. Raises AuditError where it is not held."""
        source = self._of({"key": params["source"]})
        kept = _kept(source, int(params["step"]))
        optimizer = params["part"] == "optimizer"
        held = kept.optimizer if optimizer else {**kept.weights, **kept.buffers}
        state = {name: tensor.detach().clone() for name, tensor in from_shelf(dict(held)).items()}
        if optimizer:
            self._of(params).stage.set_optimizer_state(state)
            return {}
        return self._loading.end_with(str(params["key"]), state)

    def state_root(self, params: dict[str, Any]) -> dict[str, Any]:
        """The root of the state that a stage is in; see `tensorlink.records.state_root`."""
        one = self._of(params)
        one.wait_for_hashing()
        stage = one.stage
        optimizer = stage.optimizer.state_tensors() if stage.optimizer else {}
        parts = {"weights": root(stage.parameters), "buffers": root(stage.buffers), "optimizer": root(optimizer)}
        return {"state_root": state_root(parts)}


def _kept(one: Hosted, step: int) -> Snapshot:
    """What a stage began a step with, in the place of tensors on the shelf `Shelved` ones."""
    one.wait_for_hashing()
    record = one.stage.log.committed(step)
    if record is None or record.before is None:
        raise AuditError(f"the state before step {step} is not held: it is kept where an interval of steps begins")
    return record.before


def _names(params: dict[str, Any], held: Collection[str]) -> list[str]:
    """The names that a call asks for, all where it names none."""
    if params.get("names") is None:
        return list(held)
    names = _texts(params["names"])
    if not all(name in held for name in names):
        raise ProtocolError("names are a list of what this stage holds")
    return names


def _texts(names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ProtocolError("names are a list of texts")
    return names
