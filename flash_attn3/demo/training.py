# SPDX-License-Identifier: BSD-3-Clause
"""Train the same model twice, on flash_attn3 and on SDPA, step by step side by side."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Attend, CharGPT, ModelConfig

PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 10


def precision(device: torch.device) -> torch.dtype:
    """What attention computes in: fp32 on the CPU, bf16 (by autocast) on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def autocast(device: torch.device) -> AbstractContextManager:
    return nullcontext() if device.type == "cpu" else torch.autocast(device.type, dtype=precision(device))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to a tenth."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1.0 - 0.9 * step / steps)


@dataclass
class Trainer:
    name: str
    model: CharGPT
    attend: Attend
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.device = self.model.embed.weight.device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95))

    @classmethod
    def seeded(cls, name: str, config: ModelConfig, attend: Attend, device: torch.device, seed: int) -> Trainer:
        torch.manual_seed(seed)
        return cls(name, CharGPT(config).to(device), attend)

    def loss(self, batch: Tensor) -> Tensor:
        with autocast(self.device):
            logits = self.model(batch[:, :-1], self.attend)
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def gradient(self, batch: Tensor) -> Tensor:
        """Of the loss, all parameters in one vector."""
        gradients = torch.autograd.grad(self.loss(batch), list(self.model.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    def step(self, batch: Tensor, learning_rate: float) -> None:
        start = time.perf_counter()
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def tokens_per_second(self, tokens_per_step: int) -> float:
        """By the median step, the first ones left out: they allocate and compile."""
        return tokens_per_step / median(self.seconds[3:] or self.seconds)
