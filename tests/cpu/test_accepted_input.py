# SPDX-License-Identifier: BSD-3-Clause
"""What callers may also write: it is accepted, and gives the bits of the plain call."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from flash_attn3 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, get_scheduler_metadata
from flash_attn3.testing import bitwise_equal, offsets, restrided

LEFT = 3


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)


def same(actual, expected) -> bool:
    return all(bitwise_equal(a, b) for a, b in zip(actual, expected, strict=True))


SCALARS = [
    (
        dict(causal=True),
        [dict(causal=np.True_), dict(causal=1), dict(causal=np.int64(1)), dict(causal=True, window_size=None)],
    ),
    (dict(causal=False), [dict(causal=0), dict(causal=np.False_)]),
    (dict(window_size=(LEFT, 0)), [dict(window_size=[LEFT, 0]), dict(window_size=(np.int64(LEFT), np.int8(0)))]),
    (
        dict(window_size=(LEFT, 0)),
        [dict(window_size=(LEFT, 9), causal=True), dict(window_size=(LEFT, None), causal=True)],
    ),
    (dict(), [dict(window_size=w) for w in (None, (None, None), [-1, -1], (2**31, 2**63), (2**31 - 1, 2**100))]),
    (dict(), [dict(attention_chunk=None), dict(attention_chunk=np.int32(0)), dict(attention_chunk=2**31 - 1)]),
    (dict(softmax_scale=0.5), [dict(softmax_scale=x) for x in (np.float32(0.5), np.float64(0.5), Fraction(1, 2))]),
    (dict(softmax_scale=1.0), [dict(softmax_scale=x) for x in (1, np.int64(1))]),
    (
        dict(softmax_scale=0.25),
        [dict(softmax_scale=None), dict(pack_gqa=True), dict(pack_gqa=False), dict(sm_margin=7)],
    ),
    (dict(softcap=2.0), [dict(softcap=2), dict(softcap=np.float32(2))]),
    (dict(num_splits=3), [dict(num_splits=np.int64(3))]),
    (
        dict(),
        [dict(softcap=0), dict(deterministic=1), dict(batch_invariant=True), dict(backend="cpu"), dict(s_aux=None)],
    ),
    (dict(), [dict(s_aux=torch.full((4,), -torch.inf))]),
]


@pytest.mark.parametrize("plain, others", SCALARS, ids=lambda x: str(x)[:40])
def test_scalars(qkv, plain: dict, others: list[dict]) -> None:
    expected = flash_attn_func(*qkv, **plain, return_softmax_lse=True)
    for other in others:
        assert same(flash_attn_func(*qkv, **other, return_attn_probs=1), expected), other


def test_a_scale_of_zero_is_the_mean(qkv) -> None:
    q, k, v = qkv
    out = flash_attn_func(q, k, v, 0.0)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).repeat_interleave(2, 2).expand_as(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sink_dtypes(qkv, dtype: torch.dtype) -> None:
    sink = torch.tensor([0.5, -1.0, 2.0, -torch.inf])
    expected = flash_attn_func(*qkv, s_aux=sink, return_lse=True)
    assert same(flash_attn_func(*qkv, s_aux=sink.to(dtype), return_lse=True), expected)


LAYOUTS = {
    "b, h, s, d": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "s, b, h, d": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last stride 2": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "last stride large": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "padded": restrided,
    "odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "negative bit": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_strides(qkv, layout) -> None:
    expected = flash_attn_func(*qkv, causal=True, return_lse=True)
    assert same(flash_attn_func(*map(layout, qkv), causal=True, return_lse=True), expected)
    for i in range(3):
        arguments = [layout(x) if i == j else x for j, x in enumerate(qkv)]
        assert same(flash_attn_func(*arguments, causal=True, return_lse=True), expected)


def test_expanded_and_size_one_dims() -> None:
    q, k = torch.randn(1, 1, 4, 16), torch.randn(1, 7, 1, 16)
    odd = q.as_strided(q.shape, (999, 3, 16, 1))
    expected = flash_attn_func(q.repeat(3, 5, 1, 1), k.repeat(3, 1, 2, 1), k.repeat(3, 1, 2, 1))
    assert bitwise_equal(flash_attn_func(q.expand(3, 5, 4, 16), *[k.expand(3, 7, 2, 16)] * 2), expected)
    assert bitwise_equal(flash_attn_func(odd, k, k), flash_attn_func(q, k, k))


@pytest.mark.parametrize("shape_q, shape_k", [((0, 5), (0, 7)), ((2, 0), (2, 7)), ((2, 5), (2, 0)), ((0, 0), (0, 0))])
def test_empty_sizes(shape_q, shape_k) -> None:
    q, k, v = torch.randn(*shape_q, 4, 16), torch.randn(*shape_k, 2, 16), torch.randn(*shape_k, 2, 24)
    out, lse, max_logits = flash_attn_func(q, k, v, return_max_logits=True)
    assert bitwise_equal(out, torch.zeros(*shape_q, 4, 24))
    assert bitwise_equal(lse, torch.full((shape_q[0], 4, shape_q[1]), -torch.inf))
    assert bitwise_equal(max_logits, torch.full((shape_q[0], 4), -torch.inf))
    assert flash_attn_func(q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (*shape_q, 0, 24)


BOUNDS = [
    5,
    np.int64(5),
    torch.tensor(5),
    torch.tensor(5, dtype=torch.int32),
    torch.tensor(7, device="meta"),
    None,
    1000,
]


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_length_bounds(bound) -> None:
    cu = offsets(torch.tensor([5, 0, 4], dtype=torch.int32))
    q, k, v = (torch.randn(9, 2, 16) for _ in range(3))
    expected = flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, causal=True, return_lse=True)
    assert same(flash_attn_varlen_func(q, k, v, cu, cu, bound, bound, causal=True, return_lse=True), expected)


def test_strided_index_tensors() -> None:
    cu = offsets(torch.tensor([5, 0, 4], dtype=torch.int32))
    q, k, v = (torch.randn(9, 2, 16) for _ in range(3))
    expected = flash_attn_varlen_func(q, k, v, cu, cu, 5, 5)
    other = cu.repeat_interleave(3)[::3]
    assert bitwise_equal(flash_attn_varlen_func(q, k, v, other, other, 5, 5), expected)


LENGTHS = [5, np.int64(5), torch.tensor([5, 5], dtype=torch.int32), torch.tensor([5, 0, 5, 0], dtype=torch.int32)[::2]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_cache_lengths(lengths) -> None:
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
    expected = flash_attn_func(q, k[:, :5], v[:, :5], causal=True)
    assert bitwise_equal(flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True, num_splits=1), expected)


def test_per_block_scales_of_a_long_bound() -> None:
    """Scales cover the rows there are: a bound beyond them asks for no more."""
    q, k, v = (torch.randn(2, 7, 2, 16).to(torch.float8_e4m3fn) for _ in range(3))
    scales = dict(
        q_descale=torch.rand(2, 2, 1), k_descale=torch.rand(2, 2, 3), v_descale=torch.rand(2, 2, 1).expand(2, 2, 4)
    )
    bounds = dict(cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=1000, max_seqlen_k=1000)
    assert bitwise_equal(flash_attn_varlen_func(q, k, v, **bounds, **scales), flash_attn_func(q, k, v, **scales))


@pytest.mark.parametrize("batch", [0, 1, 4, 5])
def test_metadata_fits_the_buffers_of_serving_engines(batch: int) -> None:
    lengths = torch.zeros(batch, dtype=torch.int32)
    metadata = get_scheduler_metadata(batch, 1, 4096, 32, 8, 128, lengths, headdim_v=64, page_size=16, has_softcap=True)
    assert metadata.dtype == torch.int32 and metadata.numel() <= 1 + 4 * math.ceil(batch / 4) * 4
