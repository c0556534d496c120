"""A stage's state in the computing process: whatever an author sends, it is what the program declares or an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smartnodes_core.errors import ProtocolError
from tensorlink.audit.commitments import initial_root, initial_root_of
from tensorlink.errors import TensorError
from tensorlink.program.parts import Parts
from tensorlink.program.trace import trace
from tensorlink.program.weights import CONSTANT_PREFIX, tensor_bytes
from tensorlink.stage_loading import Loading


class Shifted(nn.Module):
    """A megabyte more than a part, and a constant."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(1100, 1200), nn.Linear(1200, 2)

    def forward(self, x):
        return self.narrow(self.wide(x)) + torch.tensor([1.0, 2.0])


@pytest.fixture(scope="module")
def traced():
    return trace(Shifted(), (torch.ones(2, 1100),))


@pytest.fixture
def state(traced):
    return traced.state(traced.whole())


@pytest.fixture
def loading(traced):
    made = Loading()
    made.begin("k", traced.whole().expected_state(), lambda state, digests: {"state": state, "digests": digests})
    return made


def parts_of(program, state):
    for part in range(len(parts := Parts(program.expected_state()))):
        pieces = parts.pieces(part)
        yield memoryview(b"".join(bytes(tensor_bytes(state[name])[begin:end]) for name, begin, end in pieces))


def test_the_root_is_that_of_the_job_record(loading, traced, state):
    parts = list(parts_of(traced.whole(), state))
    assert len(parts) == 2
    for part in (1, 0):
        loading.put("k", part, parts[part])
    answer = loading.end("k")
    assert initial_root_of(traced.whole(), answer["digests"]) == initial_root(traced.whole(), state)
    assert all(torch.equal(answer["state"][name], tensor) for name, tensor in state.items())
    with pytest.raises(ProtocolError, match="begin with load"):
        loading.end("k")


def test_a_constant_that_is_not_the_one_its_name_binds_is_refused(loading, traced, state):
    changed = {name: t + 1 if name.startswith(CONSTANT_PREFIX) else t for name, t in state.items()}
    first, _ = parts_of(traced.whole(), changed)  # the constant's name comes before the others
    with pytest.raises(TensorError, match="does not hold the constant that its name binds"):
        loading.put("k", 0, first)


def test_a_state_that_is_not_whole_does_not_begin_and_what_is_missing_may_still_come(loading, traced, state):
    first, second = parts_of(traced.whole(), state)
    loading.put("k", 0, first)
    with pytest.raises(TensorError, match=r"missing are .* bytes of 'wide\.weight'"):
        loading.end("k")
    loading.put("k", 1, second)
    assert loading.end("k")["state"].keys() == state.keys()


def test_a_state_begun_anew_replaces_one_that_was_not_ended(loading, traced, state):
    first, second = parts_of(traced.whole(), state)
    loading.put("k", 0, first)
    loading.begin("k", traced.whole().expected_state(), lambda state, digests: {})
    loading.put("k", 0, first)
    loading.put("k", 1, second)
    assert loading.end("k") == {}


def test_a_stage_that_is_dropped_takes_no_parts(loading, traced, state):
    loading.drop("k")
    with pytest.raises(ProtocolError, match="no state is on its way"):
        loading.put("k", 0, next(parts_of(traced.whole(), state)))
