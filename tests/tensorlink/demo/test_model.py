"""The demo's model and its text."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from smartnodes_core.errors import ConfigError
from tensorlink.demo.model import VOCABULARY, ByteGPT, Text, next_byte_loss


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.of_standard_library()


def test_the_text_is_the_standard_librarys_own_source(text: Text) -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    first = sorted(stdlib.glob("*.py"))[0].read_bytes()
    assert bytes(text.training[: len(first)].numpy()) == first
    assert len(text.training) > 1_000_000
    assert len(text.validation) > 100_000


def test_a_batch_is_the_same_for_every_caller_and_another_at_another_step(text: Text) -> None:
    x, y = text.batch(3, 4, 16)
    again, _ = text.batch(3, 4, 16)
    other, _ = text.batch(4, 4, 16)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert x.shape == y.shape == (4, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])  # y is what follows x


def test_validation_batches_come_from_other_files(text: Text) -> None:
    x, _ = text.batch(0, 4, 64, validation=True)
    assert bytes(x[0].to(torch.uint8).numpy()) in bytes(text.validation.numpy())


def test_a_python_without_sources_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match="installed without its sources"):
        Text.of_standard_library()


def test_an_untrained_model_predicts_no_byte_better_than_another() -> None:
    torch.manual_seed(0)
    model = ByteGPT(layers=2, width=32, heads=2, context=16)
    x = torch.randint(VOCABULARY, (8, 16))
    loss = next_byte_loss(model(x), torch.randint(VOCABULARY, (8, 16)))
    assert abs(loss.item() - torch.log(torch.tensor(float(VOCABULARY))).item()) < 0.5


def test_a_byte_sees_only_what_came_before_it() -> None:
    torch.manual_seed(0)
    model = ByteGPT(layers=2, width=32, heads=2, context=16).eval()
    x = torch.randint(VOCABULARY, (1, 16))
    changed = x.clone()
    changed[0, 10] = (changed[0, 10] + 1) % VOCABULARY
    before, after = model(x), model(changed)
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.equal(before[0, 10:], after[0, 10:])
