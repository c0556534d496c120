"""Slices never overlap, are aligned, come back, and a full arena says so."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartnodes_core.arena import ALIGNMENT_BYTES, Arena, FirstFit
from smartnodes_core.errors import BusyError, ProtocolError


@pytest.fixture
def arena():
    made = Arena.create(1 << 16, "inbound")
    yield made
    made.close()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 5000), st.integers(-50, -1)), max_size=80))
def test_pieces_are_aligned_apart_and_join_again(requests):
    pieces = FirstFit(20_000)
    taken = {}
    for request in requests:
        if request < 0 and taken:
            offset = sorted(taken)[request % len(taken)]
            assert pieces.give_back(offset) >= taken.pop(offset)
        elif request >= 0:
            offset = pieces.take(request)
            if offset is None:
                assert pieces.largest_free_bytes < max(request, 1) or pieces.largest_free_bytes < ALIGNMENT_BYTES
                continue
            assert offset % ALIGNMENT_BYTES == 0
            assert offset + request <= 20_000
            assert all(offset + max(request, 1) <= o or o + max(n, 1) <= offset for o, n in taken.items())
            taken[offset] = request
    for offset in taken:
        pieces.give_back(offset)
    assert pieces.free_bytes == pieces.largest_free_bytes == pieces.num_bytes


def test_both_ends_see_the_same_memory(arena):
    other = Arena.attach(arena.fd, arena.num_bytes, "inbound")
    piece = arena.allocate(100, 0.0)
    piece.view[:] = bytes(range(100))
    assert bytes(other.view(piece.offset, 100)) == bytes(range(100))


def test_a_full_arena_names_what_is_needed_what_is_free_and_the_setting(arena):
    arena.allocate(60_000, 0.0)
    with pytest.raises(BusyError, match=r"6000 bytes needed.*5504 in one piece.*raise inbound_bytes"):
        arena.allocate(6000, 0.01)


def test_what_never_fits_is_refused_at_once(arena):
    with pytest.raises(BusyError):
        arena.allocate(1 << 20, 60.0)


def test_a_waiting_request_gets_what_is_freed(arena):
    first = arena.allocate(60_000, 0.0)
    timer = threading.Timer(0.05, arena.free, [first.offset])
    timer.start()
    assert arena.allocate(50_000, 10.0).offset == first.offset
    timer.join()


def test_closing_ends_a_wait(arena):
    arena.allocate(60_000, 0.0)
    threading.Timer(0.05, arena.close).start()
    with pytest.raises(BusyError):
        arena.allocate(60_000, 10.0)


def test_freeing_twice_is_a_fault(arena):
    piece = arena.allocate(10, 0.0)
    arena.free(piece.offset)
    with pytest.raises(ProtocolError, match="no slice"):
        arena.free(piece.offset)


@pytest.mark.parametrize(("offset", "num_bytes"), [(-64, 10), (1, 10), (0, 1 << 20), (1 << 16, 1), (0, -1)])
def test_a_view_outside_or_unaligned_is_a_fault(arena, offset, num_bytes):
    with pytest.raises(ProtocolError):
        arena.view(offset, num_bytes)


def test_large_slices_give_their_pages_back():
    with_room = Arena.create(1 << 30, "inbound")
    piece = with_room.allocate(64 << 20, 0.0)
    piece.view[:5] = b"12345"
    with_room.free(piece.offset)
    assert bytes(with_room.view(piece.offset, 5)) in (bytes(5), b"12345")  # zeroed where the system can punch holes
    with_room.close()
