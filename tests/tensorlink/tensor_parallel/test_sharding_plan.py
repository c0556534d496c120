"""What a plan says of models: which weights are split, how, and how often the ranks speak to each other."""

from __future__ import annotations

import pytest

from tensorlink.errors import ProgramError
from tensorlink.program.decode import decode_stage
from tensorlink.tensor_parallel.plan import plan
from tensorlink.tensor_parallel.shard_interpreter import COLLECTIVES


def splits(found):
    return {name: str(split) for name, split in found.weights.items()}


def test_a_transformer_block_is_split_by_columns_then_by_rows(traced):
    found = plan(traced("gpt")[0], 2, 4)
    assert splits(found) == {
        "tokens.weight": "dim 0", "positions.weight": "dim 0",
        "qkv.weight": "dim 0 in 3 blocks", "qkv.bias": "dim 0 in 3 blocks", "out.weight": "dim 1",
        "up.weight": "dim 0", "up.bias": "dim 0", "down.weight": "dim 1", "head.weight": "dim 0",
    }  # fmt: skip
    # two of the embeddings, one after attention, one after the perceptron; logits are gathered
    assert found.train.collectives == {"reduce": 4, "gather": 1, "enter": 3, "take": 0}


def test_keys_of_fewer_heads_rotary_positions_and_a_gate_stay_split(traced):
    found = plan(traced("llama")[0], 2, 4)
    assert splits(found) == {
        "embed.weight": "dim 1", "q.weight": "dim 0", "k.weight": "dim 0", "v.weight": "dim 0", "o.weight": "dim 1",
        "gate_up.weight": "dim 0 in 2 blocks", "down.weight": "dim 1",
    }  # fmt: skip
    assert found.train.collectives == {"reduce": 2, "gather": 1, "enter": 2, "take": 0}


def test_tied_weights_are_split_alike_in_both_uses(traced):
    found = plan(traced("tied gpt")[0], 2, 4)
    assert splits(found)["tokens.weight"] == "dim 0"
    assert found.train.collectives["gather"] == 1


def test_what_does_not_divide_or_has_no_rule_is_replicated(traced):
    assert set(plan(traced("gpt with an odd vocabulary")[0], 2, 4).weights) >= {"tokens.weight"}
    assert "head.weight" not in plan(traced("gpt with an odd vocabulary")[0], 2, 4).weights
    assert set(plan(traced("convolved")[0], 2, 4).weights) == {"head.weight", "head.bias"}


def test_dropout_where_values_are_split_is_drawn_whole(traced):
    program, _, _ = traced("dropping gpt")
    found = plan(program, 2, 4)
    ops = {node.id: node.op for node in program.train.nodes}
    assert {ops[id] for id in found.train.drawn} == {
        "aten.dropout.default", "aten.scaled_dot_product_attention.default",
    }  # fmt: skip
    assert not found.eval.drawn


def test_both_modes_share_the_weights_and_keep_the_ids_of_nodes(traced):
    program, _, _ = traced("gpt")
    found = plan(program, 2, 4)
    for mine, its in ((found.train.graph, program.train), (found.eval.graph, program.eval)):
        assert {node.id for node in its.nodes} <= {node.id for node in mine.nodes}
        assert (mine.inputs, len(mine.outputs)) == (its.inputs, len(its.outputs))


def test_one_device_runs_the_program_as_it_is(traced):
    program, _, _ = traced("gpt")
    found = plan(program, 1, 4)
    assert (found.train.graph, found.eval.graph, found.weights) == (program.train, program.eval, {})


def test_a_plan_prints_what_is_split_and_what_is_sent(traced):
    text = str(plan(traced("mlp")[0], 2, 4))
    assert text.splitlines() == [
        "2 devices, 3 parameters split:", "  0.bias: dim 0", "  0.weight: dim 0", "  3.weight: dim 1",
        "  a forward: 1 reduce, 0 gather, 0 enter, 0 take",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COLLECTIVES)
def test_no_program_that_travels_can_name_a_collective(traced, name):
    data = traced("mlp")[0].to_json().replace(b"aten.tanh.default", name.encode())
    with pytest.raises(ProgramError, match=name):
        decode_stage(data)
