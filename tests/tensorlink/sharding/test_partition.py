"""Where models are cut, what crosses, and what is refused with numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tensorlink.errors import PartitionError
from tensorlink.program.graph import StageProgram
from tensorlink.program.trace import trace
from tensorlink.sharding.balance import Candidate, bottleneck, choose, most_stages, thinned
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile


def _partition(module: nn.Module, x: Tensor, num_stages: int, **kwargs: object) -> list[StageProgram]:
    traced = trace(module, (x,))
    return partition(traced, profile(traced, (x,), measured=False), num_stages, **kwargs)  # type: ignore[arg-type]


def _deep(layers: int, width: int = 64) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))


def _layers(program: StageProgram) -> int:
    return sum(name.endswith("weight") for name in program.parameters)


def test_stages_are_balanced_and_one_tensor_crosses() -> None:
    programs = _partition(_deep(6), torch.randn(32, 64), 3)
    assert [_layers(program) for program in programs] == [2, 2, 2]
    assert [len(program.inputs.slots) for program in programs] == [1, 1, 1]
    assert programs[0].outputs == programs[1].inputs
    assert programs[1].inputs.slots[0].requires_grad
    assert not programs[0].inputs.slots[0].requires_grad


def test_a_faster_worker_gets_more_of_the_model() -> None:
    programs = _partition(_deep(8), torch.randn(32, 64), 2, speeds=[3.0, 1.0])
    assert [_layers(program) for program in programs] == [6, 2]


def test_all_parameters_are_somewhere_exactly_once() -> None:
    module = _deep(5)
    module.register_parameter("unused", nn.Parameter(torch.ones(3)))
    programs = _partition(module, torch.randn(4, 64), 3)
    names = [name for program in programs for name in program.parameters]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())


class Masked(nn.Module):
    """A mask from constants, used by every layer: it is never sent."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("steps", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        mask = (self.steps[:, None] >= self.steps).float() / x.shape[1]
        for layer in self.layers:
            x = torch.tanh(mask @ layer(x)).view(x.shape[0], 8, 16)
        return x


def test_tables_from_constants_are_computed_by_each_stage_and_not_sent() -> None:
    programs = _partition(Masked(), torch.randn(4, 8, 16), 4)
    assert [len(program.inputs.slots) for program in programs] == [1, 1, 1, 1]
    assert all("steps" in program.buffers for program in programs)
    assert all(slot.type == "tensor" for program in programs for slot in program.inputs.slots)


def test_node_ids_are_those_of_the_uncut_program() -> None:
    module, x = _deep(4), torch.randn(4, 64)
    whole = {node.id: node.op for node in trace(module, (x,)).whole().train.nodes}
    cut = {node.id: node.op for program in _partition(module, x, 2) for node in program.train.nodes}
    assert cut == whole


class Tied(nn.Module):
    def __init__(self, middle: int, repeat: int) -> None:
        super().__init__()
        self.first, self.repeat = nn.Linear(32, 32), repeat
        self.middle = nn.Sequential(*(nn.Linear(32, 32) for _ in range(middle)))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.repeat):
            x = torch.tanh(self.first(x))
        x = self.middle(x)
        return x if self.repeat > 1 else self.first(x)


def test_uses_of_a_tied_parameter_stay_together_where_balance_allows() -> None:
    programs = _partition(Tied(middle=2, repeat=2), torch.randn(4, 32), 2)
    assert not any(spec.holders for program in programs for spec in program.parameters.values())


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_a_parameter_on_both_sides_of_a_cut_names_the_stages_that_hold_it(num_stages: int) -> None:
    programs = _partition(Tied(middle=3, repeat=1), torch.randn(4, 32), num_stages)
    holders = {
        program.parameters["first.weight"].holders for program in programs if "first.weight" in program.parameters
    }
    assert holders == {(0, num_stages - 1)}
    assert not any(spec.holders for p in programs for name, spec in p.parameters.items() if name.startswith("middle"))


def test_more_stages_than_layers_are_refused_with_the_number_that_is_possible() -> None:
    with pytest.raises(PartitionError, match=r"5 stages were asked for; the model has 3 layers.*at most 3"):
        _partition(_deep(3), torch.randn(4, 64), 5)


@pytest.mark.parametrize(("num_stages", "kwargs"), [(0, {}), (2, {"speeds": [1.0]}), (2, {"speeds": [1.0, 0.0]})])
def test_arguments_out_of_range_are_refused(num_stages: int, kwargs: dict[str, object]) -> None:
    with pytest.raises(PartitionError):
        _partition(_deep(3), torch.randn(4, 64), num_stages, **kwargs)


class TwoPhased(nn.Module):
    """Computes different things in the two modes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) if self.training else self.b(x.sigmoid())


def test_modes_that_compute_different_things_cannot_be_cut() -> None:
    with pytest.raises(PartitionError, match="training and evaluation mode"):
        _partition(TwoPhased(), torch.randn(2, 8), 2)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(1, 4))
def test_the_choice_is_the_best_of_all(costs: list[int], num_stages: int) -> None:
    from itertools import combinations

    ends = [0]
    for cost in costs:
        ends.append(ends[-1] + cost)
    candidates = [Candidate(at, float(end), 1, at) for at, end in enumerate(ends)]
    chosen = choose(candidates, num_stages, [1.0] * num_stages)
    every = list(combinations(range(1, len(costs)), num_stages - 1))
    if not every:
        assert chosen is None
        assert most_stages(candidates) < num_stages
    else:
        best = min(bottleneck(candidates, cuts, [1.0] * num_stages) for cuts in every)
        assert chosen is not None
        assert bottleneck(candidates, chosen, [1.0] * num_stages) <= best * 1.05 + 1e-9


def test_many_candidates_are_thinned_to_the_cheapest_of_each_stretch() -> None:
    candidates = [Candidate(at, float(at), at % 10, at) for at in range(4001)]
    kept = thinned(candidates)
    assert len(kept) <= 402
    assert (kept[0], kept[-1]) == (candidates[0], candidates[-1])
    assert all(candidate.num_bytes <= 1 for candidate in kept[1:-1])
