"""The state between two commitments to it follows from gradients: honest work passes, and no change hides there."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from tensorlink.audit import interval as intervals
from tensorlink.audit.examine import Examiner
from tensorlink.steplog.digests import root

from .test_examine import N, Training

INTERVAL = 3


@pytest.fixture
def trained(rig):
    """Two intervals and a step of the third, all within the window."""
    training = Training(rig, "gpt", interval=INTERVAL, window=2 * INTERVAL + 1)
    for step in range(2 * INTERVAL + 1):
        training.step(step)
    return training


def changed(training, index, step, **roots):
    """The commitment of a step with other roots, and those after it chained to it anew."""
    known = training.committed[(index, step)]
    training.committed[(index, step)] = replace(known, roots={**known.roots, **roots})
    for later in range(step + 1, 2 * INTERVAL + 1):
        before = training.committed[(index, later - 1)]
        training.committed[(index, later)] = replace(training.committed[(index, later)], previous=before.digest())


def test_the_state_is_bound_where_an_interval_begins_and_ends(trained):
    for step in range(2 * INTERVAL):
        roots = trained.committed[(1, step)].roots
        assert ("weights_before" in roots) == ("optimizer_before" in roots) == (step % INTERVAL == 0)
        assert ("weights_after" in roots) == ("optimizer_after" in roots) == (step % INTERVAL == INTERVAL - 1)


def test_every_unit_and_step_of_an_interval_is_honest(trained):
    for index in range(len(trained.pipe.stages)):
        for step in range(2 * INTERVAL + 1):
            for tier, unit in [(1, 0), (1, N - 1), (2, -1)]:
                found = trained.examine(index, step, tier, unit)
                assert found["finding"] == "honest", (step, tier, found)


def test_steps_computed_with_other_threads_and_kernels_are_honest(rig):
    training = Training(rig, "gpt", interval=INTERVAL, window=INTERVAL)
    torch.set_num_threads(2)
    with torch.backends.mkldnn.flags(enabled=False):
        for step in range(INTERVAL):
            training.step(step)
    torch.set_num_threads(1)
    for step in range(INTERVAL):
        found = training.examine(1, step, 2)
        assert found["finding"] == "honest", found


@pytest.mark.parametrize("at", range(INTERVAL))
def test_weights_that_a_worker_changes_are_found_at_the_next_audited_step(rig, at):
    training = Training(rig, "gpt", interval=INTERVAL, window=2 * INTERVAL)
    for step in range(2 * INTERVAL):
        training.step(step)
        if step == at:
            with torch.no_grad():
                tensor = next(iter(training.pipe.stages[1].parameters.values()))
                tensor += 1e-3 * tensor.norm() / tensor.numel() ** 0.5
    within = [step for step in range(2 * INTERVAL) if at < step]
    found = {step: training.examine(1, step, 2)["finding"] for step in within}
    assert found[at + 1] == "fraudulent"
    assert training.examine(1, at + 1, 1, 0)["finding"] == "fraudulent"


def test_an_optimizer_that_cheats_in_the_middle_is_found_where_the_interval_ends(rig):
    training = Training(rig, "gpt", interval=INTERVAL, window=INTERVAL)
    training.step(0)
    stage = training.pipe.stages[1]
    update = stage.optimizer.step
    stage.optimizer.step = lambda gradients, groups=None: update(
        {name: gradient * 1.01 for name, gradient in gradients.items()}, groups
    )
    training.step(1)
    stage.optimizer.step = update
    training.step(2)
    assert training.examine(1, 1, 2)["finding"] == "honest"  # the state after it is not bound yet
    assert training.examine(1, 2, 2)["finding"] == "fraudulent"


def test_a_state_that_changes_between_two_intervals_is_found_from_every_step_of_the_second(trained):
    changed(trained, 1, INTERVAL - 1, weights_after=bytes(32))
    for step in (INTERVAL, INTERVAL + 1):
        assert "weights changed between steps 2 and 3" in trained.examine(1, step, 1, 0)["reason"]


def test_buffers_that_change_between_steps_are_found(rig):
    training = Training(rig, "dropout", interval=INTERVAL, window=INTERVAL)
    for step in range(INTERVAL):
        training.step(step)
    known = training.committed[(1, 1)]
    training.committed[(1, 1)] = replace(known, roots={**known.roots, "buffers_before": bytes(32)})
    training.committed[(1, 2)] = replace(training.committed[(1, 2)], previous=training.committed[(1, 1)].digest())
    assert "buffers changed between steps 0 and 1" in training.examine(1, 2, 1, 0)["reason"]


def test_an_interval_that_begins_before_the_last_has_ended_is_fraudulent(trained):
    roots = dict(trained.committed[(1, INTERVAL - 1)].roots)
    del roots["weights_after"]
    trained.committed[(1, INTERVAL - 1)] = replace(trained.committed[(1, INTERVAL - 1)], roots=roots)
    changed(trained, 1, INTERVAL)
    changed(trained, 1, INTERVAL - 1)
    assert "before the last had ended" in trained.examine(1, INTERVAL, 1, 0)["reason"]
    assert "was not committed to" in trained.examine(1, INTERVAL - 1, 2)["reason"]


def test_a_state_that_is_never_committed_to_is_fraudulent(trained):
    training = trained
    training.interval = INTERVAL - 1  # what the job says
    assert "the job says 2" in training.examine(1, INTERVAL - 1, 2)["reason"]


def test_a_worker_that_begins_with_other_weights_than_the_job_names_is_fraudulent(trained):
    trained.initial_roots[1] = bytes(32)
    assert "job record names" in trained.examine(1, 1, 1, 0)["reason"]
    assert trained.examine(1, INTERVAL, 1, 0)["finding"] == "honest"


def test_commitments_that_do_not_reach_back_say_nothing_of_the_worker(trained):
    for step, kept in [(1, 0), (INTERVAL + 1, 1), (INTERVAL, 0)]:
        params, body = trained.case(1, step, 1, 0)
        params["earlier"] = params["earlier"][len(params["earlier"]) - kept :]
        assert Examiner().examine(params, memoryview(body))["finding"] == "silent"


def test_another_gradient_or_order_than_was_committed_to_is_other_data(trained):
    params, body = trained.case(1, 1, 1, 0)
    others = trained.order(trained.pipe.stages[1], 1).encode()
    assert "order" in Examiner().examine({**params, "earlier_orders": [others]}, memoryview(body))["reason"]
    assert "orders of 0 steps" in Examiner().examine({**params, "earlier_orders": []}, memoryview(body))["reason"]
    at = len(body) // 2
    body[at] ^= 1
    assert "opened other data" in Examiner().examine(params, memoryview(body))["reason"]


def test_a_state_that_the_author_replaces_begins_an_interval_and_is_honest(rig):
    training = Training(rig, "gpt", interval=INTERVAL, window=2 * INTERVAL)
    training.replaced[2] = ["weights"]
    for step in range(4):
        if step == 2:
            for stage in training.pipe.stages:
                stage.set_state({name: tensor.detach() * 0.5 for name, tensor in stage.parameters.items()}, {})
            for roots in training.roots:
                roots.forget()
        training.step(step)
    for step in range(4):
        assert ("weights_before" in training.committed[(1, step)].roots) == (step in (0, 2))
        assert training.examine(1, step, 2)["finding"] == "honest"
    del training.replaced[2]  # and had the author not said so
    order = training.order(training.pipe.stages[1], 2)
    training.committed[(1, 2)] = replace(training.committed[(1, 2)], order=order.digest())
    assert "before the last had ended" in training.examine(1, 2, 1, 0)["reason"]


@pytest.mark.parametrize("name", ["gradient", "buffers_before", "buffers_after"])
def test_a_commitment_without_a_root_that_it_must_have_is_fraudulent(trained, name):
    known = trained.committed[(1, 1)]
    roots = {key: value for key, value in known.roots.items() if key != name}
    trained.committed[(1, 1)] = replace(known, roots=roots)
    changed(trained, 1, 2)
    for step in (1, 2):
        found = trained.examine(1, step, 1, 0)
        assert (found["finding"], "has no root of" in found["reason"]) == ("fraudulent", True)


def test_text_that_is_no_number_is_fraudulent(trained):
    trained.committed[(1, 1)] = replace(trained.committed[(1, 1)], clip_coefficient="many")
    changed(trained, 1, 2)
    assert "clip_coefficient of step 1 is no number" in trained.examine(1, 2, 1, 0)["reason"]
    assert "clip_coefficient of step 1 is no number" in trained.examine(1, 1, 2)["reason"]


def test_the_log_keeps_an_interval_as_long_as_one_of_its_steps_is_in_the_window(rig):
    training = Training(rig, "mlp", interval=INTERVAL, window=2)
    for step in range(8):
        training.step(step)
        held = training.pipe.stages[0].log.steps()
        assert held[0] % INTERVAL == 0
        assert held == list(range(held[0], step + 1))
        assert len(held) <= 2 + INTERVAL - 1
        assert {step, max(0, step - 1)} <= set(held)


def test_the_state_between_is_that_which_the_stage_had(rig):
    training = Training(rig, "gpt", interval=INTERVAL, window=INTERVAL)
    stage, seen = training.pipe.stages[1], []
    for step in range(INTERVAL):
        seen.append(root({name: tensor.detach() for name, tensor in stage.parameters.items()}))
        training.step(step)
    for step in range(INTERVAL):
        params, body = training.case(1, step, 1, 0)
        start = start_of_case(params, body)
        assert (root({name: tensor.detach() for name, tensor in start.weights.items()}), start.num_steps) == (
            seen[step],
            step,
        )


def start_of_case(params, body):
    from smartnodes_core.records import Commitment, Opening
    from tensorlink.audit.examine import _past
    from tensorlink.audit.opened import OpenedData
    from tensorlink.program.graph import StageProgram
    from tensorlink.records import StepOrder

    past = _past(params)
    data = OpenedData(Opening.decode(params["opening"]).items, memoryview(body), len(past.orders))
    return intervals.start_of(
        data,
        StageProgram.from_json(params["program"]),
        Commitment.decode(params["commitment"]),
        StepOrder.decode(params["order"]),
        past,
        with_optimizer=False,
    )
