"""The main job, end to end on one machine: a whole network of real processes trains a byte-level GPT, and a plain
process checks it.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm import tqdm

import tensorlink
from smartnodes_core.records import Verdict
from tensorlink.demo.ledger import POLL_S, SETTLE_TIMEOUT_S, settle, worker_table
from tensorlink.demo.model import ByteGPT, Text, next_byte_loss
from tensorlink.model import DistributedModel
from tensorlink.network import LocalNetwork
from tensorlink.recovery.recovery import Recovered

logger = logging.getLogger(__name__)

#: The last tenth of the steps computes the loss in the last stage.
TRAIN_STEP_SHARE = 0.1
#: Such that a cheat is all but surely found within an audit window, which is how far the run goes back.
CHEAT_AUDIT_RATES = (0.05, 0.4)


@dataclass(frozen=True)
class DemoOptions:
    """Sizes and settings of the demo; short rounds and high audit rates, so that a minute shows dozens of audits.

    With a `cheat` (a name in `cheats.py`) one of the two workers that begin cheats so after a third of the steps,
    audits are more frequent, the spare joins after them, and all steps are `train_step`s: those are what the run can
    go back over.
    """

    steps: int = 240
    batch: int = 32
    micro_batches: int = 8
    context: int = 128
    layers: int = 4
    width: int = 128
    heads: int = 4
    learning_rate: float = 1e-3
    seed: int = 0
    workers: int = 3
    validators: int = 4
    stages: int = 2
    round_interval_s: int = 5
    claim_delay_s: int = 5
    audit_window_steps: int = 16
    audit_rate_per_micro_batch: float = 0.01
    audit_rate_per_step: float = 0.06
    validation_batches: int = 4
    cheat: str = ""

    def runs_loop(self, step: int) -> bool:
        """Whether a step is the loop of a PyTorch user, rather than one `train_step`."""
        return not self.cheat and step < self.steps * (1 - TRAIN_STEP_SHARE)


@dataclass
class DemoResult:
    """What the demo measured; `as_report` is what `--report` writes."""

    options: DemoOptions
    losses: list[float] = field(default_factory=list)
    plain_losses: list[float] = field(default_factory=list)
    step_times_s: list[float] = field(default_factory=list)
    validation_before: float = 0.0
    validation_after: float = 0.0
    seconds_to_first_step: float = 0.0
    run_s: float = 0.0
    plain_s: float = 0.0
    processes: list[dict[str, Any]] = field(default_factory=list)
    workers: list[dict[str, Any]] = field(default_factory=list)
    rounds: int = 0
    recoveries: list[Recovered] = field(default_factory=list)
    cheat_found: Verdict | None = None
    cheat_reputation: int | None = None
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def loss_relative_difference(self) -> float:
        """The largest relative difference of a step's loss from the plain run's."""
        pairs = zip(self.losses, self.plain_losses, strict=True)
        return max((abs(ours - plain) / abs(plain) for ours, plain in pairs), default=float("nan"))

    @property
    def tokens_per_s(self) -> float:
        """Over all steps, the wait for the first one left out."""
        tokens = self.options.batch * self.options.context * len(self.step_times_s)
        return tokens / sum(self.step_times_s)

    def as_report(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "settings": asdict(self.options),
            "loss_relative_difference": self.loss_relative_difference,
            "validation_loss": {"before": self.validation_before, "after": self.validation_after},
            "tokens_per_s": self.tokens_per_s,
            "seconds_to_first_step": self.seconds_to_first_step,
            "run_s": self.run_s,
            "plain_s": self.plain_s,
            "rounds": self.rounds,
            "recoveries": [asdict(recovered) for recovered in self.recoveries],
            "workers": self.workers,
            "processes": self.processes,
            "model": self.model,
            "losses": self.losses,
            "plain_losses": self.plain_losses,
            "step_times_s": self.step_times_s,
        }


def run_demo(options: DemoOptions, say: Callable[[str], None]) -> DemoResult:
    """Run the demo; `say` takes lines for a person. Everything it starts has ended when it returns or raises."""
    began = time.monotonic()
    result = DemoResult(options)
    text = Text.of_standard_library()
    torch.manual_seed(options.seed)
    module = ByteGPT(options.layers, options.width, options.heads, options.context)
    plain_module = copy.deepcopy(module)
    torch.set_num_threads(1)  # as each worker: the plain run is to be comparable bit by bit
    with LocalNetwork(
        workers=options.workers,
        validators=options.validators,
        round_interval_s=options.round_interval_s,
        claim_delay_s=options.claim_delay_s,
        audit_window_steps=options.audit_window_steps,
        say=say,
        **{"audit_rates": (options.audit_rate_per_micro_batch, options.audit_rate_per_step), **_cheating(options)},
    ) as network:
        say(f"network: {network}")
        example, _ = text.batch(0, options.batch, options.context)
        with DistributedModel(
            module,
            network=network,
            stages=options.stages,
            micro_batches=options.micro_batches,
            example_inputs=(example,),
            seed=options.seed,
        ) as model:
            say(model._placement.table.table())
            for name in network.settings.late:
                network.local.start_node(name)
            _train(model, text, options, result, began)
            result.processes = network.processes()
            module.load_state_dict(model.state_dict())
            result.model = model.report()
        say("waiting for the last audits and rounds …")
        settle(network)
        result.workers = worker_table(network, model, model.verdicts())
        result.rounds = network.chain.round_state(network.network_id).number
        if options.cheat:
            _note_cheat(network, model, result)
    result.run_s = time.monotonic() - began
    _train_plain(plain_module, text, options, result)
    return result


def _cheating(options: DemoOptions) -> dict[str, Any]:
    """What a network with a cheat is started with besides."""
    if not options.cheat:
        return {}
    honest_steps = str(options.steps // 3)
    command = (sys.executable, "-m", "tensorlink.cli.cheating_worker", options.cheat, honest_steps)
    return {
        "commands": {"worker-0": command},
        "late": [f"worker-{options.workers - 1}"],
        "audit_rates": CHEAT_AUDIT_RATES,
    }


def _note_cheat(network: LocalNetwork, model: DistributedModel, result: DemoResult) -> None:
    """What became of the cheat, and the losses as they are without it."""
    result.cheat_found = next((v for v in model.verdicts() if v.finding == "fraudulent"), None)
    result.recoveries = model.recoveries()
    for recovered in result.recoveries:
        for step, loss in recovered.losses.items():
            result.losses[step] = torch.tensor(loss).item()
    if result.cheat_found is not None:
        deadline, pause = time.monotonic() + SETTLE_TIMEOUT_S, threading.Event()
        while result.cheat_reputation != 0 and time.monotonic() < deadline:
            result.cheat_reputation = network.reputation_of(result.cheat_found.worker)
            pause.wait(POLL_S)


def _train(model: DistributedModel, text: Text, options: DemoOptions, result: DemoResult, began: float) -> None:
    optimizer = tensorlink.DistributedOptimizer(model, torch.optim.AdamW, lr=options.learning_rate)
    result.validation_before = _validate(model, text, options)
    bar = tqdm(range(options.steps), desc="training", unit="step")
    for step in bar:
        at = time.monotonic()
        x, y = text.batch(step, options.batch, options.context)
        if options.runs_loop(step):
            optimizer.zero_grad()
            loss = next_byte_loss(model(x), y)
            loss.backward()
            optimizer.step()
        else:
            loss = model.train_step(x, y, loss_fn=next_byte_loss, optimizer=optimizer)
        result.losses.append(loss.item())
        result.step_times_s.append(time.monotonic() - at)
        if not result.seconds_to_first_step:
            result.seconds_to_first_step = time.monotonic() - began
        audits = model.audits()
        rate = options.batch * options.context / result.step_times_s[-1]
        bar.set_postfix_str(
            f"loss {loss.item():.3f}, {rate:,.0f} tokens/s, {audits['passed']} audits passed, {audits['failed']} failed"
        )
    bar.close()
    result.validation_after = _validate(model, text, options)


def _validate(model: torch.nn.Module, text: Text, options: DemoOptions) -> float:
    model.eval()
    with torch.no_grad():
        losses = []
        for index in range(options.validation_batches):
            x, y = text.batch(index, options.batch, options.context, validation=True)
            losses.append(next_byte_loss(model(x), y).item())
    model.train()
    return sum(losses) / len(losses)


def _train_plain(module: ByteGPT, text: Text, options: DemoOptions, result: DemoResult) -> None:
    """The same training here, in one plain process: same seed, same data, same micro-batches."""
    began = time.monotonic()
    example, _ = text.batch(0, options.batch, options.context)
    plain = tensorlink.reference(
        module, micro_batches=options.micro_batches, example_inputs=(example,), seed=options.seed
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=options.learning_rate)
    for step in tqdm(range(options.steps), desc="the same in one plain process", unit="step"):
        x, y = text.batch(step, options.batch, options.context)
        if options.runs_loop(step):
            optimizer.zero_grad()
            loss = next_byte_loss(plain(x), y)
            loss.backward()
            optimizer.step()
            plain.end_step()
        else:
            loss = plain.train_step(x, y, loss_fn=next_byte_loss, optimizer=optimizer)
        result.plain_losses.append(loss.item())
    result.plain_s = time.monotonic() - began
