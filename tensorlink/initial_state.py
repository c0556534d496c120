"""The values from which stages start: tensors in memory, or in files from which they are read while they are sent.

Of a model that is larger than memory, nobody here holds more than a part at a time (`program/parts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from tensorlink.errors import InputError
from tensorlink.program.initialiser import initialised
from tensorlink.program.trace import TracedModel
from tensorlink.program.values import DTYPE_NAMES
from tensorlink.program.weights import writable_bytes
from tensorlink.records import PART_BYTES, streamed_digest
from tensorlink.weight_files import FileTensor, Weights, open_weights

Source = Tensor | FileTensor
Sources = Mapping[str, Source]


def initial_values(module: nn.Module, traced: TracedModel, weights: Weights | None) -> dict[str, Source]:
    """A value for every tensor of the traced module, by canonical name: from the files where they have it, else the
    module's own.

    Buffers on the meta device that no state_dict holds are computed as the model's initialiser does. Raises InputError
    naming what no file has, what the module has not, and what is of another dtype or shape.
    """
    own: dict[str, Tensor] = {**traced.parameters, **traced.buffers, **traced.constants}
    found = _from_files(traced, own, open_weights(weights)) if weights is not None else {}
    lacking = [name for name, tensor in own.items() if tensor.is_meta and name not in found]
    buffers = [name for name in lacking if name in traced.buffers and not traced.buffer_specs[name].persistent]
    computed = initialised(module, buffers)
    missing = [name for name in lacking if name not in buffers]
    if missing:
        raise InputError(
            f"{_listed(missing)} on the meta device, without values: pass weights=, safetensors files that have them"
        )
    unknown = [name for name in buffers if name not in computed]
    if unknown:
        raise InputError(_no_values(unknown))
    return {name: found.get(name, computed.get(name, _contiguous(tensor))) for name, tensor in own.items()}


def _from_files(traced: TracedModel, own: Mapping[str, Tensor], files: dict[str, FileTensor]) -> dict[str, FileTensor]:
    """The files' tensors by canonical name. A name that the files lack is an error where the module has no values."""
    found: dict[str, FileTensor] = {}
    unexpected = []
    for given, tensor in files.items():
        name = traced.aliases.get(given, given)
        if name not in own or name in traced.constants:
            unexpected.append(given)
            continue
        needed = own[name]
        if (tensor.dtype, tensor.shape) != (needed.dtype, tuple(needed.shape)):
            raise InputError(
                f"{given} is {_form(tensor)} in {tensor.path}, the module has {_form(needed)}: build the module as "
                "the files are; module.to(dtype) works on the meta device"
            )
        if name in found and _content(found[name]) != _content(tensor):
            raise InputError(f"{given} and {name} are one tensor in the module, and differ in the files")
        found[name] = tensor
    missing = [name for name in traced.parameters if name not in found and own[name].is_meta]
    missing += [name for name in traced.buffers if name not in found and own[name].is_meta and _kept(traced, name)]
    if missing or unexpected:
        raise InputError(
            f"the weights files do not fit the module: missing {missing[:5]} ({len(missing)} in all), unexpected "
            f"{unexpected[:5]} ({len(unexpected)} in all): the names of module.state_dict() are needed"
            + _prefix(missing, unexpected)
        )
    return found


def _kept(traced: TracedModel, name: str) -> bool:
    return traced.buffer_specs[name].persistent


def _prefix(missing: list[str], unexpected: list[str]) -> str:
    """What the names differ in, where it is only what stands before them."""
    for name in missing[:1]:
        for other in unexpected:
            if other.endswith(f".{name}"):
                return f". The files' names begin with {other.removesuffix(name)!r}, the module's do not"
            if name.endswith(f".{other}"):
                return f". The module's names begin with {name.removesuffix(other)!r}, the files' do not"
    return ""


def _no_values(names: list[str]) -> str:
    owner, _, attribute = names[0].rpartition(".")
    target = f"module.get_submodule({owner!r}).{attribute}" if owner else f"module.{attribute}"
    return (
        f"{_listed(names)} on the meta device, and no state_dict holds them (they are registered with "
        "persistent=False): give them the values that the constructor computes, made outside of "
        f"torch.device('meta'), before the module is wrapped: {target} = …"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more} {'is' if len(names) == 1 else 'are'}"


def _form(tensor: Source) -> str:
    return f"{DTYPE_NAMES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}"


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


# -- reading ----------------------------------------------------------------------------------------------------------


def read(source: Source, begin: int, end: int, scratch: memoryview) -> memoryview:
    """Bytes `begin` to `end` of a contiguous tensor: the tensor's own memory, or `scratch`, into which a file's are
    read."""
    if isinstance(source, FileTensor):
        source.read_into(begin, scratch[: end - begin])
        return scratch[: end - begin]
    return writable_bytes(source.detach().reshape(-1).view(torch.uint8)[begin:end].cpu())


def value_of(source: Source) -> Tensor:
    """The whole tensor, a copy."""
    return source.read() if isinstance(source, FileTensor) else source.detach().clone()


def digest_of(name: str, source: Source, on_bytes: Callable[[int], object] = lambda num_bytes: None) -> bytes:
    """The tensor's digest, of a file's with no more than a part of it in memory. `on_bytes` hears of progress."""

    def pieces() -> Iterator[memoryview]:
        for begin in range(0, num_bytes, PART_BYTES):
            end = min(begin + PART_BYTES, num_bytes)
            yield read(source, begin, end, scratch)
            on_bytes(end - begin)

    num_bytes = num_bytes_of(source)
    scratch = memoryview(bytearray(min(PART_BYTES, num_bytes) if isinstance(source, FileTensor) else 0))
    return streamed_digest(name, DTYPE_NAMES[source.dtype], list(source.shape), pieces())


def num_bytes_of(source: Source) -> int:
    """The tensor's size."""
    return source.num_bytes if isinstance(source, FileTensor) else source.numel() * source.element_size()


def _content(tensor: FileTensor) -> bytes:
    return digest_of("", tensor)
