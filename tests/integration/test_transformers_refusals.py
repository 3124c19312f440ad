# SPDX-License-Identifier: BSD-3-Clause
"""What the transformers integration does not serve, it refuses; and importing it registers nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import LENGTH, decoders, tokens
from transformers import masking_utils

from flash_attn3 import FlashAttn3ValueError, UnsupportedError
from flash_attn3.integrations import transformers as fa3

fa3.register()


def test_holes_in_a_mask_are_refused():
    (ours,) = decoders("llama", "fa3")
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 4] = 0
    with pytest.raises(UnsupportedError, match="attention_mask = a mask with holes; expected padding"):
        ours(tokens(), attention_mask=mask)


def test_what_is_not_served_is_refused():
    (ours,) = decoders("llama", "fa3", attention_dropout=0.1)
    with pytest.raises(UnsupportedError, match=r"dropout = 0\.1; expected 0"):
        ours.train()(tokens())
    ours.eval()
    with pytest.raises(UnsupportedError, match=r"attention_mask = a torch\.bool tensor .*; expected a 2-D mask"):
        ours(tokens(), attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril())
    states = [torch.zeros(1, heads, 3, 16) for heads in (4, 2, 2)]
    with pytest.raises(UnsupportedError, match="position_bias = given; expected None"):
        fa3.attend(ours.model.layers[0].self_attn, *states, None, position_bias=torch.zeros(1, 4, 3, 3))
    arguments = dict(inputs_embeds=torch.zeros(2, LENGTH, 64), attention_mask=None, past_key_values=None)
    with pytest.raises(UnsupportedError, match="mask_function = a custom pattern"):
        masking_utils.create_causal_mask(ours.config, **arguments, or_mask_function=lambda b, h, q, k: k >= 0)
    blocks = torch.zeros(2, LENGTH, dtype=torch.long)
    with pytest.raises(UnsupportedError, match="mask_function = a custom pattern"):
        masking_utils.create_causal_mask(ours.config, **arguments, block_sequence_ids=blocks)
    ours.config.attention_chunk_size = 8
    with pytest.raises(UnsupportedError, match=f"attention_chunk_size = 8; expected at least the {LENGTH} positions"):
        masking_utils.create_chunked_causal_mask(ours.config, **arguments)
    ours.config.attention_chunk_size = LENGTH
    assert masking_utils.create_chunked_causal_mask(ours.config, **arguments) is None


@pytest.mark.parametrize("name", ["my_flash", "sdpa2", "flex_attention_x", "paged|fa3", "org/fa3", "eager", ""])
def test_names_that_transformers_interprets_are_refused(name):
    with pytest.raises(FlashAttn3ValueError, match=r"register: name = .*; expected a name without"):
        fa3.register(name)


def test_import_claims_nothing():
    code = """
import flash_attn3, torch.nn.attention as attention
from transformers import AttentionInterface, AttentionMaskInterface
claimed = lambda: (AttentionInterface().valid_keys(), AttentionMaskInterface().valid_keys(),
                   attention.list_flash_attention_impls(), attention.current_flash_attention_impl())
before = claimed()
from flash_attn3.integrations import sdpa, transformers
assert claimed() == before, claimed()
assert not hasattr(__import__("torch").ops.flash_attn_3, "fwd")
transformers.register("mine")
sdpa.register()
assert claimed() != before and attention.current_flash_attention_impl() is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
