"""Models of the transformers library from tiny configs, bit for bit eager; or refused for the reason in docs/models.md.

The sweep goes through a part of `architectures.py`; with TENSORLINK_ALL_ARCHITECTURES=1 through all of them.
"""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import pytest
import tables
import torch
from stage_chain import assert_equal_to_eager

from tensorlink.errors import TraceError
from tensorlink.program.trace import trace
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile

pytest.importorskip("transformers")

from architectures import ARCHITECTURES, build, masked, masked_pair, pair, tokens

#: Cut into 1, 2, 3 and 5 stages: one of each kind.
CUT = ("gpt2", "llama", "bert", "t5", "mixtral", "vit")
#: The rest of the default sweep: as different as can be in few seconds.
SAMPLED = ("gemma2", "mamba", "opt", "deberta_v2", "albert", "bart", "swin", "resnet", "wav2vec2", "bloom", "rwkv")
ALL = tuple(name for name in ARCHITECTURES if name not in CUT)
SWEPT = ALL if os.environ.get("TENSORLINK_ALL_ARCHITECTURES") else SAMPLED
#: What goes through the sweep with padding, without.
UNPADDED = {masked: tokens, masked_pair: pair}
WITHOUT_PADDING = tuple(
    name
    for name in (ARCHITECTURES if os.environ.get("TENSORLINK_ALL_ARCHITECTURES") else ("llama", "mixtral"))
    if ARCHITECTURES[name].inputs in UNPADDED and name not in tables.REFUSED_ARCHITECTURES
)


@functools.cache
def _traced(name: str) -> Any:
    """A model that is cut, traced once when it is first asked for."""
    module, example = build(name), ARCHITECTURES[name].inputs(4)
    if name == "t5":  # three uses of one embedding, whose gradients are added in another order in several stages
        module.decoder.embed_tokens = copy.deepcopy(module.decoder.embed_tokens)
    traced = trace(module, example)
    return module, traced, profile(traced, example, measured=False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("name", CUT)
def test_an_architecture_cut_into_stages_is_bitwise_equal_to_eager(name: str, num_stages: int, training: bool) -> None:
    module, traced, measured = _traced(name)
    programs = partition(traced, measured, num_stages)
    assert_equal_to_eager(module, traced, programs, ARCHITECTURES[name].inputs, training, sizes=(4, 1, 3), steps=2)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", WITHOUT_PADDING)
def test_without_padding_an_architecture_is_bitwise_equal_to_eager(name: str, training: bool) -> None:
    """transformers then leaves the mask to the attention kernel, in eager and when it is traced by us."""
    module, inputs = build(name), UNPADDED[ARCHITECTURES[name].inputs]
    traced = trace(module, inputs(4))
    assert_equal_to_eager(module, traced, [traced.whole()], inputs, training, sizes=(4, 1), steps=2)


HALF = {"gpt2": tokens, "llama": masked, "bert": masked, "t5": masked_pair}


@functools.cache
def _under_autocast(name: str) -> Any:
    module = build(name)
    return module, trace(module, HALF[name](4), autocast=torch.bfloat16)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", HALF)
def test_an_architecture_under_autocast_is_bitwise_equal_to_eager(name: str, training: bool) -> None:
    module, traced = _under_autocast(name)
    inputs, programs = HALF[name], [traced.whole()]
    assert_equal_to_eager(module, traced, programs, inputs, training, sizes=(4, 1), steps=2, autocast=torch.bfloat16)


@pytest.mark.parametrize("name", HALF)
def test_an_architecture_of_bfloat16_weights_is_bitwise_equal_to_eager(name: str) -> None:
    module, inputs = build(name).bfloat16(), HALF[name]
    traced = trace(module, inputs(4))
    assert_equal_to_eager(module, traced, [traced.whole()], inputs, True, sizes=(4, 1), steps=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SWEPT)
def test_an_architecture_is_bitwise_equal_to_eager_or_refused_for_a_known_reason(name: str) -> None:
    module, inputs = build(name), ARCHITECTURES[name].inputs
    if name in tables.REFUSED_ARCHITECTURES:
        with pytest.raises(TraceError, match=tables.REFUSED_ARCHITECTURES[name].message):
            trace(module, inputs(3))
        return
    traced = trace(module, inputs(3))
    for training in (True, False):
        # of one sample, batch statistics may have nothing to be taken of
        sizes = (3, 2) if training else (3, 1)
        assert_equal_to_eager(module, traced, [traced.whole()], inputs, training, sizes=sizes, seed=5)


def test_the_table_of_architectures_in_the_docs_is_that_of_the_tests() -> None:
    assert tables.architecture_rows(list(ARCHITECTURES)) == tables.rows_of_docs("## Architectures of transformers")
