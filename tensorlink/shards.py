"""Tensors in a folder as Hugging Face lays them out: safetensors shards, and an index that says what lies where.

Nothing is overwritten. A save writes shards under names of its own, then its index takes the old one's place, which is
the moment from which the folder holds the new tensors; then what no index names any more is removed. Whatever
interrupts it, the folder holds the last save that was finished. What is read is distrusted: sizes and names are checked
against the index, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smartnodes_core.journal import make_durable
from smartnodes_core.nesting import bounded_json
from tensorlink.errors import CheckpointError

INDEX = "model.safetensors.index.json"
#: Readers of Hugging Face's layout take this one before they look for an index.
SINGLE = "model.safetensors"
MAX_JSON_BYTES = 256 << 20

_OURS = re.compile(r"\.?(model|optimizer)-([0-9a-f]{8})(-\d{5}-of-\d{5}\.safetensors|-(\d{5}|index)\.partial|\.json)")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")


class ShardWriter:
    """One save into `folder`, which may hold an earlier one. Use as a context manager: unless `commit` was reached,
    what was written is removed and the folder is as it was. Raises CheckpointError."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        if (self._folder / SINGLE).exists():
            raise CheckpointError(f"{self._folder} holds {SINGLE}, which readers take first: choose another folder")
        self._tag = secrets.token_hex(4)
        self._shards: dict[str, list[tuple[Path, list[str]]]] = {"model": [], "optimizer": []}

    def add(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """One shard of the kind "model" or "optimizer"; it is on the disk when this returns."""
        shards = self._shards[kind]
        path = self._folder / f".{kind}-{self._tag}-{len(shards) + 1:05}.partial"
        shards.append((path, list(tensors)))
        save_file(dict(tensors), path, metadata={"format": "pt"})
        make_durable(path)

    def commit(self, metadata: Mapping[str, Any], optimizer: Mapping[str, Any] | None) -> None:
        """The folder holds this save from here on: `metadata` goes into the index, `optimizer` into a file of its
        own."""
        weight_map, states = self._name("model"), self._name("optimizer")
        metadata = dict(metadata)
        if optimizer is not None:
            metadata["optimizer"] = f"optimizer-{self._tag}.json"
            self._write("optimizer", metadata["optimizer"], {**optimizer, "weight_map": states})
        make_durable(self._folder)
        self._write("model", INDEX, {"metadata": metadata, "weight_map": weight_map})
        make_durable(self._folder)
        self._remove(lambda tag: tag != self._tag)

    def _name(self, kind: str) -> dict[str, str]:
        """The shards get their names; returns the file of every tensor."""
        shards, found = self._shards[kind], {}
        for number, (path, names) in enumerate(shards, 1):
            file = f"{kind}-{self._tag}-{number:05}-of-{len(shards):05}.safetensors"
            path.replace(self._folder / file)
            found.update(dict.fromkeys(names, file))
        return found

    def _write(self, kind: str, name: str, content: Mapping[str, Any]) -> None:
        """JSON that stands there whole or not at all."""
        partial = self._folder / f".{kind}-{self._tag}-index.partial"
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        make_durable(partial)
        partial.replace(self._folder / name)

    def _remove(self, gone: Callable[[str], bool]) -> None:
        for path in self._folder.iterdir():
            match = _OURS.fullmatch(path.name)
            if match is not None and gone(match[2]):
                path.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            index = self._folder / INDEX
            committed = index.exists() and self._tag.encode() in index.read_bytes()
            if not committed:
                self._remove(lambda tag: tag == self._tag)


class ShardReader:
    """What the last finished save left in `folder`. Raises CheckpointError for what is missing, damaged or not ours."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        index = self._json(INDEX)
        metadata = index.get("metadata")
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        self._map = self._map_of(INDEX, index)
        name = self.metadata.get("optimizer")
        self.optimizer: dict[str, Any] | None = None
        if name is not None:
            if not isinstance(name, str) or not _OURS.fullmatch(name):
                raise CheckpointError(f"{INDEX} names {name!r:.80} as the optimizer's file: that is no name of ours")
            self.optimizer = self._json(name)
            self._optimizer_map = self._map_of(name, self.optimizer)

    def weights(self) -> dict[str, Tensor]:
        """The module's tensors by name. They are mapped from the files: reading them is what loads them."""
        return self._tensors(self._map)

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state by parameter."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self._tensors(self._optimizer_map).items():
            parameter, _, key = name.rpartition("/")
            found.setdefault(parameter, {})[key] = tensor
        return found

    def _tensors(self, weight_map: Mapping[str, str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in sorted(set(weight_map.values())):
            names = [name for name, where in weight_map.items() if where == file]
            try:
                with safe_open(self._folder / file, framework="pt") as shard:
                    missing = sorted(set(names) - set(shard.keys()))
                    if missing:
                        raise CheckpointError(f"{file} has no tensor {missing[0]!r:.200}, which the index says it has")
                    found.update({name: shard.get_tensor(name) for name in names})
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} in {self._folder} cannot be read: {error}; take another checkpoint, this one is damaged"
                ) from None
        return found

    def _json(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        try:
            if path.stat().st_size > MAX_JSON_BYTES:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes, at most {MAX_JSON_BYTES} are read")
            content = bounded_json(path.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{self._folder} holds no {name}: no save into it was finished") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {str(error)[:200]}") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds no JSON object")
        return content

    def _map_of(self, name: str, content: Mapping[str, Any]) -> dict[str, str]:
        found = content.get("weight_map")
        if not isinstance(found, dict) or not all(
            isinstance(file, str) and _SHARD.fullmatch(file) for file in found.values()
        ):
            raise CheckpointError(f"{name} has no weight_map of tensor names to files beside it")
        return found
