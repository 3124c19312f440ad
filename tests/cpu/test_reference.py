# SPDX-License-Identifier: BSD-3-Clause
"""The oracle itself: against torch, finite differences, identities, and cases small enough to do by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from flash_attn3 import reference
from flash_attn3.reference import attention, combine, merge, visible
from flash_attn3.testing import bitwise_equal, make_inputs, offsets, poison, rmse

INF = math.inf
MASKS = [
    {},
    {"causal": True},
    {"window_size": (3, 2)},
    {"window_size": (4, -1), "causal": True},
    {"window_size": (None, 0)},
    {"attention_chunk": 4, "causal": True},
    {"attention_chunk": 3},
]
fp64 = {"dtype": torch.float64}


def randn(*shape, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, **fp64).requires_grad_(grad)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(s_q=5, s_k=7, h=4, h_kv=2, d=8, dv=16, grad=False) -> tuple[torch.Tensor, ...]:
    return randn(2, s_q, h, d, grad=grad), randn(2, s_k, h_kv, d, grad=grad), randn(2, s_k, h_kv, dv, grad=grad)


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("n_q, n_k", list(itertools.product([0, 1, 3, 8], [0, 1, 5, 8])))
def test_visible_is_the_definition(n_q, n_k, options):
    left, right = (math.inf if side in (-1, None) else side for side in options.get("window_size", (-1, -1)))
    right = 0 if options.get("causal") else right
    chunk = options.get("attention_chunk", 0)
    expected = torch.zeros(n_q, n_k, dtype=torch.bool)
    for i, j in itertools.product(range(n_q), range(n_k)):
        p = i + n_k - n_q
        expected[i, j] = p - left <= j <= p + right and (not chunk or math.floor(j / chunk) == math.floor(p / chunk))
    assert torch.equal(visible(n_q, n_k, **options), expected)


def test_visible_by_hand():
    assert visible(2, 4, causal=True).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(4, 2, causal=True).int().tolist() == [[0, 0], [0, 0], [1, 0], [1, 1]]
    assert visible(3, 3, window_size=(1, 0)).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert visible(3, 3, window_size=(5, 5), causal=True).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert visible(4, 4, causal=True, attention_chunk=2).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


@pytest.mark.parametrize("options", MASKS)
def test_matches_torch(options):
    q, k, v = dense(s_q=8, s_k=8)
    mask = visible(8, 8, **options)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
        )
    result = attention(q, k, v, **options)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / math.sqrt(8)
    scores = scores.masked_fill(~mask, -INF)
    assert_close(result.out, expected.transpose(1, 2))
    assert_close(result.lse, scores.logsumexp(-1))
    assert_close(result.max_logits, scores.amax((-1, -2)))
    assert torch.equal(result.num_keys, mask.sum(-1).expand(2, 8))


def test_two_keys_by_hand():
    q, k, v = torch.tensor([2.0, 0.0]), torch.tensor([[1.0, 0.0], [3.0, 5.0]]), torch.tensor([[10.0], [20.0]])
    q, k, v = q.view(1, 1, 1, 2), k.view(1, 2, 1, 2), v.view(1, 2, 1, 1)
    s_0, s_1, sink = 4 * math.tanh(1.0 / 4), 4 * math.tanh(3.0 / 4), 0.7
    total = math.exp(s_0) + math.exp(s_1) + math.exp(sink)
    result = attention(q, k, v, softmax_scale=0.5, softcap=4.0, s_aux=torch.tensor([sink], **fp64))
    assert result.lse.item() == pytest.approx(math.log(total))
    assert result.out.item() == pytest.approx((10 * math.exp(s_0) + 20 * math.exp(s_1)) / total)
    assert result.max_logits.item() == pytest.approx(s_1)


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("scores", [{}, {"softcap": 1.5, "softmax_scale": 0.8}])
def test_pair_by_pair(options, scores):
    """Every feature of dense attention at once, in Python's own arithmetic."""
    q, k, v, qv, s_aux = *dense(s_q=4, s_k=5, h=4, h_kv=2, d=3, dv=2), randn(2, 4, 4, 2), randn(4)
    result = attention(q, k, v, qv=qv, s_aux=s_aux, **options | scores)
    scale, softcap, mask = scores.get("softmax_scale", 5**-0.5), scores.get("softcap", 0.0), visible(4, 5, **options)
    for n, i, a in itertools.product(range(2), range(4), range(4)):
        total, out = math.exp(s_aux[a]), [0.0, 0.0]
        for j in mask[i].nonzero()[:, 0].tolist():
            key, value = k[n, j, a // 2].tolist(), v[n, j, a // 2].tolist()
            score = sum(x * y for x, y in zip(q[n, i, a].tolist() + qv[n, i, a].tolist(), key + value, strict=True))
            score = softcap * math.tanh(score * scale / softcap) if softcap else score * scale
            total += math.exp(score)
            out = [x + math.exp(score) * y for x, y in zip(out, value, strict=True)]
        assert result.out[n, i, a].tolist() == pytest.approx([x / total for x in out])
        assert result.lse[n, a, i].item() == pytest.approx(math.log(total))


@pytest.mark.parametrize("options", [*MASKS, {"softcap": 1.5}, {"softmax_scale": 0.0}])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("s_q", [3, 6])
def test_gradients_by_finite_differences(options, sink, s_q):
    q, k, v = dense(s_q=s_q, s_k=4, h=2, h_kv=1, d=3, dv=2, grad=True)
    s_aux = randn(2, grad=True) if sink else None

    def outputs(q, k, v, s_aux):
        result = attention(q, k, v, s_aux=s_aux, **options)
        return result.out, torch.where(result.lse == -INF, 0.0, result.lse)

    assert torch.autograd.gradcheck(outputs, (q, k, v, s_aux), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0}])
def test_gradients_of_padded_sequences_by_finite_differences(options):
    q, k, v, s_aux = (
        randn(7, 2, 3, grad=True),
        randn(9, 1, 3, grad=True),
        randn(9, 1, 2, grad=True),
        randn(2, grad=True),
    )
    extents = {"cu_seqlens_q": int32(1, 4, 4, 7), "cu_seqlens_k": int32(0, 5, 7, 9)}
    used = {"seqused_q": int32(2, 0, 3), "seqused_k": int32(4, 2, 2)}

    def outputs(q, k, v, s_aux):
        result = attention(q, k, v, s_aux=s_aux, **extents, **used, **options)
        return result.out, torch.where(result.lse == -INF, 0.0, result.lse)

    assert torch.autograd.gradcheck(outputs, (q, k, v, s_aux), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("sink", [None, [0.5, -INF]])
def test_rows_that_see_nothing(sink):
    q, k, v = dense(s_q=5, s_k=2, h=2, grad=True)
    s_aux = None if sink is None else torch.tensor(sink, **fp64).requires_grad_()
    result = attention(q, k, v, causal=True, s_aux=s_aux)
    empty = slice(0, 3)
    expected = torch.tensor(sink or [-INF, -INF], **fp64)[:, None].expand(2, 2, 3)
    assert bitwise_equal(result.out[:, empty], torch.zeros(2, 3, 2, 16, **fp64))
    assert torch.equal(result.lse[..., empty], expected)
    dout, dlse = randn(2, 5, 2, 16), randn(2, 2, 5)
    dout[:, empty] = torch.nan
    dlse.masked_fill_(result.lse == -INF, torch.nan)
    torch.autograd.backward([result.out, result.lse], [dout, dlse])
    assert torch.equal(q.grad[:, empty], torch.zeros(2, 3, 2, 8, **fp64))
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    if sink is not None:
        assert s_aux.grad[1] == 0


def test_visible_scores_of_minus_infinity_count_as_empty():
    q, k, v = torch.ones(1, 1, 1, 8), torch.full((1, 3, 1, 8), -INF), torch.ones(1, 3, 1, 8)
    result = attention(q, k, v)
    assert torch.equal(result.out, torch.zeros(1, 1, 1, 8, **fp64))
    assert result.lse.item() == -INF
    assert attention(q, k, v, s_aux=torch.tensor([2.0])).lse.item() == 2.0


def test_no_keys_no_rows_no_sequences():
    q, k, v = dense(s_q=3, s_k=0)
    result = attention(q, k, v)
    assert torch.equal(result.out, torch.zeros(2, 3, 4, 16, **fp64))
    assert torch.equal(result.lse, torch.full((2, 4, 3), -INF, **fp64))
    assert torch.equal(result.max_logits, torch.full((2, 4), -INF, **fp64))
    assert attention(*dense(s_q=0)).out.shape == (2, 0, 4, 16)
    assert attention(q[:0], k[:0], v[:0]).max_logits.shape == (0, 4)
    assert attention(q[:, :, :0], k[:, :, :0], v[:, :, :0]).lse.shape == (2, 0, 3)


def test_sink_is_a_key_of_value_zero():
    q, k, v = dense()
    s_aux = torch.tensor([-INF, 0.3, -40.0, 1e6], **fp64)
    plain, sunk = attention(q, k, v), attention(q, k, v, s_aux=s_aux)
    assert_close(sunk.lse, torch.logaddexp(plain.lse, s_aux[None, :, None]))
    share = torch.sigmoid(plain.lse - s_aux[None, :, None]).transpose(1, 2)[..., None]
    assert_close(sunk.out, plain.out * share)
    assert torch.equal(sunk.max_logits, plain.max_logits)


@pytest.mark.parametrize("options", MASKS)
def test_varlen_is_each_sequence_alone(options):
    extents_q, extents_k = [3, 0, 5, 2], [4, 6, 0, 7]
    q, k, v = randn(12, 4, 8), randn(20, 2, 8), randn(20, 2, 16)  # two rows and three keys belong to no sequence
    cu_q, cu_k = offsets(int32(*extents_q)) + 1, offsets(int32(*extents_k)) + 2
    result = attention(q, k, v, cu_seqlens_q=cu_q.int(), cu_seqlens_k=cu_k.int(), **options)
    out, lse = torch.zeros(12, 4, 16, **fp64), torch.full((4, 12), -INF, **fp64)
    for n in range(4):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        alone = attention(q[None, rows], k[None, keys], v[None, keys], **options)
        out[rows], lse[:, rows] = alone.out[0], alone.lse[0]
    assert_close(result.out, out)
    assert_close(result.lse, lse)
    assert result.num_keys[0] == result.num_keys[-1] == -1


def test_used_lengths_cut_extents():
    q, k, v = randn(10, 4, 8), randn(14, 2, 8), randn(14, 2, 16)
    cu_q, cu_k = int32(0, 6, 10), int32(0, 5, 14)
    used_q, used_k = int32(4, 0), int32(3, 9)
    result = attention(q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_q=used_q, seqused_k=used_k)
    alone = attention(q[None, :4], k[None, :3], v[None, :3], causal=True)
    assert_close(result.out[:4], alone.out[0])
    assert torch.equal(result.out[4:], torch.zeros(6, 4, 16, **fp64))
    assert (result.num_keys[4:] == -1).all()


def test_qv_extends_the_head_dimension():
    q, k, v = dense(dv=16)
    qv = randn(2, 5, 4, 16)
    expected = attention(torch.cat([q, qv], -1), torch.cat([k, v], -1), v, causal=True)
    assert_close(attention(q, k, v, qv=qv, causal=True).out, expected.out)
    assert_close(attention(None, None, v, qv=qv).out, attention(qv, v, v).out)


def test_combine_of_parts_is_the_whole():
    q, k, v = dense(s_k=10)
    whole = attention(q, k, v)
    parts = [attention(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 3), (3, 3), (3, 9), (9, 10))]
    out, lse = combine(torch.stack([p.out for p in parts]), torch.stack([p.lse.transpose(1, 2) for p in parts]))
    assert_close(out, whole.out)
    assert_close(lse.transpose(1, 2), whole.lse)


def test_combine_never_looks_at_empty_parts():
    out, lse = torch.full((2, 1, 1, 2, 8), torch.nan), torch.tensor([[-INF, -INF], [-INF, 1.5]]).view(2, 1, 1, 2)
    out[1, ..., 1, :] = 3.0
    merged, merged_lse = combine(out, lse)
    assert merged.view(2, 8).tolist() == [[0.0] * 8, [3.0] * 8]
    assert merged_lse.flatten().tolist() == [-INF, 1.5]
    assert combine(torch.zeros(2, 1, 1, 1, 8), torch.tensor([INF, 0.0]).view(2, 1, 1, 1))[0].isnan().all()


def test_merge_gradients():
    states = [randn(2, 3, 2, 4, grad=True), randn(2, 2, 3, grad=True), randn(2, 3, 2, 4, grad=True)]
    lse_b = randn(2, 2, 3)
    lse_b[0, 0, 0] = -INF
    assert torch.autograd.gradcheck(lambda a, lse_a, b: merge(a, lse_a, b, lse_b), states)


@pytest.mark.parametrize("layout", ["dense", "varlen", "padded", "cache", "paged"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window_size": (5, 0)}])
def test_what_nobody_sees_has_no_influence(layout, options):
    case = make_inputs(layout, seqlen_q=40, seqlen_k=30, sink=True, dtype=torch.float32) | options
    results = [attention(**poison(case, value)) for value in (0.0, math.nan, INF)]
    for other in results[1:]:
        assert all(bitwise_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_stays_where_it_is_seen():
    q, k, v = dense(s_q=6, s_k=6, h_kv=4)
    clean = attention(q, k, v, causal=True).out
    bad = [x.clone() for x in (q, k, v)]
    bad[0][0, 1, 2], bad[1][1, 3, 0, 5], bad[2][0, 4, 1, 7] = torch.nan, torch.nan, INF
    expected = clean.clone()
    expected[0, 1, 2] = torch.nan  # the row of q
    expected[1, 3:, 0] = torch.nan  # rows that see the key
    expected[0, 4:, 1, 7] = INF  # rows that see the value, that column only
    assert_close(attention(*bad, causal=True).out, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_is_that_of_eager_torch(dtype):
    leaves = [torch.randn(2, 128, 4, 64).to(dtype).requires_grad_() for _ in range(3)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = torch.softmax((q @ k.transpose(-1, -2)) * 0.125, -1) @ v
    dout = torch.randn(out.shape).to(dtype)
    torch_grads = torch.autograd.grad(out, leaves, dout)
    exact = attention(*leaves)
    exact_grads = torch.autograd.grad(exact.out, leaves, dout.transpose(1, 2).double())
    ours = attention(*leaves, precision=dtype)
    our_grads = torch.autograd.grad(ours.out, leaves, dout.transpose(1, 2).float())
    pairs = [(ours.out, out.transpose(1, 2), exact.out), *zip(our_grads, torch_grads, exact_grads, strict=True)]
    for our, torchs, true in pairs:
        assert rmse(our, true) == pytest.approx(rmse(torchs, true), rel=0.1)


def test_imports_nothing_of_the_package():
    with open(reference.__file__) as source:
        imports = [line.split()[1] for line in source if line.startswith(("import ", "from "))]
    assert set(imports) == {"__future__", "typing", "torch"}
