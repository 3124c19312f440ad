# SPDX-License-Identifier: BSD-3-Clause
"""Random tiny models of transformers, once with eager attention and once with ours, on the same weights."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB, WINDOW, LAYERS, LENGTH, NEW_TOKENS = 128, 6, 2, 17, 8
SMALL = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=128)
DECODER = dict(
    **SMALL,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.1,  # so large that attention matters to the logits, which stay below 10
    pad_token_id=0,
    bos_token_id=1,
    tie_word_embeddings=False,  # tied ones repeat the last token
    eos_token_id=None,
)
GPT_OSS = dict(
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"],
    num_local_experts=4,
    num_experts_per_tok=2,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", dict(sliding_window=WINDOW)),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", dict(sliding_window=WINDOW, attn_logit_softcapping=20.0, query_pre_attn_scalar=16)),
    "gpt_oss": ("GptOss", GPT_OSS),
}


def copies(model_class: type, config_class: type, *implementations: str, **options: Any) -> list[nn.Module]:
    """One model per implementation (the implementation is stored in the configuration, so each has its own)."""
    models = [model_class._from_config(config_class(**options), attn_implementation=name) for name in implementations]
    with torch.no_grad():
        for name, parameter in models[0].named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    for model in models:
        model.load_state_dict(models[0].state_dict())
        model.eval()
    return models


def decoders(name: str, *implementations: str, **options: Any) -> list[nn.Module]:
    family, own = DECODERS[name]
    model_class = getattr(transformers, f"{family}ForCausalLM")
    options = DECODER | own | options
    return copies(model_class, getattr(transformers, f"{family}Config"), *implementations, **options)


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length))


def padded(side: str) -> dict[str, Tensor]:
    """Inputs whose first sequence is 5 tokens shorter; position_ids count the real tokens, as generate does."""
    attention_mask = torch.ones(2, LENGTH, dtype=torch.long)
    attention_mask[0, :5] = side != "left"
    attention_mask[0, -5:] = side != "right"
    return dict(attention_mask=attention_mask, position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0))


DOCUMENTS = ((5, 1, 11), (8, 9))


def packed(rows: int = 2) -> dict[str, Any]:
    """position_ids of documents of other lengths in each row."""
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in DOCUMENTS[:rows]])
    return dict(position_ids=position_ids, use_cache=False)


def packed_offsets() -> dict[str, Any]:
    """What transformers' data collators give along with the position_ids of one packed row."""
    offsets = torch.tensor((0, *accumulate(DOCUMENTS[0])), dtype=torch.int32)
    longest = max(DOCUMENTS[0])
    return dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=longest, max_length_k=longest)


def one_by_one(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the documents of one packed row, each computed alone."""
    return torch.cat([model(document).logits for document in ids.split(DOCUMENTS[0], 1)], 1)


def real(inputs: dict[str, Any]) -> Tensor:
    """The tokens that are no padding, (b, s) bool."""
    return inputs.get("attention_mask", torch.ones(2, LENGTH)).bool()


CASES = {"plain": dict, "left": lambda: padded("left"), "right": lambda: padded("right"), "packed": packed}
