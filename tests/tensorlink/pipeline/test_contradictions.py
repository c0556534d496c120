"""What an author sees of workers that contradict each other, or its order."""

from __future__ import annotations

import pytest

from smartnodes_core.records import NO_DIGEST, Commitment, Unit
from tensorlink.ordered_data import Place, step_root
from tensorlink.pipeline.contradictions import MAX_FOUND, MAX_STEPS, Contradictions
from tensorlink.records import StepOrder

RIGHT, WRONG = bytes([1] * 32), bytes([2] * 32)


def commitment(stage, step=0, plan_version=0, shared=None, **roots):
    all_roots = {**dict.fromkeys(("x", "y", "gx", "gy"), RIGHT), **roots}
    return Commitment(
        job=bytes(32), plan_version=plan_version, replica=0, stage=stage, step=step, worker=bytes(32),
        previous=bytes(32), units=[Unit(micro_batch=0, roots=all_roots)],
        shared_roots=shared or {}, work_units=1,
    )  # fmt: skip


def order(step=0, **roots):
    return StepOrder(
        job=bytes(32), plan_version=0, step=step, **{"input_root": NO_DIGEST, "target_root": NO_DIGEST, **roots},
        loss=NO_DIGEST, loss_weights=[], loss_scale="", clip_norm="", optimizer="SGD", options=[], replaced=[],
    )  # fmt: skip


def found(*commitments, order=None):
    seen = Contradictions()
    if order is not None:
        seen.ordered(order)
    for one in commitments:
        seen.commitment(one, 3)
    return seen.found()


def test_stages_that_agree_contradict_nobody():
    data = step_root({Place(0, 0): RIGHT})
    ordered = order(input_root=data, target_root=data)
    assert found(*(commitment(stage, target=RIGHT) for stage in (2, 0, 1)), order=ordered) == []


@pytest.mark.parametrize("first", [0, 1])
def test_both_ends_of_a_link_are_compared_whichever_came_first(first):
    ends = [commitment(0, y=WRONG), commitment(1)]
    assert found(ends[first], ends[1 - first]) == ["step 0: micro-batch 0: y of stage 0 is not x of 1"]
    shared = [commitment(0, shared={"to/2": RIGHT}), commitment(2, shared={"from/0": WRONG})]
    assert found(shared[first], shared[1 - first]) == ["step 0: what stage 0 sent to stage 2 is not what 2 received"]


def test_the_ends_of_the_model_are_compared_with_the_order():
    data = step_root({Place(0, 0): RIGHT})
    ordered = order(input_root=data, target_root=data)
    seen = found(commitment(0, x=WRONG), commitment(2, target=WRONG), order=ordered)
    assert seen == [
        "step 0: stage 0: the inputs of step 0 are not those that the author's order names",
        "step 0: stage 2: the targets of step 0 are not those that the author's order names",
    ]


def test_other_steps_and_plans_are_no_contradiction():
    assert found(commitment(0, y=WRONG), commitment(1, step=1), commitment(1, plan_version=1)) == []


def test_what_is_kept_is_bounded():
    seen = Contradictions()
    for step in range(3 * MAX_FOUND):
        seen.ordered(order(step))
        seen.commitment(commitment(0, step, y=WRONG), 2)
        seen.commitment(commitment(1, step), 2)
    assert len(seen.found()) == MAX_FOUND
    assert len(seen._held) == len(seen._orders) == MAX_STEPS
