"""A tied model over real processes: bitwise the reference with the same cut, and every step passes its audit."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from msgspec.structs import replace
from torch import nn
from torch.nn import functional as F

import tensorlink
from tensorlink.sharding.profile import profile

transformers = pytest.importorskip("transformers")

VOCABULARY = 64
#: Every step is audited as a whole.
EVERY_STEP = (0.0, 1.0)
AUDITED_WITHIN_S = 30.0


def gpt2(p=0.0):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=3, n_head=4, use_cache=False, bos_token_id=0,
        eos_token_id=0, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def loss_fn(outputs, y):
    return F.cross_entropy(outputs["logits"].reshape(-1, VOCABULARY), y.reshape(-1))


def batch(step):
    tokens = torch.randint(0, VOCABULARY, (4, 13), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()


def test_weights_and_moments_of_all_holders_make_the_round_trip_and_training_goes_on_bitwise(
    network, processes, tmp_path, monkeypatch
):
    """A second job takes over from the first one's checkpoint, and then its own state from itself."""
    # the same cut on every machine, at any load: one that may lie behind the head would tie nothing
    monkeypatch.setattr("tensorlink.placement.profile", functools.partial(profile, measured=False))
    monkeypatch.setattr(network, "find_workers", functools.partial(equally_fast, network.find_workers))
    module, (x, _) = gpt2(0.1), batch(0)
    twin = copy.deepcopy(module)
    torch.manual_seed(1)
    other = type(module)(module.config)
    arguments = {"micro_batches": 2, "example_inputs": x, "seed": 5}
    options = {"network": network, "stages": 2, "schedule": "1f1b", "progress": False, "audit_rates": EVERY_STEP}
    options |= arguments

    def steps(model, optimizer, numbers):
        found = []
        for step in numbers:
            x, y = batch(step)
            found.append(model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer, clip_norm=1e9).item())
        return found

    with tensorlink.DistributedModel(module, **options) as model:
        plain = tensorlink.reference(twin, stages=model.programs, **arguments)
        plain_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, foreach=False)
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
        expected = [
            plain.train_step(*batch(step), loss_fn=loss_fn, optimizer=plain_optimizer).item() for step in range(4)
        ]
        assert steps(model, optimizer, range(2)) == expected[:2]
        model.save_checkpoint(tmp_path, optimizer=optimizer, shard_bytes=30_000, progress=False)
    with tensorlink.DistributedModel(other, **options) as model:
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
        assert model.load_checkpoint(tmp_path, optimizer=optimizer, part_bytes=20_000, progress=False) == 2
        assert steps(model, optimizer, [2]) == expected[2:3]
        weights, moments = model.state_dict(), optimizer.state_dict()
        assert weights["lm_head.weight"] is weights["transformer.wte.weight"]
        steps(model, optimizer, [9])  # leads away
        model.load_state_dict(weights)
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
        optimizer.load_state_dict(moments)
        model.eval(), plain.eval()  # masks are of another step now
        assert steps(model, optimizer, [3]) == [
            plain.train_step(*batch(3), loss_fn=loss_fn, optimizer=plain_after(twin, moments, weights)).item()
        ]
        ours, theirs = model.state_dict(), twin.state_dict()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
        held = [
            model._placement.state.fetch_some(program.stage_index, ["transformer.wte.weight"])
            for program in model.programs
        ]
        assert torch.equal(*(tensors["transformer.wte.weight"] for tensors in held))
        done = processes.wait_until(lambda: sum(model.audits().values()) >= 6, AUDITED_WITHIN_S)
        assert done is not None, model.audits()
        assert model.audits() == {"passed": 6, "failed": 0, "inconclusive": 0, "silent": 0}


def equally_fast(find, *arguments):
    """Workers as they announce themselves, but for what they measured of their speed."""
    return [replace(worker, offers={**worker.offers, "flops_per_s": 1 << 34}) for worker in find(*arguments)]


def plain_after(twin, moments, weights):
    """torch's own optimizer, with these moments, over the twin with these weights."""
    twin.load_state_dict(weights)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, foreach=False)
    optimizer.load_state_dict(moments)
    return optimizer


@pytest.mark.parametrize(
    ("num_workers", "p", "schedule"),
    [
        (2, 0.0, "1f1b"),
        (3, 0.1, "1f1b"),  # the holders are no neighbours
        (2, 0.0, "zbv"),  # both holders are on the first worker
    ],
)
def test_a_language_model_with_a_tied_head_trains_in_stages_and_passes_its_audits(
    network, processes, num_workers, p, schedule
):
    module, (x, _) = gpt2(p), batch(0)
    twin = copy.deepcopy(module)
    arguments = {"micro_batches": 2, "example_inputs": x, "seed": 5}
    with tensorlink.DistributedModel(
        module, network=network, stages=num_workers, schedule=schedule, progress=False, audit_rates=EVERY_STEP,
        **arguments,
    ) as model:  # fmt: skip
        num_stages = len(model.programs)
        assert model.programs[0].parameters["transformer.wte.weight"].holders == (0, num_stages - 1)
        plain = tensorlink.reference(twin, stages=model.programs, **arguments)
        optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=1e-2)
        plain_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, foreach=False)
        for step in range(3):
            x, y = batch(step)
            loss = model.train_step(x, y, loss_fn=loss_fn, optimizer=optimizer)
            assert loss.item() == plain.train_step(x, y, loss_fn=loss_fn, optimizer=plain_optimizer).item()
        for each, steps in ((model, optimizer), (plain, plain_optimizer)):
            steps.zero_grad()
            for call in range(2):
                x, y = batch(10 + call)
                loss_fn(each(**x), y).backward()
                if each is model:
                    norm = model.clip_grad_norm_(1e9).item()
            steps.step()
        gradients = [parameter.grad for parameter in twin.parameters()]
        assert norm == pytest.approx(nn.utils.get_total_norm(gradients).item(), rel=1e-6)
        ours, theirs = model.state_dict(), twin.state_dict()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
        module.load_state_dict(ours)
        assert module.lm_head.weight is module.transformer.wte.weight
        num_audits = 4 * num_stages
        done = processes.wait_until(lambda: sum(model.audits().values()) >= num_audits, AUDITED_WITHIN_S)
        assert done is not None, model.audits()
        assert model.audits() == {"passed": num_audits, "failed": 0, "inconclusive": 0, "silent": 0}
