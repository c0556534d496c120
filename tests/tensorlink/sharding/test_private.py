"""Where the user's part of a model ends and the workers' begins."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tensorlink.program.trace import trace
from tensorlink.sharding.partition import partition_between
from tensorlink.sharding.private import Private, PrivateCut
from tensorlink.sharding.profile import profile


class Small(nn.Module):
    """(B, T) tokens to (B, V) logits; what the head reads is pooled, and so smaller than what comes before."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(32, 16), nn.Embedding(8, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return self.head(h.mean(1))


def _cut(private: Private, num_stages: int = 2) -> PrivateCut:
    x = torch.randint(0, 32, (4, 8))
    traced = trace(Small(), (x,))
    return partition_between(traced, profile(traced, (x,), measured=False), num_stages, private)


def test_ends_keep_what_was_named_and_stages_are_counted_without_them() -> None:
    cut = _cut(["token", "position", "layers.3", "head"])
    assert cut.head is not None
    assert cut.tail is not None
    assert list(cut.head.parameters) == ["token.weight", "position.weight"]
    assert list(cut.tail.parameters) == ["layers.3.weight", "layers.3.bias", "head.weight", "head.bias"]
    assert [(stage.stage_index, stage.num_stages) for stage in cut.stages] == [(0, 2), (1, 2)]
    assert cut.head.outputs == cut.stages[0].inputs
    assert cut.stages[-1].outputs == cut.tail.inputs
    assert all(slot.requires_grad for slot in cut.stages[0].inputs.slots)


def test_the_cut_is_where_least_crosses_before_the_next_layer() -> None:
    (slot,) = _cut(["token", "position"]).stages[0].inputs.slots  # their sum, not the two
    assert slot.shape == [-1, 8, 16]
    (slot,) = _cut("last").stages[-1].outputs.slots  # pooled
    assert slot.shape == [-1, 16]


def test_a_parameter_or_a_pattern_names_a_layer_too() -> None:
    by_pattern, by_parameter = _cut(["token", "position", "layers.[01]"]), _cut(["layers.1.bias", "t*", "pos*", "*.0"])
    assert by_pattern.head is not None
    assert by_parameter.head is not None
    assert list(by_pattern.head.parameters) == list(by_parameter.head.parameters)
    assert "layers.1.weight" in by_pattern.head.parameters
    assert by_pattern.tail is None


def test_node_ids_are_those_of_the_uncut_program() -> None:
    cut = _cut("both", num_stages=1)
    whole = {node.id: node.op for node in trace(Small(), (torch.randint(0, 32, (4, 8)),)).whole().train.nodes}
    programs = [program for program in (cut.head, *cut.stages, cut.tail) if program is not None]
    assert len(programs) == 3
    assert {node.id: node.op for program in programs for node in program.train.nodes} == whole
