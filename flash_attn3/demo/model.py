# SPDX-License-Identifier: BSD-3-Clause
"""A small GPT over characters: RMSNorm, rotary positions, grouped query heads.

The model hands its queries, keys and values to an `attend` callable, so that the same weights run on any
attention, with or without a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (layer, q (b, s, h, d), k (b, s, h_kv, d), v (b, s, h_kv, d)) -> (b, s, h, d); q and k are not rotated yet
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 128  # ASCII
    num_layers: int = 4
    num_heads: int = 4
    num_heads_kv: int = 2
    head_dim: int = 32
    max_seqlen: int = 512

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim


def rotary_tables(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, (max_seqlen, head_dim / 2) fp32."""
    frequency = 10000.0 ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    angle = torch.arange(config.max_seqlen, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions 0, 1, ... in the half style: pairs (m, m + d / 2). x (b, s, heads, d)."""
    cos, sin = cos[: x.shape[1], None], sin[: x.shape[1], None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.split = [config.num_heads, config.num_heads_kv, config.num_heads_kv]
        self.head_dim = config.head_dim
        self.norm_attention = nn.RMSNorm(config.dim, eps=1e-6)
        self.norm_mlp = nn.RMSNorm(config.dim, eps=1e-6)
        self.qkv = nn.Linear(config.dim, sum(self.split) * config.head_dim, bias=False)
        self.project = nn.Linear(config.dim, config.dim, bias=False)
        self.up = nn.Linear(config.dim, 4 * config.dim, bias=False)
        self.down = nn.Linear(4 * config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        heads = self.qkv(self.norm_attention(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split(self.split, dim=2)
        x = x + self.project(attend(self.layer, q, k, v).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class CharGPT(nn.Module):
    """tokens (b, s) -> logits (b, s, vocab_size)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, attend)
        return self.head(self.norm(x))
