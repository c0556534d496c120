"""An opening is taken part by part, and is what it was when it was begun, whatever training does meanwhile."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace

import pytest
import torch

from smartnodes_core.arena import Arena
from smartnodes_core.errors import AuditError
from tensorlink.audit.opening import Opened
from tensorlink.audit.openings import MAX_OPEN, Openings
from tensorlink.errors import TensorError
from tensorlink.steplog.shelf import Shelf

ROOM = 1 << 16


@pytest.fixture
def channel():
    arena = Arena.create(1 << 20, "outbound")
    yield SimpleNamespace(outbound=arena)
    arena.close()


@pytest.fixture
def shelf():
    with tempfile.TemporaryFile() as file:
        yield Shelf(file.fileno(), ROOM)


def opened_of(*tensors):
    opened = Opened()
    for index, tensor in enumerate(tensors):
        opened.add(f"weights/{index}", tensor)
    return opened


def taken(openings, channel, number, num_bytes, size):
    body = b""
    while len(body) < num_bytes:
        part = openings.part(channel, number, len(body), min(size, num_bytes - len(body)))
        body += channel.outbound.view(part["offset"], part["num_bytes"])
    return torch.frombuffer(bytearray(body), dtype=torch.float32).tolist()


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_parts_of_any_size_give_the_body(channel, shelf, size):
    kept = shelf.put(torch.arange(10.0))
    opened = opened_of(torch.tensor(-1.0), kept, torch.empty(0), torch.arange(3.0), kept)
    openings = Openings()
    found = taken(openings, channel, openings.begin("a", opened), opened.num_bytes, size)
    assert found == [-1.0, *map(float, range(10)), *map(float, range(3))]


def test_training_goes_on_while_an_opening_is_taken(channel, shelf):
    in_memory, kept = torch.zeros(8), shelf.put(torch.ones(8))
    free = shelf.free_bytes
    opened = opened_of(in_memory, kept)
    openings = Openings()
    number = openings.begin("a", opened)
    in_memory.fill_(9.0)
    shelf.give_back(kept)
    others = [shelf.put(torch.full((8,), 9.0)) for _ in range(3)]
    assert taken(openings, channel, number, opened.num_bytes, 16) == [0.0] * 8 + [1.0] * 8
    for other in others:
        shelf.give_back(other)
    assert shelf.free_bytes > free


def test_an_opening_ends_with_its_last_part_with_its_stage_or_where_too_many_were_begun(channel, shelf):
    openings, free = Openings(), shelf.free_bytes

    def begun(key):
        kept = shelf.put(torch.ones(4))
        number = openings.begin(key, opened_of(kept))
        shelf.give_back(kept)
        return number

    ended = begun("a")
    openings.part(channel, ended, 0, 16)
    dropped = begun("b")
    openings.drop("b")
    pushed_out = begun("c")
    others = [begun("c") for _ in range(MAX_OPEN)]
    for number in (ended, dropped, pushed_out):
        with pytest.raises(AuditError, match="was given up"):
            openings.part(channel, number, 0, 8)
    with pytest.raises(AuditError, match="17 bytes at 0 of an opening of 16"):
        openings.part(channel, others[0], 0, 17)
    openings.drop("c")
    assert shelf.free_bytes == free


def test_a_part_that_cannot_be_read_takes_no_room_in_the_arena(channel):
    with tempfile.TemporaryFile() as file:
        kept = Shelf(file.fileno(), ROOM).put(torch.ones(8))
        openings = Openings()
        number = openings.begin("a", opened_of(kept))
        file.truncate(4)
        with pytest.raises(TensorError, match="the shelf ends"):
            openings.part(channel, number, 0, 32)
    assert channel.outbound.allocate(channel.outbound.num_bytes, 0.0).offset == 0
