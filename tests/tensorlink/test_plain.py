"""The oracle is itself held against the loop that a PyTorch user would write."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tensorlink
from smartnodes_core.errors import JobError
from tensorlink.errors import InputError, TraceError
from tensorlink.program.trace import trace
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def batch():
    return torch.randn(7, 4), torch.randint(0, 3, (7,))


def by_hand(module, optimizer, x, y):
    """Micro-batches one after the other, each weighted by its samples."""
    optimizer.zero_grad()
    losses = []
    for xm, ym in zip(x.tensor_split(3), y.tensor_split(3), strict=True):
        weight = len(ym) / len(y)
        loss = F.cross_entropy(module(xm), ym)
        loss.backward(torch.tensor(weight))
        losses.append(weight * loss.item())
    optimizer.step()
    return torch.tensor(sum(losses))


def test_a_training_step_is_the_loop_over_micro_batches(batch):
    module, twin = net(), net()
    plain = tensorlink.reference(module, micro_batches=3, example_inputs=(batch[0],))
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (module, twin)]
    for _ in range(3):
        ours = plain.train_step(*batch, loss_fn=F.cross_entropy, optimizer=optimizers[0])
        assert ours.item() == by_hand(twin, optimizers[1], *batch).item()
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True))


def test_a_drop_in_loop_gives_the_gradients_of_its_parts(batch):
    module = net()
    twin = copy.deepcopy(module)
    plain = tensorlink.reference(module, micro_batches=3, example_inputs=(batch[0].clone().requires_grad_(),))
    x, y = batch
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.cross_entropy(plain(ours * 3), y).backward()
    F.cross_entropy(torch.cat([twin(part) for part in (theirs * 3).tensor_split(3)]), y).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_dropout_masks_depend_on_step_and_call_and_on_nothing_else():
    module = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    x = torch.randn(6, 4)
    plain = tensorlink.reference(module, micro_batches=2, example_inputs=(x,), seed=5)
    again = tensorlink.reference(module, micro_batches=2, example_inputs=(x,), seed=5)
    first, second = plain(x), plain(x)
    assert torch.equal(first, again(x))
    assert not torch.equal(first, second)
    plain.end_step(), again.end_step()
    torch.manual_seed(99)
    third = plain(x)
    assert torch.equal(third, again(x))
    assert not torch.equal(third, first)


class Tied(nn.Module):
    """The first layer's weight comes last again, behind batch statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.last(self.norm(self.first(x)))) @ self.first.weight


def tied_twins(x):
    """A tied model in two stages with its reference, and a copy."""
    torch.manual_seed(0)
    module = Tied()
    twin = copy.deepcopy(module)
    traced = trace(module, (x,))
    stages = partition(traced, profile(traced, (x,), measured=False), 2)
    assert stages[1].parameters["first.weight"].holders == (0, 1)
    return tensorlink.reference(module, micro_batches=3, example_inputs=(x,), stages=stages), twin, stages


@pytest.mark.parametrize("set_to_none", [True, False])
def test_with_stages_gradients_of_a_tied_parameter_are_sums_over_stages(batch, set_to_none):
    x = batch[0]
    plain, twin, _ = tied_twins(x)
    for steps in range(2):
        plain.zero_grad(set_to_none)
        by_use = [torch.zeros(4, 4), torch.zeros(4, 4)]
        for _ in range(2):  # gradients of several backwards add up
            plain(x).sum().backward()
            for piece in x.tensor_split(3):
                first, last = (twin.first.weight.detach().requires_grad_() for _ in range(2))
                h = twin.norm(F.linear(piece, first, twin.first.bias))
                (torch.tanh(twin.last(h)) @ last).sum().backward()
                by_use = [by_use[0] + first.grad, by_use[1] + last.grad]
        assert torch.equal(plain.module.first.weight.grad, by_use[0] + by_use[1]), steps
        assert all(torch.equal(a, b) for a, b in zip(plain.module.buffers(), twin.buffers(), strict=True))


def test_stages_are_all_those_of_one_partition_in_order(batch):
    _, twin, stages = tied_twins(batch[0])
    for wrong in (stages[:1], stages[::-1]):
        with pytest.raises(JobError, match="all stages of one partition are needed"):
            tensorlink.reference(twin, example_inputs=(batch[0],), stages=wrong)


def test_inputs_are_checked_as_by_the_network(batch):
    plain = tensorlink.reference(net(), micro_batches=3, example_inputs=(batch[0],))
    with pytest.raises(InputError, match="float64"):
        plain(batch[0].double())


def test_names_of_the_package_stay_what_they_are_however_they_are_imported():
    code = (
        "import tensorlink.plain, tensorlink.model, tensorlink as t; [getattr(t, n) for n in t.__all__ * 2]; "
        "print(callable(t.reference))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


def test_the_node_side_of_a_rig_loads_no_torch():
    modules = "tensorlink.cli.worker, tensorlink.cli.validator, tensorlink.cli.main"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


class WithLoss(nn.Module):
    """Returns its own loss, logits, and a state whose batch is the second dimension, as transformers and LSTMs do."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(4, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, labels):
        y, state = self.gru(x)
        logits = self.head(y[:, -1])
        return F.cross_entropy(logits, labels), logits, state


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_loss_inside_the_model_is_averaged_by_samples(micro_batches):
    torch.manual_seed(0)
    module, x, y = WithLoss(), torch.randn(7, 5, 4), torch.randint(0, 3, (7,))
    twin = copy.deepcopy(module)
    plain = tensorlink.reference(module, micro_batches=micro_batches, example_inputs=(x, y))
    loss, logits, state = plain(x, y)
    loss.backward()
    expected, expected_logits, expected_state = twin(x, y)
    expected.backward()
    assert (logits.shape, state.shape) == (expected_logits.shape, expected_state.shape)
    torch.testing.assert_close((loss, logits, state), (expected, expected_logits, expected_state))
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert micro_batches > 1 or torch.equal(ours.grad, theirs.grad)


def test_gradients_reach_a_state_whose_batch_is_the_second_dimension():
    torch.manual_seed(0)
    module, x, y = WithLoss(), torch.randn(7, 5, 4), torch.randint(0, 3, (7,))
    twin = copy.deepcopy(module)
    plain = tensorlink.reference(module, micro_batches=3, example_inputs=(x, y))
    weights = torch.randn(2, 7, 8)
    (plain(x, y)[2] * weights).sum().backward()
    (twin(x, y)[2] * weights).sum().backward()
    for ours, theirs in zip(module.gru.parameters(), twin.gru.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


class Contrasts(nn.Module):
    """Similarities of all pairs in a batch."""

    def forward(self, x):
        return x @ x.t()


def test_an_output_that_micro_batches_cannot_make_up_needs_one_micro_batch():
    x = torch.randn(6, 4)
    with pytest.raises(TraceError, match=r"output\.0 has shape \[-1, -1\].*micro_batches=1"):
        tensorlink.reference(Contrasts(), micro_batches=2, example_inputs=(x,))
    plain = tensorlink.reference(Contrasts(), micro_batches=1, example_inputs=(x,))
    assert torch.equal(plain(x), x @ x.t())


def test_autocast_is_that_of_a_plain_loop(batch):
    module = net()
    twin = copy.deepcopy(module)
    x, y = batch
    plain = tensorlink.reference(module, micro_batches=1, example_inputs=(x,), autocast=torch.bfloat16)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (module, twin)]
    for _ in range(2):
        loss = plain.train_step(x, y, loss_fn=F.cross_entropy, optimizer=optimizers[0])
        optimizers[1].zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            expected = F.cross_entropy(twin(x), y)
        expected.backward()
        optimizers[1].step()
        assert (loss.item(), loss.dtype) == (expected.item(), expected.dtype)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True))


def test_train_step_takes_a_loss_of_outputs_flattened_over_time():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9), nn.Flatten(0, 1))
    ids, labels = torch.randint(0, 9, (6, 4)), torch.randint(0, 9, (6, 4))
    twin = copy.deepcopy(module)
    plain = tensorlink.reference(module, micro_batches=3, example_inputs=(ids,))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    found = plain.train_step(ids, labels, loss_fn=lambda y, t: F.cross_entropy(y, t.view(-1)), optimizer=optimizer)
    torch.testing.assert_close(found, F.cross_entropy(twin(ids), labels.view(-1)).detach())
