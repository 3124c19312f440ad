# SPDX-License-Identifier: BSD-3-Clause
"""A character-level Llama trained on the source of a module of the standard library, ours against torch's SDPA."""

from __future__ import annotations

import argparse
import inspect
import time

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import LAYERS

from flash_attn3.integrations import transformers as fa3

STEPS, BATCH, LENGTH = 60, 8, 64
SHAPE = dict(hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16)

fa3.register()


def characters() -> tuple[Tensor, int]:
    text = inspect.getsource(argparse)
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


def train(implementation: str) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(0)
    text, vocab = characters()
    config = transformers.LlamaConfig(vocab_size=vocab, intermediate_size=128, **SHAPE)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
        ids = text[starts + torch.arange(LENGTH)]
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_loss_curves_are_the_same(calls):
    expected = train("sdpa")
    assert calls.take() == (0, 0)
    began = time.process_time()
    got = train("fa3")
    seconds = time.process_time() - began
    assert calls.take() == (STEPS * LAYERS, STEPS * LAYERS)
    assert max(abs(ours - theirs) for ours, theirs in zip(got, expected, strict=True)) < 1e-4
    assert got[-1] < 0.75 * got[0], "it does not learn"
    assert seconds < 10
