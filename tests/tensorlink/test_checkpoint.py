"""A run that was saved and resumed, elsewhere and on other stages, is bit for bit the run that was not interrupted."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import tensorlink
from tensorlink.errors import CheckpointError, OptimizerError
from tensorlink.remote_state import parts
from tensorlink.shards import INDEX, ShardReader

pytestmark = pytest.mark.starts_network


class Net(nn.Module):
    """Masks, statistics, a weight with two names, a frozen one, an unused one, a constant, a buffer in no file."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.two = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.4), nn.Linear(12, 12))
        self.again, self.idle = self.two[0], nn.Linear(2, 2)
        self.head = nn.Linear(12, 4)
        self.one.bias.requires_grad_(False)
        self.register_buffer("shift", torch.arange(12.0), persistent=False)

    def forward(self, x):
        x = F.dropout(torch.tanh(self.norm(self.one(x))), 0.2, self.training)
        return self.head(torch.relu(self.two[2](self.two[1](self.again(x))) + self.shift * 0.1))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)


GROUPS = [{"parameters": ["*.bias", "norm.*"], "weight_decay": 0.0}]


def plain_groups(module):
    named = dict(module.named_parameters())
    first = [p for name, p in named.items() if name.endswith(".bias") or name.startswith("norm.")]
    rest = [p for p in named.values() if all(p is not each for each in first)]
    return [{"params": first, "weight_decay": 0.0}, {"params": rest}]


def wrapped(network, module, stages=2, **options):
    arguments = {"micro_batches": 2, "example_inputs": (batch(0)[0],), "seed": 5, "progress": False, **options}
    return tensorlink.DistributedModel(module, network=network, stages=stages, **arguments)


def optimizer_of(model):
    return tensorlink.DistributedOptimizer(model, torch.optim.AdamW, groups=GROUPS, lr=1e-2, amsgrad=True)


def scheduler_of(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-1, total_steps=20)


def train(model, optimizer, scheduler, steps):
    losses = []
    for index in steps:
        x, y = batch(index)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if isinstance(model, tensorlink.reference):
            model.end_step()
        losses.append(loss.item())
    return losses


def look_around(model):
    """Forwards between steps: numbers of masks are used up, statistics move."""
    with torch.no_grad():
        model(batch(99)[0])
        model.eval()(batch(98)[0])
    model.train()


@pytest.fixture(scope="module")
def run(network, tmp_path_factory):
    """Three steps on two stages, saved at once into many shards: (folder, state, losses and state of the run as it
    went on, scheduler's state)."""
    torch.manual_seed(0)
    module = Net()
    plain = tensorlink.reference(copy.deepcopy(module), micro_batches=2, example_inputs=(batch(0)[0],), seed=5)
    plain_optimizer = torch.optim.AdamW(plain_groups(plain.module), lr=1e-2, amsgrad=True)
    plain_scheduler = scheduler_of(plain_optimizer)
    expected = train(plain, plain_optimizer, plain_scheduler, range(3))
    folder = tmp_path_factory.mktemp("run")
    with wrapped(network, module) as model:
        optimizer = optimizer_of(model)
        scheduler = scheduler_of(optimizer)
        assert train(model, optimizer, scheduler, range(3)) == expected
        for each in (model, plain):
            look_around(each)
        model.save_checkpoint(folder, optimizer=optimizer, shard_bytes=500, progress=False)
        saved, schedule = model.state_dict(), scheduler.state_dict()
        later = train(model, optimizer, scheduler, range(3, 6))
        final = model.state_dict()
    assert_module_loads(folder, saved)
    assert train(plain, plain_optimizer, plain_scheduler, range(3, 6)) == later
    assert all(torch.equal(final[name], value) for name, value in plain.module.named_parameters())
    return folder, saved, later, final, schedule


def assert_module_loads(folder, expected):
    files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    merged = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    module = Net()
    found = module.load_state_dict(merged, strict=False)
    assert sorted(found.missing_keys) == ["again.bias", "again.weight"]  # tied: there under their first names
    assert not found.unexpected_keys
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_training_goes_on_bitwise_on_any_number_of_stages(network, run, stages):
    folder, saved, later, final, schedule = run
    torch.manual_seed(stages)
    with wrapped(network, Net(), stages) as model:
        optimizer = optimizer_of(model)
        scheduler = scheduler_of(optimizer)
        assert model.load_checkpoint(folder, optimizer=optimizer, part_bytes=400, progress=False) == 3
        scheduler.load_state_dict(schedule)
        state = model.state_dict()
        assert [name for name in saved if not torch.equal(saved[name], state[name])] == []
        assert model.report()["num_steps"] == 3
        assert train(model, optimizer, scheduler, range(3, 6)) == later
        state = model.state_dict()
        assert [name for name in final if not torch.equal(final[name], state[name])] == []


def test_shards_are_as_small_as_was_asked_for(run):
    folder, saved, *_ = run
    sizes = {file.name: sum(t.nbytes for t in load_file(file).values()) for file in folder.glob("model-*.safetensors")}
    largest = max(tensor.nbytes for tensor in saved.values())
    assert len(sizes) >= 3
    assert max(sizes.values()) <= max(500, largest)
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["metadata"]["tied"] == {"again.weight": "two.0.weight", "again.bias": "two.0.bias"}


def test_audits_pass_whatever_is_loaded_when(network, processes, tmp_path):
    """Weights and moments are replaced at every awkward moment; the honest rigs are accused of nothing."""
    torch.manual_seed(0)
    with wrapped(network, Net(), audit_rates=(1.0, 1.0)) as model:
        optimizer = optimizer_of(model)
        scheduler = scheduler_of(optimizer)
        train(model, optimizer, scheduler, range(2))
        model.save_checkpoint(tmp_path, optimizer=optimizer, progress=False)
        start = {name: tensor + 0.01 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        for act in (
            lambda: model.load_checkpoint(tmp_path, optimizer=optimizer, progress=False),
            lambda: model.load_checkpoint(tmp_path, progress=False),
            lambda: model.load_state_dict(start, strict=False),
            lambda: optimizer.load_state_dict(optimizer.state_dict()),
        ):
            train(model, optimizer, scheduler, range(1))
            kept = model(batch(7)[0])
            act()
            train(model, optimizer, scheduler, range(1))
            with torch.no_grad():
                model(batch(7)[0])
            act()
            F.cross_entropy(model(batch(7)[0]), batch(7)[1]).backward()
            act()
            train(model, optimizer, scheduler, range(1))
            del kept
        assert model.report()["num_steps"] == 14
        assert processes.wait_until(lambda: sum(model.audits().values()) >= 28, 60) is not None, model.audits()
        reasons = [verdict.reason for verdict in model.verdicts() if verdict.finding != "honest"]
        assert (model.audits()["failed"], model.audits()["inconclusive"]) == (0, 0), reasons


@pytest.fixture(scope="module")
def job(network):
    torch.manual_seed(9)
    with wrapped(network, Net()) as model:
        yield model


def test_a_running_job_goes_back_to_a_checkpoint_and_counts_on(job, run):
    folder, saved, *_ = run
    optimizer = optimizer_of(job)
    scheduler = scheduler_of(optimizer)
    assert job.load_checkpoint(folder, optimizer=optimizer, progress=False) == 3
    train(job, optimizer, scheduler, range(2))
    assert job.load_checkpoint(folder, optimizer=optimizer, progress=False) == 3
    assert job.report()["num_steps"] == 5  # a step's number is used once
    state = job.state_dict()
    assert all(torch.equal(saved[name], state[name]) for name in saved)


def test_weights_alone_are_saved_and_loaded(job, tmp_path):
    before = job.state_dict()
    job.save_checkpoint(tmp_path, progress=False)
    job.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in before.items()})
    job.load_checkpoint(tmp_path, progress=False)
    after = job.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(CheckpointError, match="saved without optimizer"):
        job.load_checkpoint(tmp_path, optimizer=optimizer_of(job), progress=False)


def test_another_seed_is_told(network, run):
    with wrapped(network, Net(), 1, seed=6) as model:
        with pytest.warns(UserWarning, match="seed=5, this model has seed=6: dropout masks"):
            model.load_checkpoint(run[0], progress=False)


def rewritten(change):
    """The checkpoint with its first optimizer file's or index's content changed."""

    def act(folder, name=INDEX):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return act


def of_optimizer(change):
    return lambda folder: rewritten(change)(folder, next(folder.glob("optimizer-*.json")).name)


BAD = {
    "a tensor is missing": (rewritten(lambda c: c["weight_map"].pop("head.bias")), r"missing \['head.bias'\]"),
    "a tensor too many": (
        of_optimizer(lambda c: c["weight_map"].update(x=next(iter(c["weight_map"].values())))),
        "has no tensor 'x'",
    ),
    "another step": (rewritten(lambda c: c["metadata"].update(step=-1)), "the index says step -1: that is no count"),
    "another optimizer": (of_optimizer(lambda c: c.update(optimizer="SGD")), "of optimizer 'SGD', this one is AdamW"),
    "other groups": (of_optimizer(lambda c: c["param_groups"].pop()), "groups hold other parameters: pass the same"),
    "no groups": (of_optimizer(lambda c: c.update(param_groups=3)), "has no param_groups"),
    "an unknown option": (of_optimizer(lambda c: c["param_groups"][0].update(speed=3)), "option 'speed', which AdamW"),
    "an option of another type": (
        of_optimizer(lambda c: c["param_groups"][0].update(lr="x")),
        "lr='x' does not travel",
    ),
    "half a moment": (
        of_optimizer(lambda c: c["weight_map"].pop("head.weight/exp_avg")),
        "AdamW keeps exp_avg, .* for 'head.weight'",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(job, run, tmp_path, bad):
    change, says = BAD[bad]
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    optimizer = optimizer_of(job)
    train(job, optimizer, scheduler_of(optimizer), range(1))
    before, moments = job.state_dict(), optimizer.state_dict()
    with pytest.raises((CheckpointError, OptimizerError), match=says):
        job.load_checkpoint(tmp_path, optimizer=optimizer, progress=False)
    after, kept = job.state_dict(), optimizer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert kept["param_groups"] == moments["param_groups"]
    for number, state in moments["state"].items():
        assert all(torch.equal(value, kept["state"][number][key]) for key, value in state.items())


def test_another_module_s_checkpoint_is_refused(network, run):
    module = Net()
    module.head = nn.Linear(12, 3)
    with wrapped(network, module, 1) as model:
        with pytest.raises(
            CheckpointError, match=r"head.weight is torch.float32 \[4, 12\] in the checkpoint, the model has"
        ):
            model.load_checkpoint(run[0], progress=False)


def test_transformers_loads_the_folder(network, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    ids = torch.randint(0, 64, (4, 12))
    with tensorlink.DistributedModel(
        transformers.GPT2LMHeadModel(config), network=network, stages=1, micro_batches=2,
        example_inputs={"input_ids": ids}, progress=False,
    ) as model:  # fmt: skip
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
        model(input_ids=ids)["logits"].square().mean().backward()
        optimizer.step()
        model.save_checkpoint(tmp_path, optimizer=optimizer, shard_bytes=20_000, progress=False)
        expected = model.state_dict()
    config.save_pretrained(tmp_path)
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    state = loaded.state_dict()
    assert sorted(state) == sorted(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert ShardReader(tmp_path).optimizer["optimizer"] == "AdamW"


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, []),
        ({"a": 3, "b": 3, "c": 5, "d": 1}, [["a", "b"], ["c", "d"]]),
        ({"a": 99, "b": 1, "c": 99}, [["a"], ["b"], ["c"]]),
        ({"a": 0, "b": 0}, [["a", "b"]]),
    ],
)
def test_parts_are_bounded(sizes, expected):
    assert parts(sizes, 6) == expected
