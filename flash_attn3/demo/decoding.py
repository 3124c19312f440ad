# SPDX-License-Identifier: BSD-3-Clause
"""Greedy generation with a key-value cache, and the same by recomputing everything at every token."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .attend import FlashWithCache
from .model import Attend, CharGPT
from .training import autocast, synchronize


@dataclass
class Generation:
    logits: Tensor  # (b, num_new, vocab_size) fp32
    seconds: float

    @property
    def tokens(self) -> Tensor:
        """(b, num_new), the most likely one at every step."""
        return self.logits.argmax(-1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens.numel() / self.seconds


@torch.no_grad()
def decode(model: CharGPT, cache: FlashWithCache, prompts: Tensor, num_new: int) -> Generation:
    """prompts (b, s): one step appends and attends to all of them, then one step for every token."""
    device, start = prompts.device, time.perf_counter()
    tokens, logits = prompts, []
    for _ in range(num_new):
        with autocast(device):
            logits.append(model(tokens, cache)[:, -1:].float())
        cache.cache_seqlens += tokens.shape[1]
        tokens = logits[-1].argmax(-1)
    synchronize(device)
    return Generation(torch.cat(logits, dim=1), time.perf_counter() - start)


@torch.no_grad()
def recompute(model: CharGPT, attend: Attend, prompts: Tensor, continuation: Tensor) -> Generation:
    """At every token of `continuation`, what the model says after all tokens before it, computed from scratch."""
    device, start = prompts.device, time.perf_counter()
    sequence, logits = torch.cat([prompts, continuation], dim=1), []
    for length in range(prompts.shape[1], sequence.shape[1]):
        with autocast(device):
            logits.append(model(sequence[:, :length], attend)[:, -1:].float())
    synchronize(device)
    return Generation(torch.cat(logits, dim=1), time.perf_counter() - start)
