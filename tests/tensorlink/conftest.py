"""Small models cut into stages, pipelines of them inside this process, and the plain loop that they are held
against."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import deque
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tensorlink.network import LocalNetwork
from tensorlink.pipeline.stage import Place, Stage
from tensorlink.program.trace import trace

JOB = bytes(range(32))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Inline(Executor):
    """Hashes at once, in the calling thread."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Attention(nn.Module):
    """(B, T, C) to (B, T, C): causal attention of two heads and an MLP, both residual."""

    def __init__(self, width=16):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(x)


def mlp():
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU()),
        nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()),
        nn.Sequential(nn.Linear(16, 5)),
    ]


def gpt():
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Embedding(32, 16), Attention()),
        nn.Sequential(Attention(), Attention()),
        nn.Sequential(Attention(), nn.LayerNorm(16), nn.Linear(16, 32)),
    ]


def dropout():
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU()),
        nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.Linear(16, 5)),
    ]


def batch(name, seed=0, rows=12):
    generator = torch.Generator().manual_seed(seed)
    if name == "gpt":
        tokens = torch.randint(0, 32, (rows, 7), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return torch.randn(rows, 8, generator=generator), torch.randint(0, 5, (rows,), generator=generator)


def loss_fn(output, target):
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


MODELS = {"mlp": mlp, "gpt": gpt, "dropout": dropout}


_traced = {}


def stage_programs(modules, x):
    """A program per module, as the partition would give them; the trace of a model is made once."""
    key = repr(modules)
    if key not in _traced:
        _traced[key] = _trace_stages(modules, x)
    programs, _ = _traced[key]
    return programs, [
        {
            name: tensor.detach().clone()
            for name, tensor in {**dict(m.named_parameters()), **dict(m.named_buffers()), **_constants(key, i)}.items()
        }
        for i, m in enumerate(modules)
    ]


def _constants(key, index):
    programs, states = _traced[key]
    return {name: states[index][name] for name, spec in programs[index].buffers.items() if spec.constant}


def _trace_stages(modules, x):
    programs, states, value = [], [], x
    for index, module in enumerate(modules):
        traced = trace(module, (value,))
        programs.append(dataclasses.replace(traced.whole(), stage_index=index, num_stages=len(modules)))
        states.append({name: tensor.clone() for name, tensor in traced.state(programs[-1]).items()})
        with torch.no_grad():
            value = module.eval()(value)
        module.train()
        value = value.clone().requires_grad_()
    return programs, states


class Pipe:
    """Stages in this process: what one sends, the next receives when `run` says so."""

    def __init__(self, programs, states, *, stage_class=Stage, seed=7, **kept):
        kept = {"window_steps": 2, **kept}
        self.outputs, self.losses, self.dones, self.input_gradients = {}, {}, [], {}
        self.prepared = {}
        self.moving = deque()
        self.stages = []
        for index, (program, state) in enumerate(zip(programs, states, strict=True)):
            parameters = {n: state[n].clone().requires_grad_(s.requires_grad) for n, s in program.parameters.items()}
            buffers = {name: state[name].clone() for name in program.buffers}
            place = Place(JOB, 0, 0, index, len(programs), seed)
            make = stage_class[index] if isinstance(stage_class, list) else stage_class
            port = Port(self, index)
            self.stages.append(make(place, program, parameters, buffers, port, Inline(), **kept))

    def tell(self, method, params):
        for stage in self.stages:
            getattr(stage, method)(params)

    def run(self):
        """Until nothing is ready and nothing moves."""
        worked = True
        while worked or self.moving:
            while self.moving:
                receive, *content = self.moving.popleft()
                receive(*content)
            worked = any([stage.run_next() for stage in self.stages])


def _sent(tensor):
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class Port:
    def __init__(self, pipe, index):
        self.pipe, self.index = pipe, index

    def send(self, to, delivery, slot, tensor):
        kept = _sent(tensor)
        if to == "user":
            target = self.pipe.outputs if delivery.type == "output" else self.pipe.input_gradients
            target[(delivery, slot)] = kept
        else:
            neighbour = self.pipe.stages[self.index + (1 if to == "next" else -1)]
            self.pipe.moving.append((neighbour.receive, delivery, slot, kept))

    def share(self, to, id, slot, tensor):
        self.pipe.moving.append((self.pipe.stages[to].receive_sum, id, self.index, slot, _sent(tensor)))

    def loss(self, call, micro_batch, value):
        self.pipe.losses[(call.step, call.call, micro_batch)] = value

    def done(self, call, type, backward_pass, busy_s, prepared=None):
        if prepared is not None:
            self.pipe.prepared[self.index] = prepared
        self.pipe.dones.append((self.index, call.step, call.call, type, backward_pass))


@pytest.fixture
def rig():
    """Everything above under one name."""
    return SimpleNamespace(
        Pipe=Pipe, MODELS=MODELS, batch=batch, loss_fn=loss_fn, stage_programs=stage_programs, JOB=JOB, Inline=Inline
    )


@pytest.fixture(scope="session")
def network():
    """A whole network of real processes, shared by all tests that need one: tests must leave every node alive."""
    with LocalNetwork(
        workers=3, validators=1, slots_per_worker=8, round_interval_s=5, claim_delay_s=5, audit_rates=(0.0, 0.0)
    ) as running:
        yield running


@pytest.fixture(scope="session")
def processes():
    """The module `processes.py`."""
    spec = importlib.util.spec_from_file_location("processes", Path(__file__).with_name("processes.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
