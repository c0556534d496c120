"""A peer decides what it sends; a rig decides how much of it is taken."""

from __future__ import annotations

import gc

import pytest

from smartnodes_core.arena import Arena
from smartnodes_core.errors import BusyError
from tensorlink.inflight import Inflight


@pytest.fixture
def arena():
    made = Arena.create(1 << 20, "inbound")
    yield made
    made.close()


def test_a_stage_holds_no_more_than_its_limit(arena):
    inflight = Inflight(limit_bytes=1000)
    first, view = inflight.reserve(arena, "a", 600)
    assert len(view) == 600
    with pytest.raises(BusyError, match="600 bytes of tensors wait for this stage and 600 more"):
        inflight.reserve(arena, "a", 600)
    inflight.reserve(arena, "b", 600)
    offset = first.keep()
    inflight.released(offset)
    arena.free(offset)
    inflight.reserve(arena, "a", 600)


def test_a_body_that_never_came_gives_its_memory_back(arena):
    inflight = Inflight(limit_bytes=1000)
    free = repr(arena)
    reserved, view = inflight.reserve(arena, "a", 900)
    del reserved, view
    gc.collect()
    reserved, _ = inflight.reserve(arena, "a", 900)
    assert inflight.of("a") == 900
    inflight.released(reserved.keep())
    arena.free(reserved.offset)
    assert inflight.of("a") == 0
    assert repr(arena) == free


def test_what_was_kept_is_freed_by_the_computing_process_alone(arena):
    inflight = Inflight(limit_bytes=1000)
    reserved, _ = inflight.reserve(arena, "a", 100)
    reserved.keep()
    del reserved
    gc.collect()
    inflight.reserve(arena, "a", 100)
    assert inflight.of("a") == 200


def test_an_empty_tensor_has_a_place_of_its_own(arena):
    inflight = Inflight()
    one, view = inflight.reserve(arena, "a", 0)
    other, _ = inflight.reserve(arena, "a", 0)
    assert len(view) == 0
    assert one.offset != other.offset


def test_offsets_of_calls_bodies_are_not_counted(arena):
    inflight = Inflight()
    inflight.released(arena.allocate(64, 1.0).offset)
    assert inflight.of("a") == 0
