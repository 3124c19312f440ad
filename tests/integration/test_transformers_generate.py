# SPDX-License-Identifier: BSD-3-Clause
"""Generated tokens of tiny transformers models on `attn_implementation="fa3"` equal those of eager attention."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import DECODERS, LAYERS, LENGTH, NEW_TOKENS, decoders, padded, tokens
from torch._dynamo.testing import CompileCounter

from flash_attn3.integrations import transformers as fa3

TOLERANCE = 1e-5

fa3.register()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", ["unpadded", "padded"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name, case, cache, calls):
    eager, ours = decoders(name, "eager", "fa3")
    ids = tokens()
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation=cache, disable_compile=True)
    mask = padded("left")["attention_mask"]
    options["attention_mask"] = mask if case == "padded" else torch.ones_like(mask)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    expected, got = eager.generate(ids, **options), ours.generate(ids, **options)
    assert calls.take() == (NEW_TOKENS * LAYERS, 0)
    assert torch.equal(got.sequences, expected.sequences)
    assert (torch.stack(got.logits) - torch.stack(expected.logits)).abs().max() <= TOLERANCE


def test_beam_search(calls):
    eager, ours = decoders("gemma2", "eager", "fa3")
    ids = tokens()
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=3, **padded("left"))
    options.pop("position_ids")
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))
    assert calls.take() == (NEW_TOKENS * LAYERS, 0)


def test_cache_is_continued_by_several_tokens(calls):
    """A second turn: more than one new row, over a cache whose window has rolled on."""
    eager, ours = decoders("mistral", "eager", "fa3")
    ids = tokens()
    logits = []
    with torch.no_grad():
        for model in (eager, ours):
            cache = model(ids[:, :9]).past_key_values
            logits.append(model(ids[:, 9:], past_key_values=cache).logits)
    assert (logits[0] - logits[1]).abs().max() <= TOLERANCE
    assert calls.take() == (2 * LAYERS, 0)


def test_mask_may_cover_slots_that_are_not_written_yet(calls):
    models = decoders("llama", "eager", "fa3")
    ids, total = tokens(), LENGTH + NEW_TOKENS
    mask = torch.ones(2, total, dtype=torch.long)
    mask[0, :5] = 0
    logits = []
    with torch.no_grad():
        for model in models:
            cache = transformers.StaticCache(config=model.config, max_cache_len=total)
            logits.append(model(ids, attention_mask=mask, past_key_values=cache).logits[mask[:, :LENGTH].bool()])
    assert (logits[0] - logits[1]).abs().max() <= TOLERANCE
    assert calls.take() == (LAYERS, 0)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_compiled_decoding_on_a_static_cache(name, calls):
    """One graph serves all steps, and slots that are not written yet are not attended to."""
    torch.compiler.reset()
    eager, ours = decoders(name, "eager", "fa3")
    ids, total = tokens(), LENGTH + NEW_TOKENS
    mask = torch.zeros(2, total, dtype=torch.long)
    mask[:, :LENGTH] = padded("left")["attention_mask"]
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=mask[:, :LENGTH])
    expected = eager.generate(ids, **options)[:, LENGTH:]
    counter = CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    cache = transformers.StaticCache(config=ours.config, max_cache_len=total)
    got = []
    with torch.no_grad():
        positions = (mask[:, :LENGTH].cumsum(1) - 1).clamp(min=0)
        logits = ours(ids, attention_mask=mask[:, :LENGTH], position_ids=positions, past_key_values=cache).logits
        for position in range(LENGTH, total):
            got.append(logits[:, -1].argmax(-1, keepdim=True))
            mask[:, position] = 1
            positions = mask.sum(1, keepdim=True) - 1
            logits = compiled(got[-1], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    assert torch.equal(torch.cat(got, 1), expected)
    assert counter.frame_count <= (1 if name == "llama" else 2)  # a rolling window is one more
    assert calls.take() == ((1 + NEW_TOKENS) * LAYERS, 0)
