"""A folder holds the last save that was finished, whatever happened since; damaged files are told from whole ones."""

from __future__ import annotations

import json
import os
import re
import resource

import pytest
import torch
from safetensors.torch import load_file

from tensorlink import shards
from tensorlink.errors import CheckpointError
from tensorlink.shards import INDEX, ShardReader, ShardWriter


class Killed(BaseException):
    pass


WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(7)}


def save(folder, change=0, optimizer=True):
    weights = {name: tensor + change for name, tensor in WEIGHTS.items()}
    with ShardWriter(folder) as writer:
        writer.add("model", {"a": weights["a"]})
        writer.add("model", {"b": weights["b"], "c": weights["c"]})
        if optimizer:
            writer.add("optimizer", {"a/exp_avg": weights["a"] * 2})
        writer.commit({"step": change}, {"optimizer": "Adam"} if optimizer else None)


def assert_holds(folder, change=0):
    reader = ShardReader(folder)
    found = reader.weights()
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], tensor + change) for name, tensor in WEIGHTS.items())
    assert reader.metadata["step"] == change
    assert torch.equal(reader.optimizer_state()["a"]["exp_avg"], (WEIGHTS["a"] + change) * 2)


def test_what_was_saved_is_read_and_laid_out_as_others_expect(tmp_path):
    save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert_holds(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    assert all(re.fullmatch(r"model-[0-9a-f]{8}-0000[12]-of-00002\.safetensors", file) for file in files)
    merged = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    assert all(torch.equal(merged[name], tensor) for name, tensor in WEIGHTS.items())


def test_a_later_save_takes_the_place_of_the_earlier_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-of-mine.safetensors").write_text("")
    save(tmp_path)
    save(tmp_path, 1)
    assert_holds(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 2 + 1 + 2 + 2


def test_a_save_without_optimizer_has_none(tmp_path):
    save(tmp_path)
    save(tmp_path, 1, optimizer=False)
    assert ShardReader(tmp_path).optimizer is None
    assert not list(tmp_path.glob("optimizer*"))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("fails_at", range(1, 9))
def test_an_interrupted_save_leaves_the_last_whole_one(tmp_path, monkeypatch, before, fails_at):
    """Every flush to the disk is a moment at which a save may end."""
    if before:
        save(tmp_path)
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    count, flush = 0, shards.make_durable

    def failing(path):
        nonlocal count
        count += 1
        if count == fails_at:
            raise Killed
        flush(path)

    monkeypatch.setattr(shards, "make_durable", failing)
    try:
        save(tmp_path, 1)
    except Killed:
        if count < 7:  # the seventh follows the moment in which the index takes its place
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held
        else:
            assert_holds(tmp_path, 1)
    else:
        assert count < fails_at
        assert count == 7
        assert_holds(tmp_path, 1)
    monkeypatch.undo()
    save(tmp_path, 2)
    assert_holds(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 1 + 2 + 2


def test_a_process_that_is_killed_leaves_the_last_whole_save_and_what_it_left_is_cleared_away(tmp_path):
    save(tmp_path)
    writer = ShardWriter(tmp_path)
    writer.add("model", WEIGHTS)
    assert_holds(tmp_path)
    save(tmp_path, 1)
    assert_holds(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 1 + 2 + 2


def test_a_folder_with_a_single_file_is_refused_for_readers_would_take_that(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors, which readers take first"):
        ShardWriter(tmp_path)


def first_shard(folder):
    return folder / ShardReader(folder)._map["a"]


def edit(folder, change):
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


def mapped(**names):
    return lambda folder: edit(folder, lambda content: content["weight_map"].update(names))


DAMAGES = {
    "no folder": (lambda f: [path.unlink() for path in f.iterdir()], "holds no model.safetensors.index.json: no save"),
    "a shard is gone": (lambda f: first_shard(f).unlink(), "00001-of-00002.safetensors in .* cannot be read"),
    "a shard is cut off": (lambda f: os.truncate(first_shard(f), 100), "is damaged"),
    "a shard is empty": (lambda f: os.truncate(first_shard(f), 0), "this one is damaged"),
    "an absurd header": (lambda f: first_shard(f).write_bytes(b"\xff" * 64), "this one is damaged"),
    "a huge header": (lambda f: first_shard(f).write_bytes((1 << 40).to_bytes(8, "little") + b"{}"), "is damaged"),
    "a header of other content": (lambda f: first_shard(f).write_bytes(b"\x02" + bytes(7) + b"[]"), "is damaged"),
    "a pickle": (lambda f: torch.save(WEIGHTS, first_shard(f)), "is damaged"),
    "a tensor of another file": (lambda f: mapped(x=first_shard(f).name)(f), "no tensor 'x', which"),
    "a path that leads out": (mapped(a="../a.safetensors"), "no weight_map of"),
    "an absolute path": (mapped(a="/a.safetensors"), "no weight_map of"),
    "no map": (lambda f: edit(f, lambda c: c.pop("weight_map")), "no weight_map of"),
    "another optimizer's file": (lambda f: edit(f, lambda c: c["metadata"].update(optimizer="../x")), "is no name"),
    "the optimizer's file is gone": (lambda f: [p.unlink() for p in f.glob("optimizer-*.json")], "holds no optimizer-"),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), "index.json cannot be read"),
    "deep JSON": (lambda f: (f / INDEX).write_text("[" * 100000), "nested deeper than 64"),
    "a list": (lambda f: (f / INDEX).write_text("[]"), "holds no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path, damage):
    save(tmp_path)
    change, says = DAMAGES[damage]
    change(tmp_path)

    def read():
        reader = ShardReader(tmp_path)
        reader.weights(), reader.optimizer_state()

    with pytest.raises(CheckpointError, match=says):
        read()


def test_an_index_of_absurd_size_is_not_read(tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr(shards, "MAX_JSON_BYTES", 10)
    with pytest.raises(CheckpointError, match="at most 10 are read"):
        ShardReader(tmp_path)


def test_reading_a_folder_takes_no_memory_until_tensors_are_used(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.add("model", {"big": torch.zeros(1 << 26)})
        writer.commit({}, None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert ShardReader(tmp_path).weights()["big"].shape == (1 << 26,)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # in KiB
