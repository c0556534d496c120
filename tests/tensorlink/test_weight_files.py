"""Weights in files: found by name, read a piece at a time, and a broken file is named."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from tensorlink.errors import InputError
from tensorlink.program.alignment import is_aligned
from tensorlink.weight_files import INDEX, open_weights

ONE = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5, 4), "c": torch.randn(3).to(torch.bfloat16)}
TWO = {"d": torch.tensor(7), "e": torch.empty(0, 4)}


@pytest.fixture
def folder(tmp_path):
    safetensors.torch.save_file(ONE, tmp_path / "one.safetensors")
    safetensors.torch.save_file(TWO, tmp_path / "two.safetensors", metadata={"format": "pt"})
    return tmp_path


def index(folder, **weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_whole(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        read = found[name].read()
        assert torch.equal(read, tensor)
        assert read.dtype == tensor.dtype
        assert is_aligned(read)


def test_one_file_several_and_a_folder_hold_what_the_library_wrote(folder):
    one, two = folder / "one.safetensors", folder / "two.safetensors"
    assert_whole(open_weights(one), ONE)
    assert_whole(open_weights(str(two)), TWO)
    assert_whole(open_weights([one, str(two)]), ONE | TWO)
    assert_whole(open_weights(folder), ONE | TWO)


def test_an_index_says_which_files_of_its_folder_count(folder):
    index(folder, a="one.safetensors", b="one.safetensors", c="one.safetensors")
    assert_whole(open_weights(folder), ONE)
    assert_whole(open_weights(folder / INDEX), ONE)


def test_a_model_in_one_file_has_the_librarys_name_for_it(folder):
    safetensors.torch.save_file(TWO, folder / "model.safetensors")
    assert_whole(open_weights(folder), TWO)


def test_a_piece_is_read_without_the_rest(folder):
    tensor = open_weights(folder)["b"]
    target = bytearray(10)
    tensor.read_into(13, memoryview(target))
    assert bytes(target) == ONE["b"].numpy().tobytes()[13:23]


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"x": "one.safetensors"}, "'?x'?.*do not hold"),
        ({"a": "../one.safetensors"}, "not a file of its own folder"),
        ({"a": "/etc/passwd"}, "not a file of its own folder"),
        ({"a": "three.safetensors"}, "No such file"),
        ({"a": 5}, "weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_folder_is_refused(folder, weight_map, says):
    index(folder, **weight_map)
    with pytest.raises(InputError, match=says):
        open_weights(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(InputError, match=r"no index of safetensors files"):
        open_weights(folder)


def test_a_name_in_two_files_is_refused(folder):
    safetensors.torch.save_file({"a": torch.ones(2)}, folder / "three.safetensors")
    with pytest.raises(InputError, match=r"a is in .*one\.safetensors and in .*three\.safetensors"):
        open_weights(folder)


def test_nothing_where_files_should_be_is_named(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        open_weights(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="found no safetensors file in the folder"):
        open_weights(tmp_path)
    with pytest.raises(InputError, match="names no file"):
        open_weights([])


def test_a_truncated_file_is_named_at_any_length(folder):
    path = folder / "one.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"one\.safetensors is no whole safetensors file"):
            open_weights(path)


def test_a_header_over_the_cap_is_not_read(tmp_path):
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(1 << 42)
    with pytest.raises(InputError, match=r"header of 1099511627776 bytes.* at most"):
        open_weights(path)


def test_a_file_that_became_shorter_meanwhile_is_named(folder):
    tensor = open_weights(folder)["b"]
    with tensor.path.open("rb+") as file:
        file.truncate(tensor.at + 3)
    with pytest.raises(InputError, match=r"one\.safetensors has become shorter"):
        tensor.read()
