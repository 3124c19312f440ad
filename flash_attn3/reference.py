# SPDX-License-Identifier: BSD-3-Clause
"""The oracle: every feature from its definition, in fp64, one sequence at a time, with the whole score matrix.

Imports nothing but torch, so that it shares no mistake with what it judges. Arguments are those of the public
functions, under their names. Gradients come from torch.autograd. Letters as in `problem.py`: b, s_q, s_k, t_q,
t_k, h, h_kv, d, dv; n is a sequence with n_q query rows and n_k keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8_BLOCK = 128  # tokens that share one block descale
E4M3_MAX = 448.0


class Result(NamedTuple):
    out: Tensor  # (b, s_q, h, dv) or (t_q, h, dv)
    lse: Tensor  # (b, h, s_q) or (h, t_q)
    max_logits: Tensor  # (b, h)
    num_keys: Tensor  # (b, s_q) or (t_q,): visible keys of each row, -1 where it is not covered


def attention(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    *,
    qv: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | int | None = None,
    leftpad_k: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    rotary_interleaved: bool = True,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
    tree_mask: Tensor | None = None,
    precision: torch.dtype = torch.float64,
) -> Result:
    """Attention as the contract defines it.

    `precision` below fp64 gives the eager baseline that bounds are stated in: fp32 arithmetic, with scores, scaled
    scores, probabilities, output and their gradients each rounded to `precision`.
    """
    if q is None:  # scores from qv alone
        q, k, qv, q_descale, k_descale = qv, v, None, None, v_descale
    batch = q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    head_dims = [x.shape[-1] for x in (q, qv) if x is not None]
    scale = sum(head_dims) ** -0.5 if softmax_scale is None else softmax_scale
    compute = torch.float64 if precision == torch.float64 else torch.float32

    cache = _Slots(cu_seqlens_k, kv_batch_idx, page_table)
    used = [_used(n, cache.capacity(k, n), seqused_k) for n in range(batch)]
    padding = [0 if leftpad_k is None else min(max(int(leftpad_k[n]), 0), used[n]) for n in range(batch)]
    length = used
    rotary = (rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved)
    if k_new is not None:
        length = [min(used[n] + len(_rows(k_new, n, cu_seqlens_k_new)), cache.capacity(k, n)) for n in range(batch)]
        indices = (kv_batch_idx, page_table, cu_seqlens_k_new)
        k, v = append(k, v, k_new, v_new, used, *rotary, *indices, k_descale=k_descale, v_descale=v_descale)
    advance = causal or any(side not in (-1, None) for side in window_size or ())

    parts = []
    for n in range(batch):
        rows = _rows(q, n, cu_seqlens_q, seqused_q)
        slots = torch.arange(padding[n], length[n], device=q.device)
        q_n = _rotate(_flat(q)[rows], *rotary, n, used[n], advance).to(q.dtype)
        total = None if cp_tot_seqused_k is None else int(cp_tot_seqused_k[n])
        mask = visible(len(rows), len(slots), causal, window_size, attention_chunk, cp_world_size, cp_rank, total)
        mask = mask.to(q.device)
        if tree_mask is not None:
            mask = _see_drafts(mask, tree_mask[n])
        out, lse, max_logits = _attend(
            _dequantise(q_n.to(compute), q_descale, n, first=0),  # (n_q, h, d)
            _dequantise(k[cache.address(k, n, slots)].to(compute), k_descale, n, padding[n]),  # (n_k, h_kv, d)
            _dequantise(v[cache.address(v, n, slots)].to(compute), v_descale, n, padding[n]),
            None if qv is None else _flat(qv)[rows].to(compute),
            None if s_aux is None else s_aux.to(compute),
            mask,
            scale,
            softcap,
            precision,
        )
        parts.append((rows, out, lse, mask.sum(-1), max_logits))
    return _assemble(q, v.shape[-1], compute, parts, dense=cu_seqlens_q is None)


def visible(
    n_q: int,
    n_k: int,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    attention_chunk: int | None = 0,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_total: int | None = None,
) -> Tensor:
    """(n_q, n_k) bool: which key each row sees; the last row is aligned with the last key."""
    left, right = (-1 if side is None else side for side in window_size or (-1, -1))
    keys = torch.arange(n_k) * cp_world_size + cp_rank
    num_all = n_k if cp_total is None else cp_total
    positions = (torch.arange(n_q) + num_all - n_q)[:, None]
    mask = (keys < num_all).expand(n_q, n_k)
    if causal:
        right = 0
    if left >= 0:
        mask = mask & (keys >= positions - left)
    if right >= 0:
        mask = mask & (keys <= positions + right)
    if attention_chunk:
        mask = mask & (keys // attention_chunk == positions // attention_chunk)  # // rounds down
    return mask


def _see_drafts(mask: Tensor, words: Tensor) -> Tensor:
    """`mask` (n_q, n_k) where of the last n_q keys row i sees number u only if bit u of words[i] is set.

    words (s, ceil(s / 32)); bits that there are not count as not set.
    """
    n_q, n_k = mask.shape
    mask, (num_rows, num_words), words = mask.clone(), words.shape, words.tolist()
    for i in range(n_q):
        for u in range(max(n_q - n_k, 0), n_q):
            exists = i < num_rows and u // 32 < num_words
            if not (exists and words[i][u // 32] >> u % 32 & 1):
                mask[i, n_k - n_q + u] = False
    return mask


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache_seqlens: Tensor | list[int],
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    rotary_interleaved: bool = True,
    kv_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    *,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Copies of the caches with new keys (rotated) and values written behind the used slots of each sequence.

    16-bit values that enter an e4m3 cache are divided by their descale; anything else is rounded to the cache's
    dtype. Rows beyond the capacity are dropped.
    """
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    cache = _Slots(None, kv_batch_idx, page_table)
    for n, used in enumerate(int(x) for x in cache_seqlens):
        rows = _rows(k_new, n, cu_seqlens_k_new)
        slots = torch.arange(used, min(used + len(rows), cache.capacity(k_cache, n)), device=k_cache.device)
        keys, values = _flat(k_new)[rows[: len(slots)]], _flat(v_new)[rows[: len(slots)]]  # (s_new, h_kv, d|dv)
        keys = _rotate(keys, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved, n, used, advance=True)
        if k_cache.dtype == torch.float8_e4m3fn and k_new.dtype != k_cache.dtype:
            keys = _quantise(keys, k_cache.dtype, k_descale, n, used)
            values = _quantise(values, v_cache.dtype, v_descale, n, used)
        k_cache[cache.address(k_cache, n, slots)] = keys.to(k_cache.dtype)
        v_cache[cache.address(v_cache, n, slots)] = values.to(v_cache.dtype)
    return k_cache, v_cache


def combine(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial states: out (S, ..., s, h, d) and lse (S, ..., s, h) in fp64 to (..., s, h, d) and (..., s, h)."""
    lse_partial = lse_partial.double()
    present = lse_partial != -torch.inf
    some = present.any(0)
    shift = torch.logsumexp(torch.where(some, lse_partial, 0.0), 0)
    weights = torch.where(present, torch.exp(lse_partial - shift), 0.0)[..., None]
    lse = torch.where(some, shift, -torch.inf)
    return torch.where(present[..., None], weights * out_partial.double(), 0.0).sum(0), lse


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two states: out (..., s, h, d), lse (..., h, s), in fp64."""
    lse_partial = torch.stack([lse_a, lse_b]).transpose(-1, -2)
    out, lse = combine(torch.stack([out_a.double(), out_b.double()]), lse_partial)
    return out, lse.transpose(-1, -2)


def _assemble(q: Tensor, head_dim_v: int, dtype: torch.dtype, parts: list[tuple], dense: bool) -> Result:
    """Results of sequences to those of the call, with rows that no sequence covers as the contract wants them."""
    num_heads = q.shape[-2]
    out = torch.zeros(_flat(q).shape[0], num_heads, head_dim_v, dtype=dtype, device=q.device)
    lse = torch.full_like(out[..., 0], -torch.inf)
    num_keys = torch.full(lse.shape[:1], -1, dtype=torch.int64, device=q.device)
    for rows, out_n, lse_n, num_keys_n, _ in parts:
        out, lse = out.index_copy(0, rows, out_n), lse.index_copy(0, rows, lse_n)
        num_keys[rows] = num_keys_n
    max_logits = torch.stack([part[-1] for part in parts]) if parts else lse[:0]
    if not dense:
        return Result(out, lse.T, max_logits, num_keys)
    out, lse, num_keys = (x.unflatten(0, q.shape[:2]) for x in (out, lse, num_keys))
    return Result(out, lse.transpose(1, 2), max_logits, num_keys)


def _attend(q, k, v, qv, s_aux, mask, scale, softcap, precision) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence: q (n_q, h, d), k and v (n_k, h_kv, d|dv), mask (n_q, n_k) to (n_q, h, dv), (n_q, h), (h,)."""
    group = q.shape[1] // max(k.shape[1], 1)
    looks, seen = mask.any(1)[:, None, None], mask.any(0)[:, None, None]
    q, qv = (None if x is None else torch.where(looks, x, 0.0) for x in (q, qv))  # unseen NaN must not meet a 0
    k, v = (torch.where(seen, x, 0.0).repeat_interleave(group, 1) for x in (k, v))
    scores = _Round.apply(torch.einsum("qhd,khd->hqk", q, k), precision)
    if qv is not None:
        scores = _Round.apply(scores + _Round.apply(torch.einsum("qhd,khd->hqk", qv, v), precision), precision)
    scores = _Round.apply(scores * scale, precision)
    if softcap > 0:
        scores = _Round.apply(softcap * torch.tanh(scores / softcap), precision)
    sink = scores.new_full(scores.shape[:1], -torch.inf) if s_aux is None else s_aux
    scores = torch.where(mask, scores, -torch.inf)
    logits = torch.cat([scores, sink[:, None, None].expand(-1, len(q), 1)], -1)  # the sink: a key whose value is 0

    row_max = logits.detach().amax(-1, keepdim=True)
    shift = torch.where(row_max == -torch.inf, 0.0, row_max)
    weights = torch.exp(logits - shift)
    denominator = weights.sum(-1, keepdim=True)
    nothing = denominator == 0
    denominator = torch.where(nothing, 1.0, denominator)
    lse = torch.where(nothing, -torch.inf, shift + torch.log(denominator))[..., 0]  # (h, n_q)
    probs = _Round.apply((weights / denominator)[..., :-1], precision)

    empty = (scores == -torch.inf).all(-1).T[..., None]  # (n_q, h, 1)
    out = torch.where(empty, 0.0, _Round.apply(_weighted_sum(probs, v, mask), precision))
    max_logits = torch.cat([scores.detach().flatten(1), scores.new_full((len(scores), 1), -torch.inf)], 1).amax(1)
    return out, lse.T, max_logits


def _weighted_sum(probs: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """probs (h, n_q, n_k) times v (n_k, h, dv) over visible pairs only, by selection where v is not finite."""
    finite = v.isfinite()
    out = torch.einsum("hqk,khd->qhd", probs, torch.where(finite, v, 0.0))
    for j in (~finite).flatten(1).any(1).nonzero()[:, 0]:
        special = torch.where(finite[j], 0.0, v[j])
        out = out + torch.where(mask[:, j, None, None], probs[..., j].T[..., None] * special, 0.0)
    return out


class _Round(torch.autograd.Function):
    """Round to `precision` forwards, and the gradient backwards: what an eager op of that dtype stores."""

    @staticmethod
    def forward(ctx, x: Tensor, precision: torch.dtype) -> Tensor:
        ctx.precision = precision
        return x.to(precision).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.precision).to(grad.dtype), None


class _Slots(NamedTuple):
    """Where slot s of sequence n lies in packed keys, a cache, or its pages."""

    cu_seqlens: Tensor | None
    kv_batch_idx: Tensor | None = None
    page_table: Tensor | None = None

    def capacity(self, cache: Tensor, n: int) -> int:
        if self.cu_seqlens is not None:
            return len(_rows(cache, n, self.cu_seqlens))
        rows = cache if self.page_table is None else self.page_table
        if not 0 <= self._row(n) < len(rows):
            return 0
        return cache.shape[1] if self.page_table is None else self.page_table.shape[1] * cache.shape[1]

    def address(self, cache: Tensor, n: int, slots: Tensor) -> tuple[Tensor, ...]:
        if self.cu_seqlens is not None:
            return (_rows(cache, n, self.cu_seqlens)[slots],)
        row = torch.full_like(slots, self._row(n))
        if self.page_table is None:
            return (row, slots)
        page_size = cache.shape[1]
        return (self.page_table[row, slots // page_size].long(), slots % page_size)

    def _row(self, n: int) -> int:
        return n if self.kv_batch_idx is None else int(self.kv_batch_idx[n])


def _rows(x: Tensor, n: int, cu_seqlens: Tensor | None, seqused: Tensor | None = None) -> Tensor:
    """Rows of sequence n in the flattened x: all of dense x (b, s, ...), or its extent in packed x (t, ...)."""
    if cu_seqlens is None:
        start, stop = n * x.shape[1], (n + 1) * x.shape[1]
    else:
        start = min(max(int(cu_seqlens[n]), 0), x.shape[0])
        stop = min(max(int(cu_seqlens[n + 1]), start), x.shape[0])
    if seqused is not None:
        stop = start + _used(n, stop - start, seqused)
    return torch.arange(start, stop, device=x.device)


def _used(n: int, capacity: int, seqused: Tensor | int | None) -> int:
    if seqused is None:
        return capacity
    used = seqused if isinstance(seqused, int) else int(seqused[n])
    return min(max(used, 0), capacity)


def _flat(x: Tensor) -> Tensor:
    """(b, s, h, d) or (t, h, d) to (t, h, d)."""
    return x.flatten(0, -3)


def _scale_of_tokens(descale: Tensor, n: int, first: int, shape: torch.Size) -> Tensor:
    """Descales of x (s, heads, d), whose row 0 is token (of a cache: slot) `first` of sequence n: (s, heads, 1)."""
    num_tokens, num_heads = shape[:2]
    scale = descale[n]  # (h_kv,), or (heads, blocks)
    if scale.ndim == 1:
        return scale.repeat_interleave(num_heads // max(len(scale), 1))[None, :, None]
    tokens = torch.arange(first, first + num_tokens, device=scale.device)
    return scale[:, tokens // FP8_BLOCK].T[..., None]


def _rotate(x, cos, sin, seqlens, interleaved: bool, n: int, used: int, advance: bool) -> Tensor:
    """Rotary embedding in fp64 of rows x (s, h, d) that start at position seqlens[n], else `used`, and may advance."""
    if cos is None:
        return x
    base = used if seqlens is None else int(seqlens[n])
    positions = base + torch.arange(len(x), device=x.device) * int(advance)
    positions = positions.clamp(0, len(cos) - 1)
    cos, sin = cos.double()[positions][:, None], sin.double()[positions][:, None]  # (s, 1, rotary_dim / 2)
    half = cos.shape[-1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    x = x.double()
    rotated = x.clone()
    rotated[..., first] = x[..., first] * cos - x[..., second] * sin
    rotated[..., second] = x[..., first] * sin + x[..., second] * cos
    return rotated


def _dequantise(x: Tensor, descale: Tensor | None, n: int, first: int) -> Tensor:
    return x if descale is None else x * _scale_of_tokens(descale, n, first, x.shape).to(x.dtype)


def _quantise(x: Tensor, dtype: torch.dtype, descale: Tensor, n: int, first: int) -> Tensor:
    scaled = x.double() / _scale_of_tokens(descale, n, first, x.shape).double()
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(dtype)
