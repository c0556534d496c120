"""Records that speak of tensors: identities, digests, the cut between stages, the optimizer's messages.

Frozen by golden bytes like those of `smartnodes_core.records`. No torch here: the node process reads these too.

A tensor's digest is computed over its contiguous little-endian bytes in leaves of 1 MiB, BLAKE3 keyed with one key
for leaves and another for inner nodes (so that no inner node passes for a leaf), and bound to name, dtype, shape and
byte count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from blake3 import blake3
from msgspec import Meta

from smartnodes_core.records import Count, Digest, Name, Record, canonical, digest_of

LEAF_BYTES = 1 << 20
#: Weights cross in parts of this length: of these a sender holds a few, a receiver one at a time.
PART_BYTES = 4 * LEAF_BYTES

_LEAF_KEY = digest_of("tensor leaf key", b"")
_NODE_KEY = digest_of("tensor node key", b"")

Shape = Annotated[list[Count], Meta(max_length=32)]
Buffer = bytes | bytearray | memoryview


class Slot(Record, frozen=True, kw_only=True, tag="Slot/1"):
    """One value that crosses a cut. `shape` has -1 where the batch size stands; a symint has an empty shape."""

    name: Name
    type: Literal["tensor", "symint"]
    dtype: Name
    shape: Annotated[list[Annotated[int, Meta(ge=-1, lt=1 << 48)]], Meta(max_length=32)]
    requires_grad: bool


class Cut(Record, frozen=True, kw_only=True, tag="Cut/1"):
    """The ordered values that cross from one stage to the next (or into the first, or out of the last)."""

    slots: Annotated[list[Slot], Meta(max_length=1024)]


class TensorId(Record, frozen=True, kw_only=True, tag="TensorId/1"):
    """Names one tensor of a running job, so that a duplicate, a late retry or a reordering is never counted twice.

    `stage` is the stage that receives; `slot` the index in the cut; `call` counts forwards since the last step;
    `backward_pass` backwards through that forward (0 for what moves forward).
    """

    job: Digest
    plan_version: Count
    replica: Count
    step: Count
    call: Count
    micro_batch: Count
    stage: Count
    slot: Count
    type: Literal["activation", "activation_gradient", "target", "output"]
    backward_pass: Count


class StepOrder(Record, frozen=True, kw_only=True, tag="StepOrder/2"):
    """What the user asks of one step, signed: nothing of it is left to a worker.

    `input_root` and `target_root` bind what the user sends (32 zero bytes where nothing is). `optimizer` is the name
    on the allowlist of `stage_optimizer.py`; `options` holds one map per parameter group, floats as `float.hex()`
    text, with the key
    `parameters` for the names in the group. `loss` is the digest of the loss program of `train_step` (32 zero bytes
    for the drop-in loop) and `loss_weights` what each micro-batch's loss counts, as `float.hex()`; `loss_scale` and
    `clip_norm` likewise ("" for none). `replaced` names what of the state the user has replaced since the last step.
    """

    job: Digest
    plan_version: Count
    step: Count
    input_root: Digest
    target_root: Digest
    loss: Digest
    loss_weights: Annotated[list[Name], Meta(max_length=65536)]
    loss_scale: Name
    clip_norm: Name
    optimizer: Name
    options: Annotated[list[dict[Name, int | Name | bool | list[Name] | None]], Meta(max_length=256)]
    replaced: Annotated[list[Literal["weights", "buffers", "optimizer"]], Meta(max_length=3)]


class Prepare(Record, frozen=True, kw_only=True, tag="Prepare/1"):
    """Asks a stage whether it can commit the step: are all micro-batches in, are the gradients finite."""

    job: Digest
    plan_version: Count
    step: Count
    num_units: Count


class Prepared(Record, frozen=True, kw_only=True, tag="Prepared/1"):
    """A stage's answer: its squared gradient norm as `float.hex()`, and the first tensor that is not finite ("" for
    none).
    """

    job: Digest
    plan_version: Count
    step: Count
    stage: Count
    squared_norm: Name
    non_finite: Name


class Decide(Record, frozen=True, kw_only=True, tag="Decide/1"):
    """Commit on every stage or on none. `clip_coefficient` is `float.hex()` text; `order` the digest of the
    `StepOrder`.
    """

    job: Digest
    plan_version: Count
    step: Count
    decision: Literal["commit", "abort"]
    clip_coefficient: Name
    order: Digest


def tensor_digest(name: str, dtype: str, shape: list[int] | tuple[int, ...], data: Buffer) -> bytes:
    """32 bytes that bind a tensor's bytes to its name, dtype, shape and byte count.

    `data` is C-contiguous and little-endian; `dtype` is torch's name without the prefix, such as "float32".
    """
    return streamed_digest(name, dtype, shape, [data])


def streamed_digest(name: str, dtype: str, shape: list[int] | tuple[int, ...], pieces: Iterable[Buffer]) -> bytes:
    """The same of a tensor that comes in pieces, each but the last a multiple of LEAF_BYTES long."""
    level: list[bytes] = []
    num_bytes = 0
    for data in pieces:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        num_bytes += len(view)
        level += [blake3(view[at : at + LEAF_BYTES], key=_LEAF_KEY).digest() for at in range(0, len(view), LEAF_BYTES)]
    while len(level) > 1:
        paired = [blake3(level[i] + level[i + 1], key=_NODE_KEY).digest() for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(paired) * 2 :]
    meta = canonical({"name": name, "dtype": dtype, "shape": list(shape), "num_bytes": num_bytes})
    return blake3(meta + b"".join(level), key=_NODE_KEY).digest()


def state_root(parts: Mapping[str, bytes]) -> bytes:
    """The root of a stage's whole state, from those of its `weights`, `buffers` and `optimizer`: what a plan names for
    a stage that goes on."""
    return set_root({part: parts[part] for part in ("weights", "buffers", "optimizer")})


def set_root(digests: dict[str, bytes]) -> bytes:
    """The root over a set of named digests, whatever order they came in."""
    return digest_of("tensor set", canonical(digests))
