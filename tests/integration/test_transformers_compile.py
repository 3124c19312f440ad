# SPDX-License-Identifier: BSD-3-Clause
"""`torch.compile(fullgraph=True)` of tiny transformers models on `attn_implementation="fa3"`."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import CASES, LAYERS, LENGTH, decoders, one_by_one, packed, packed_offsets, padded, real, tokens
from torch._dynamo.testing import CompileCounter

import flash_attn3
from flash_attn3 import FlashAttn3ValueError
from flash_attn3.integrations import transformers as fa3

pytestmark = pytest.mark.unpoisoned  # dynamo does not trace the patched torch.empty
TOLERANCE = 1e-5

fa3.register()


@pytest.mark.parametrize("case", CASES)
def test_forward_compiles_without_breaks(case, calls):
    torch.compiler.reset()
    (ours,) = decoders("gpt_oss" if case == "left" else "llama", "fa3")
    ids, inputs = tokens(), CASES[case]()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    expected = ours(ids, **inputs).logits
    calls.take()
    got = compiled(ids, **inputs).logits
    assert calls.take() == (LAYERS, 0)
    assert (got - expected)[real(inputs)].abs().max() <= TOLERANCE
    got.square().mean().backward()
    assert calls.take() == (0, LAYERS)


def test_compiled_forward_takes_packed_offsets(calls):
    torch.compiler.reset()
    eager, ours = decoders("llama", "eager", "fa3")
    ids = tokens(1)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    got = compiled(ids, **packed(1), **packed_offsets()).logits
    assert calls.take() == (LAYERS, 0)
    assert (got - one_by_one(eager, ids)).abs().max() <= TOLERANCE


def test_compiled_forward_does_not_recompile_for_other_padding(calls):
    torch.compiler.reset()
    (ours,) = decoders("mistral", "fa3")
    counter = CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    with torch.no_grad():
        for side in ("left", "right", "left"):
            ids, inputs = tokens(), padded(side)
            got, expected = compiled(ids, **inputs).logits, ours(ids, **inputs).logits
            assert (got - expected)[real(inputs)].abs().max() <= TOLERANCE
    assert counter.frame_count == 1
    assert calls.take() == (6 * LAYERS, 0)


def test_holes_in_a_mask_are_found_by_a_compiled_forward():
    torch.compiler.reset()
    (ours,) = decoders("llama", "fa3")
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 4] = 0
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with pytest.raises(FlashAttn3ValueError, match=r"seqused_k.* = out of range"), torch.no_grad():
        compiled(tokens(), attention_mask=mask)
        flash_attn3.check_errors()
