"""Tensors that stay in safetensors files: where each lies, read a piece at a time when somebody needs it.

Nothing is mapped into memory, for pages of a mapping count as this process's own. A header is distrusted as a peer's
is (`program/weights.py`): files come from strangers too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smartnodes_core.nesting import bounded_json
from tensorlink.errors import InputError, TensorError
from tensorlink.program.values import DTYPES
from tensorlink.program.weights import read_header, writable_bytes

Weights = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: An index lists names only; that of the largest public model takes a few MB.
MAX_INDEX_BYTES = 256 << 20


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file, its bytes beginning at `at`."""

    path: Path
    at: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read_into(self, begin: int, target: memoryview) -> None:
        """Fill `target` with the tensor's bytes from `begin` on. Raises InputError if the file has become shorter."""
        with _opened(self.path) as file:
            file.seek(self.at + begin)
            while len(target):
                count = file.readinto(target)
                if not count:
                    raise InputError(f"{self.path} has become shorter while it was read")
                target = target[count:]

    def read(self) -> Tensor:
        """The whole tensor, newly allocated."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(0, writable_bytes(tensor))
        return tensor


def open_weights(weights: Weights) -> dict[str, FileTensor]:
    """What the files hold, by name: one file, several, an index as transformers writes it, or a folder with either.

    Raises InputError for a file that is missing, malformed or truncated, and for a name that occurs twice.
    """
    found: dict[str, FileTensor] = {}
    for path in _files([weights] if isinstance(weights, str | os.PathLike) else weights):
        for name, tensor in _tensors_of(path):
            if name in found:
                raise InputError(f"{name} is in {found[name].path} and in {path}: each tensor once is needed")
            found[name] = tensor
    return found


def _files(weights: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    if not weights:
        raise InputError("weights names no file: pass safetensors files, or a folder that has them")
    for given in map(Path, weights):
        if given.is_dir() and (given / INDEX).exists():
            yield from _indexed(given / INDEX)
        elif given.is_dir():
            files = [given / SINGLE] if (given / SINGLE).exists() else sorted(given.glob("*.safetensors"))
            if not files:
                raise InputError(f"found no safetensors file in the folder {given}, needed {INDEX} or *.safetensors")
            yield from files
        elif given.suffix == ".json":
            yield from _indexed(given)
        else:
            yield given


def _indexed(index: Path) -> list[Path]:
    """The files that an index names, each in the index's own folder."""
    with _opened(index) as file:
        text = file.read(MAX_INDEX_BYTES + 1)
    try:
        named = bounded_json(text)["weight_map"] if len(text) <= MAX_INDEX_BYTES else None
    except (ValueError, KeyError, TypeError):
        named = None
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise InputError(f"{index} is no index of safetensors files: a map weight_map of names to files is needed")
    outside = sorted(name for name in set(named.values()) if Path(name).name != name)
    if outside:
        raise InputError(f"{index} names {outside[0]!r:.80}, which is not a file of its own folder")
    files = [index.parent / name for name in sorted(set(named.values()))]
    held = {name for path in files for name, _ in _tensors_of(path)}
    missing = sorted(named.keys() - held)
    if missing:
        raise InputError(f"{index} names {json.dumps(missing[:5])}, which its files do not hold")
    return files


def _tensors_of(path: Path) -> Iterator[tuple[str, FileTensor]]:
    with _opened(path) as file:

        def read(at: int, num_bytes: int) -> bytes:
            file.seek(at)
            data: bytes = file.read(num_bytes)
            return data

        try:
            entries, start = read_header(read, os.fstat(file.fileno()).st_size)
        except TensorError as error:
            raise InputError(f"{path} is no whole safetensors file: {error}") from None
    for name, (dtype, shape, begin, end) in entries.items():
        yield name, FileTensor(path, start + begin, end - begin, DTYPES[dtype], shape)


def _opened(path: Path) -> Any:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise InputError(f"weights cannot be read: {error}") from None
