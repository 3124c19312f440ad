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
    tokens: Tensor  # (num_new,), the most likely one at every step
    logits: Tensor  # (num_new, vocab_size) fp32
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


@torch.no_grad()
def decode(model: CharGPT, cache: FlashWithCache, prompt: Tensor, num_new: int) -> Generation:
    """prompt (s,): one call appends and attends to it, then one call for every token."""
    device, start = prompt.device, time.perf_counter()
    tokens, logits = prompt, []
    for _ in range(num_new):
        with autocast(device):
            logits.append(model(tokens[None], cache)[0, -1].float())
        cache.cache_seqlens += len(tokens)
        tokens = logits[-1].argmax()[None]
    synchronize(device)
    seconds = time.perf_counter() - start
    return Generation(torch.stack(logits).argmax(-1), torch.stack(logits), seconds)


@torch.no_grad()
def recompute(model: CharGPT, attend: Attend, prompt: Tensor, continuation: Tensor) -> Generation:
    """At every token of `continuation`, what the model says after all tokens before it, computed from scratch."""
    device, start = prompt.device, time.perf_counter()
    sequence, logits = torch.cat([prompt, continuation]), []
    for length in range(len(prompt), len(sequence)):
        with autocast(device):
            logits.append(model(sequence[None, :length], attend)[0, -1].float())
    synchronize(device)
    seconds = time.perf_counter() - start
    return Generation(torch.stack(logits).argmax(-1), torch.stack(logits), seconds)
