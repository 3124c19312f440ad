# SPDX-License-Identifier: BSD-3-Clause
"""The three ways in which the demo's model attends: flash_attn3, torch SDPA, and flash_attn3 over a cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import api, cache_api
from .model import Attend, ModelConfig, rotary_tables, rotate


def flash(config: ModelConfig, device: torch.device, backend: str | None) -> Attend:
    cos, sin = rotary_tables(config, device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return api.flash_attn_func(rotate(q, cos, sin), rotate(k, cos, sin), v, causal=True, backend=backend)

    return attend


def sdpa(config: ModelConfig, device: torch.device) -> Attend:
    cos, sin = rotary_tables(config, device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend


class FlashWithCache:
    """One call per layer rotates the new queries and keys, appends to the cache, and attends to all of it."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, backend: str | None):
        shape = (config.num_layers, batch, config.max_seqlen, config.num_heads_kv, config.head_dim)
        self.k_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.v_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.cache_seqlens = torch.zeros(batch, device=device, dtype=torch.int32)
        self.cos, self.sin = rotary_tables(config, device)
        self.backend = backend

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cache_api.flash_attn_with_kvcache(
            q,
            self.k_cache[layer],
            self.v_cache[layer],
            k,
            v,
            rotary_cos=self.cos,
            rotary_sin=self.sin,
            cache_seqlens=self.cache_seqlens,
            causal=True,
            rotary_interleaved=False,
            backend=self.backend,
        )
