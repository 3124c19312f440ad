# SPDX-License-Identifier: BSD-3-Clause
"""The flash attention 3 code of transformers itself, with our functions in the place of upstream's.

transformers imports `flash_attn_interface` and asks for a GPU; both are patched here, for these tests only.
"""

from __future__ import annotations

import functools
import types

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import DECODERS, LAYERS, LENGTH, NEW_TOKENS, VOCAB, decoders, one_by_one, packed, padded, real, tokens
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.generation.continuous_batching import initialization

import flash_attn3

FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
TOLERANCE = 1e-5


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Calls of each of our functions, once transformers takes them for upstream's."""
    counted = dict.fromkeys(FUNCTIONS, 0)

    def counting(name: str):
        function = getattr(flash_attn3, name)

        @functools.wraps(function)  # transformers reads the signature
        def call(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    functions = (*map(counting, FUNCTIONS), flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    monkeypatch.setattr(transformers.GptOssPreTrainedModel, "_compatible_flash_implementations", None)
    monkeypatch.setattr(transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
    return counted


@pytest.mark.parametrize("name", DECODERS)
def test_padded_logits(name, used):
    eager, ours = decoders(name, "eager", "flash_attention_3")
    ids, inputs = tokens(), padded("left")
    with torch.no_grad():
        difference = ours(ids, **inputs).logits - eager(ids, **inputs).logits
    assert difference[real(inputs)].abs().max() <= TOLERANCE
    assert used == {**dict.fromkeys(FUNCTIONS, 0), "flash_attn_varlen_func": LAYERS}


@pytest.mark.parametrize("name", DECODERS)
def test_packed_logits(name, used):
    eager, ours = decoders(name, "eager", "flash_attention_3")
    ids = tokens(1)
    with torch.no_grad():
        assert (ours(ids, **packed(1)).logits - one_by_one(eager, ids)).abs().max() <= TOLERANCE
    assert used == {**dict.fromkeys(FUNCTIONS, 0), "flash_attn_varlen_func": LAYERS}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", ["unpadded", "padded"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generate(name, case, cache, used):
    eager, ours = decoders(name, "eager", "flash_attention_3")
    ids, mask = tokens(), padded("left")["attention_mask"]
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation=cache, disable_compile=True)
    options["attention_mask"] = mask if case == "padded" else torch.ones_like(mask)
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))
    assert sum(used.values()) == NEW_TOKENS * LAYERS


def test_training_step(used):
    models = decoders("llama", "eager", "flash_attention_3")
    ids, inputs = tokens(), padded("right")
    labels = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    losses = [model.train()(ids, labels=labels, **inputs).loss for model in models]
    for loss in losses:
        loss.backward()
    assert abs(losses[0] - losses[1]) <= TOLERANCE
    for expected, got in zip(*(model.parameters() for model in models), strict=True):
        assert (got.grad - expected.grad).abs().max() <= TOLERANCE
    assert used["flash_attn_varlen_func"] == LAYERS


def test_continuous_batching(used, monkeypatch):
    """Prefill on the ragged path, then paged decoding with append through `flash_attn_with_kvcache`."""
    cuda_claimed = types.ModuleType("torch")
    cuda_claimed.__dict__.update(torch.__dict__, cuda=types.SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(initialization, "torch", cuda_claimed)
    eager, ours = decoders("llama", "eager", "flash_attention_3")
    prompts = [torch.randint(3, VOCAB, (length,)).tolist() for length in (5, LENGTH, 9)]
    steps = 6
    generation = transformers.GenerationConfig(max_new_tokens=steps, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(
        page_size=32, num_blocks=64, max_batch_tokens=64, max_blocks_per_request=8
    )
    results = ours.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=batching, warmup=False
    )
    got = [results[request].generated_tokens for request in sorted(results)]
    expected = [
        eager.generate(torch.tensor([prompt]), max_new_tokens=steps, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert got == expected
    assert used["flash_attn_with_kvcache"] == (steps - 1) * LAYERS
    assert used["flash_attn_varlen_func"] >= LAYERS
