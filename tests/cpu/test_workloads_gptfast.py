# SPDX-License-Identifier: BSD-3-Clause
"""What gpt-fast runs (C1 to C3, C5): static cache (b, h_kv, s, d), positions on the device, all under torch.compile."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from paging import int32
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from flash_attn3 import flash_attn_with_kvcache
from flash_attn3.testing import GradCheck, bitwise_equal, values

SHAPES = {"stories-15M": (6, 48), "stories-110M": (12, 64)}  # heads, head dim
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def static_cache(batch: int, heads_kv: int, capacity: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values as views (b, s, h_kv, d) of storage (b, h_kv, s, d)."""
    return [torch.zeros(batch, heads_kv, capacity, d, dtype=dtype).transpose(1, 2) for _ in range(2)]


def angles(length: int, d: int, base: float = 10000.0) -> Tensor:
    return torch.outer(torch.arange(float(length)), base ** -(torch.arange(0.0, d, 2) / d))


# C1: decode and prefill under compile


class Layer(nn.Module):
    """An attention block of gpt-fast, whose attention is this package's or torch's."""

    def __init__(self, heads: int, d: int, dtype: torch.dtype, capacity: int = 64) -> None:
        super().__init__()
        self.heads, self.d = heads, d
        self.wqkv = nn.Linear(heads * d, 3 * heads * d, bias=False, dtype=dtype)
        self.wo = nn.Linear(heads * d, heads * d, bias=False, dtype=dtype)
        table = angles(capacity, d)
        self.register_buffer("cos", table.cos())
        self.register_buffer("sin", table.sin())

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(b, s, h * d) to q, k, v (b, s, h, d)."""
        return self.wqkv(x).unflatten(-1, (3, self.heads, self.d)).unbind(2)

    def forward(self, x: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = self.project(x)
        rotary = dict(rotary_cos=self.cos, rotary_sin=self.sin)
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=position, causal=True, **rotary)
        return self.wo(out.flatten(2))

    def with_sdpa(self, x: Tensor, position: int, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = self.project(x)
        rows = torch.arange(position, position + x.shape[1])
        q, k = (interleaved(y, self.cos[rows], self.sin[rows]) for y in (q, k))
        k_cache[:, rows], v_cache[:, rows] = k, v
        mask = torch.arange(k_cache.shape[1]) <= rows[:, None]
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k_cache, v_cache)), attn_mask=mask)
        return self.wo(out.transpose(1, 2).flatten(2))


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2m, 2m + 1) of x (..., s, h, d) by the angles of tables (s, d / 2), in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None].float(), sin[:, None].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class Model(nn.Module):
    def __init__(self, heads: int, d: int, dtype: torch.dtype, vocabulary: int = 50) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, heads * d, dtype=dtype)
        self.layers = nn.ModuleList(Layer(heads, d, dtype) for _ in range(2))

    def forward(self, tokens: Tensor, position: Tensor | int, caches: list[list[Tensor]], sdpa: bool = False) -> Tensor:
        """Logits of the last token."""
        x = self.embedding(tokens)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = x + (layer.with_sdpa if sdpa else layer)(F.rms_norm(x, x.shape[-1:]), position, *cache)
        return F.rms_norm(x[:, -1], x.shape[-1:]) @ self.embedding.weight.T


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        yield
    torch._dynamo.reset()


@pytest.mark.unpoisoned  # Dynamo would trace into the patched torch.empty
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["stories-15M", pytest.param("stories-110M", marks=pytest.mark.slow)])
@torch.no_grad()
def test_c1_generation_under_compile(shape: str, dtype: torch.dtype) -> None:
    """No graph break, one compilation for all positions and one for all prompts; the bits of eager, SDPA's tokens."""
    heads, d = SHAPES[shape]
    model = Model(heads, d, dtype)

    def step(tokens: Tensor, position: Tensor, caches: list[list[Tensor]]) -> Tensor:
        return model(tokens, position, caches)

    def prefill(tokens: Tensor, position: Tensor, caches: list[list[Tensor]]) -> Tensor:
        return model(tokens, position, caches)

    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled_prefill = torch.compile(prefill, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (2, 7, 33, 1):
        prompt = torch.randint(0, 50, (1, length))
        ours, compiled, sdpa = ([static_cache(1, heads, 64, d, dtype) for _ in range(2)] for _ in range(3))
        run = compiled_prefill if length > 1 else compiled_step
        logits = step(prompt, int32(0), ours)
        assert bitwise_equal(run(prompt, int32(0), compiled), logits)
        expected = model(prompt, 0, sdpa, sdpa=True)
        for position in (*range(length, length + 3), 62, 63):
            if dtype == torch.float32:
                torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
                assert torch.equal(logits.argmax(-1), expected.argmax(-1))
            token = expected.argmax(-1, keepdim=True)
            logits = step(token, int32(position), ours)
            assert bitwise_equal(compiled_step(token, int32(position), compiled), logits)
            expected = model(token, position, sdpa, sdpa=True)
    assert all(bitwise_equal(a, b) for x, y in zip(ours, compiled, strict=True) for a, b in zip(x, y, strict=True))
    assert len(_debug_get_cache_entry_list(step)) <= 2 and len(_debug_get_cache_entry_list(prefill)) == 1


# C2: speculative decoding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 7, 120])
@torch.no_grad()
def test_c2_verify_and_roll_back(position: int, dtype: torch.dtype) -> None:
    """Nine tokens at once; of each nine the next call overwrites all but the accepted ones."""
    heads, heads_kv, d, capacity, draft = 8, 2, 64, 160, 9
    tables = angles(capacity, d)
    rotary = dict(rotary_cos=tables.cos(), rotary_sin=tables.sin())
    caches = static_cache(1, heads_kv, capacity, d, dtype)
    past = [values((1, position, heads_kv, d), dtype, seed=seed) for seed in (1, 2)]
    q = values((1, position, heads, d), dtype, seed=3)
    flash_attn_with_kvcache(q, *caches, *past, cache_seqlens=int32(0), causal=True, **rotary)
    stepwise = [cache.clone() for cache in caches]
    used = position
    for accepted in (0, 3, 8):
        q, k, v = (values((1, draft, n, d), dtype, seed=10 * accepted + n) for n in (heads, heads_kv, heads_kv + 1))
        v = v[:, :, :heads_kv]
        case = dict(q=q, k=caches[0].clone(), v=caches[1].clone(), k_new=k, v_new=v, seqused_k=int32(used), causal=True)
        check = GradCheck(case | rotary)
        arguments = dict(cache_seqlens=int32(used), causal=True, num_splits=1, return_softmax_lse=True)
        check.check_forward(*flash_attn_with_kvcache(q, *caches, k, v, **arguments, **rotary))
        for i in range(accepted):
            one = slice(i, i + 1)
            flash_attn_with_kvcache(
                q[:, one], *stepwise, k[:, one], v[:, one], cache_seqlens=int32(used + i), causal=True, **rotary
            )
        used += accepted
        for cache, expected in zip(caches, stepwise, strict=True):
            assert bitwise_equal(cache[:, :used], expected[:, :used])


# C3: Llama 3.1


def llama_31_angles(positions: int, d: int) -> Tensor:
    """Base 5e5; low frequencies divided by 8, with a ramp between the wavelengths 8192 / 4 and 8192."""
    frequency = 5e5 ** -(torch.arange(0.0, d, 2, dtype=torch.float64) / d)
    turns = 8192 * frequency / (2 * math.pi)
    ramp = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
    return torch.outer(torch.arange(positions, dtype=torch.float64), frequency * (ramp + (1 - ramp) / 8))


@pytest.mark.parametrize("position", [0, 8190, 8192, 100_000])
@torch.no_grad()
def test_c3_scaled_rotary_far_out(position: int) -> None:
    """Rotated inside the call, for positions that the cache's slots need not have, as rotated outside."""
    heads, heads_kv, d, capacity, used, new = 8, 2, 128, 40, 20, 4
    table = llama_31_angles(position + used + new, d)
    cos, sin = table.cos().float(), table.sin().float()
    q, k, v = (values((1, new, n, d), torch.bfloat16, seed=n) for n in (heads, heads_kv, heads_kv + 1))
    v = v[:, :, :heads_kv]
    caches = static_cache(1, heads_kv, capacity, d, torch.bfloat16)
    for seed, cache in enumerate(caches):
        cache[:, :used] = values((1, used, heads_kv, d), torch.bfloat16, seed=20 + seed)
    outside = [cache.clone() for cache in caches]
    first = position + used
    arguments = dict(cache_seqlens=int32(used), causal=True, num_splits=1, return_softmax_lse=True)
    rotary = dict(rotary_cos=cos, rotary_sin=sin, rotary_seqlens=int32(first))
    case = dict(q=q, k=caches[0].clone(), v=caches[1].clone(), k_new=k, v_new=v, seqused_k=int32(used), causal=True)
    check = GradCheck(case | rotary)
    check.check_forward(*flash_attn_with_kvcache(q, *caches, k, v, **arguments, **rotary))
    rows = slice(first, first + new)
    rotated_q, rotated_k = (interleaved(x, cos[rows], sin[rows]) for x in (q, k))
    check.check_forward(*flash_attn_with_kvcache(rotated_q, *outside, rotated_k, v, **arguments))
    torch.testing.assert_close(caches[0], outside[0], rtol=ULP[torch.bfloat16], atol=1e-6)
    assert bitwise_equal(caches[1], outside[1])


# C5: equal prompts in a batch


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@torch.no_grad()
def test_c5_equal_prompts(cache_dtype: torch.dtype) -> None:
    """All sequences have the bits of the first, in every step; the cache may be e4m3."""
    heads, heads_kv, d, batch = 8, 2, 128, 4
    quantised = cache_dtype == torch.float8_e4m3fn
    caches = [cache.to(cache_dtype) for cache in static_cache(batch, heads_kv, 40, d, torch.bfloat16)]
    scales = dict.fromkeys(("k_descale", "v_descale"), torch.tensor(0.02).expand(batch, heads_kv)) if quantised else {}
    used = 0
    for new in (17, 1, 1):
        q, k, v = (values((1, new, n, d), torch.bfloat16, seed=used + n) for n in (heads, heads_kv, heads_kv + 1))
        q, k, v = (x.expand(batch, -1, -1, -1) for x in (q, k, v[:, :, :heads_kv]))
        lengths = torch.full((batch,), used, dtype=torch.int32)
        case = dict(q=q, k=caches[0].clone(), v=caches[1].clone(), k_new=k, v_new=v, seqused_k=lengths, causal=True)
        check = GradCheck(case | scales)
        arguments = dict(cache_seqlens=lengths, causal=True, num_splits=1, return_softmax_lse=True)
        out, lse = flash_attn_with_kvcache(q, *caches, k, v, **arguments, **scales)
        check.check_forward(out, lse)
        for x in (out, lse, *caches):
            assert all(bitwise_equal(row, x[0]) for row in x[1:])
        used += new
